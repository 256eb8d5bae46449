"""What a person and a program can see of a run: lines on the terminal or in the job's log, and RUN/metrics.jsonl.

One rank of a job (rank 0) has a voice; on the others every method does nothing.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm


class RunLog:
    """Args:
    path: of metrics.jsonl, which is appended to; None on a rank without a voice.
    """

    def __init__(self, path: Path | None):
        self.path = path
        self._bar: tqdm | None = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)

    def line(self, text: str) -> None:
        """Prints a line, above the progress bar if there is one."""
        if self.path is not None:
            tqdm.write(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stdout)
            sys.stdout.flush()

    def record(self, kind: str, **values: Any) -> None:
        """Appends one object to metrics.jsonl."""
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps({"kind": kind, "time": round(time.time(), 3), **values}) + "\n")

    def start_progress(self, step: int, total: int) -> None:
        """Opens a progress bar where a person is watching; a log gets its lines alone."""
        if self.path is not None and sys.stderr.isatty():
            self._bar = tqdm(initial=step, total=total, unit="step", dynamic_ncols=True)

    def advance(self) -> None:
        if self._bar is not None:
            self._bar.update()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def duration(seconds: float) -> str:
    """`2d 03:04:05`, `03:04:05` or `04:05`."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    return (f"{days}d " if days else "") + (f"{h:02d}:" if hours else "") + f"{m:02d}:{s:02d}"
