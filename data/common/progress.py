"""Reports progress on stderr: a bar on a terminal, otherwise a line every ten seconds and one at the end."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

from data.common.text import format_duration

T = TypeVar("T")
SECONDS_BETWEEN_LINES = 10.0


def report_progress(items: Iterable[T], total: int, label: str, weigh: Callable[[T], int] = lambda item: 1) -> Iterator[T]:
    """Yields the items and reports progress under `label`; `total` is the sum of all weights."""
    if sys.stderr.isatty():
        with tqdm(total=total, desc=label, unit="", unit_scale=total > 99_999) as bar:
            for item in items:
                yield item
                bar.update(weigh(item))
        return
    start = last = time.monotonic()
    done = 0
    for item in items:
        yield item
        done += weigh(item)
        now = time.monotonic()
        if now - last >= SECONDS_BETWEEN_LINES:
            last = now
            rate = done / (now - start)
            left = format_duration((total - done) / rate) if rate else "unknown time"
            print(f"{label}: {done} of {total}, {rate:.0f} a second, {left} left", file=sys.stderr, flush=True)
    print(f"{label}: {done} of {total} in {format_duration(time.monotonic() - start)}", file=sys.stderr, flush=True)
