"""Writes and reads events: structured lines in a job's output, by which its processes report to launch/.

Events travel in the output because a shared file system can show other nodes a state that is seconds old.
"""

import json
import os
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from pretrain.run.position import host_name

MARK = "@van-pretrain "
# Characters of JSON in a line. srun splits lines at 1,024 bytes and may interleave other tasks' output (Slurm 22.05).
LINE_LENGTH = 800


@dataclass(frozen=True)
class Event:
    kind: str
    values: dict[str, Any]


def emit_event(kind: str, **values: Any) -> None:
    """Prints an event, split into lines of: MARK, the process, "+" (on the last line "."), a piece of the JSON."""
    text = json.dumps({"kind": kind, **values})
    pieces = [text[start : start + LINE_LENGTH] for start in range(0, len(text), LINE_LENGTH)]
    signs = ["+"] * (len(pieces) - 1) + ["."]
    print("\n".join(f"{MARK}{host_name()}:{os.getpid()} {sign} {piece}" for sign, piece in zip(signs, pieces, strict=True)), flush=True)


def is_event(line: str) -> bool:
    return line.startswith(MARK)


@dataclass
class EventReader:
    """Reassembles events from their lines, which may be interleaved with those of other processes."""

    _pieces: defaultdict[str, str] = field(default_factory=lambda: defaultdict(str))

    def read(self, line: str) -> Event | None:
        """Returns the event that `line` completes, or None if more of its lines follow."""
        sender, sign, piece = line.rstrip("\n").removeprefix(MARK).split(" ", 2)
        self._pieces[sender] += piece
        if sign == "+":
            return None
        values = json.loads(self._pieces.pop(sender))
        return Event(values.pop("kind"), values)
