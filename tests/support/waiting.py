"""Waits for a condition."""

import time
from collections.abc import Callable


def wait_until(reached: Callable[[], object], seconds: float = 60, explain: Callable[[], object] = str) -> None:
    """Raises AssertionError, with what `explain` returns, unless `reached` returns a true value within `seconds`."""
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline, explain()
        time.sleep(0.02)
