"""Processes that end together: an error, a killed worker or Ctrl-C ends all of them, and none outlives its parent.

with workers(8) as run:
    for result in run(function, items):      # as map does: in order, but eight at a time
        …
"""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

Run = Callable[..., Iterator]  # map, here or in processes

# NumPy's OpenBLAS would start a thread for every core in every worker.
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


@contextmanager
def workers(count: int) -> Iterator[Run]:
    """Gives a `map` that runs in `count` processes, or for 1 in this one.

    Raises ValueError when a worker was killed; what a function raises is raised here. Either way the other workers are ended at once.
    """
    if count == 1:
        yield map
        return
    others = set(multiprocessing.active_children())
    environment = dict(os.environ)
    os.environ.update(_ONE_THREAD)
    pool = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), initializer=_begin)

    def run(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        """Not pool.map: it cancels what it has begun, which the pool's own thread does not survive when workers end (Python 3.11)."""
        waiting: deque[Future[Any]] = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) == 2 * count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    try:
        yield run
    except BrokenProcessPool as error:
        raise ValueError(
            "a worker process was killed, perhaps because memory was short; fewer --workers need less. What is done is kept: "
            "start the same command again"
        ) from error
    finally:
        os.environ.clear()
        os.environ.update(environment)
        for worker in set(multiprocessing.active_children()) - others:
            worker.terminate()
        pool.shutdown()


def _begin() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to all; the parent ends the others
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
