"""Progress for people and for logs: a bar on a terminal, otherwise a plain line every ten seconds and at the end (stderr)."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")
SECONDS_BETWEEN_LINES = 10.0


def report_progress(iterable: Iterable[T], total: int, label: str, weigh: Callable[[T], int] = lambda item: 1) -> Iterator[T]:
    """Passes the items of `iterable` on and reports on them. An item counts as many of the `total` as `weigh` says."""
    if sys.stderr.isatty():
        with tqdm(total=total, desc=label, unit="", unit_scale=total > 99_999) as bar:
            for item in iterable:
                yield item
                bar.update(weigh(item))
        return
    start = last = time.monotonic()
    done = 0
    for item in iterable:
        yield item
        done += weigh(item)
        now = time.monotonic()
        if now - last >= SECONDS_BETWEEN_LINES:
            last = now
            rate = done / (now - start)
            left = duration((total - done) / rate) if rate else "unknown time"
            print(f"{label}: {done} of {total}, {rate:.0f} a second, {left} left", file=sys.stderr, flush=True)
    print(f"{label}: {done} of {total} in {duration(time.monotonic() - start)}", file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """A time in the two largest units that matter: `7 s`, `12 min 5 s`, `3 h 40 min`, and from two days on `2 d 3 h`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} d {hours % 24} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
