"""Runs worker processes that end together: an error, a killed worker or Ctrl-C ends all of them, and none outlives its parent.

with start_workers(8) as run:
    for result in run(function, items):      # like map: results in order, eight at a time
        …
"""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

Run = Callable[..., Iterator]  # map, in this process or in workers

# NumPy's OpenBLAS would start one thread per core in every worker.
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


@contextmanager
def start_workers(count: int, preload: Sequence[str] = ()) -> Iterator[Run]:
    """Yields a `map` that runs in `count` processes or, for 1, in this process.

    The workers are forked from a server process that imports the modules in `preload` once. An error that the mapped function
    raises is raised to the caller. Leaving the context ends all workers at once. Raises ValueError if a worker was killed.
    """
    if count == 1:
        yield map
        return
    others = set(multiprocessing.active_children())
    environment = dict(os.environ)
    os.environ.update(_ONE_THREAD)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    pool = ProcessPoolExecutor(count, context, initializer=_watch_parent)

    def run(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        # pool.map cancels submitted items, and in Python 3.11 the pool's thread does not survive that when workers end.
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
            "a worker process was killed, perhaps because memory ran out; fewer --workers need less. Finished work is kept: "
            "start the same command again"
        ) from error
    finally:
        os.environ.clear()
        os.environ.update(environment)
        for worker in set(multiprocessing.active_children()) - others:
            worker.terminate()
        pool.shutdown()


def _watch_parent() -> None:
    """Initializes a worker: it ignores Ctrl-C, which a terminal sends to every process, and exits with its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
