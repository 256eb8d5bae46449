"""Writes the output of a run: log lines on stdout, records in RUN/metrics.jsonl, and curves (trackers.py).

Only rank 0 writes; on other ranks every method does nothing.
"""

import errno
import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pretrain.run.trackers import Trackers


class RunLog:
    """Writes lines, records and a progress bar; `path` is that of metrics.jsonl, or None on a rank that does not write."""

    def __init__(self, path: Path | None):
        self.path = path
        self.trackers = Trackers(self.line)  # also receive the records, once opened
        self._bar: tqdm | None = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)

    def line(self, text: str) -> None:
        """Prints a line with the time, above the progress bar if there is one."""
        if self.path is not None:
            with suppress(OSError):  # a full disk must not end a job for a line
                tqdm.write(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stdout)
                sys.stdout.flush()

    def record(self, kind: str, **values: Any) -> None:
        """Appends a record to metrics.jsonl and sends it to the trackers; logs a record that the disk refuses."""
        if self.path is None:
            return
        self.trackers.send(kind, values)
        self.append(self.path, {"kind": kind, "time": round(time.time(), 3), **values})

    def append(self, path: Path, values: dict[str, Any]) -> None:
        """Appends a JSON line to a file; logs a line that the disk refuses."""
        record = json.dumps(values)
        try:
            _append(path, f"{record}\n".encode())
        except OSError as error:
            self.line(f"{path} could not be written: {error}; lost: {record}")

    def start_progress(self, step: int, total: int) -> None:
        """Opens a progress bar if stderr is a terminal."""
        if self._bar is not None:
            self._bar.close()
        if self.path is not None and sys.stderr.isatty():
            self._bar = tqdm(initial=step, total=total, unit="step", dynamic_ncols=True)

    def advance(self) -> None:
        """Advances the progress bar by a step."""
        if self._bar is not None:
            self._bar.update()

    def close(self) -> None:
        """Closes the trackers and the progress bar."""
        self.trackers.close()
        if self._bar is not None:
            self._bar.close()


def _append(path: Path, line: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        before = os.fstat(descriptor).st_size
        if os.write(descriptor, line) < len(line):  # the disk is full: leave no half record
            os.ftruncate(descriptor, before)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    finally:
        os.close(descriptor)
