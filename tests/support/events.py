"""Reads and writes events (pretrain/run/events.py) in tests."""

import json
from typing import Any

from pretrain.run.events import MARK, Event, EventReader, is_event


def read_events(output: str) -> list[Event]:
    """Returns the complete events in a job's output."""
    reader = EventReader()
    return [event for line in output.splitlines() if is_event(line) and (event := reader.read(line))]


def without_events(output: str) -> list[str]:
    return [line for line in output.splitlines() if not is_event(line)]


def event_line(kind: str, **values: Any) -> str:
    """Returns the line of a short event."""
    return f"{MARK}test . {json.dumps({'kind': kind, **values})}\n"
