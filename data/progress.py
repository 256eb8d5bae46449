"""Progress for people and for logs: a bar on a terminal, otherwise a plain line every ten seconds and at the end (stderr)."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")
SECONDS_BETWEEN_LINES = 10.0


def progress(iterable: Iterable[T], total: int, label: str) -> Iterator[T]:
    """Passes the items of `iterable` on and reports on them."""
    if sys.stderr.isatty():
        yield from tqdm(iterable, total=total, desc=label)
        return
    start = last = time.monotonic()
    done = 0
    for item in iterable:
        yield item
        done += 1
        now = time.monotonic()
        if now - last >= SECONDS_BETWEEN_LINES:
            last = now
            print(f"{label}: {done} of {total}, {done / (now - start):.0f} a second", file=sys.stderr, flush=True)
    print(f"{label}: {done} of {total} in {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
