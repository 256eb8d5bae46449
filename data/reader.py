"""Reads encoded images ahead of need, off the training thread.

    with ReadAhead(store, work, threads=4, depth=6) as reader:
        for item, images in reader:      # items in the order of `work`; images: list of uint8 arrays, one for each of item.ids
            …

The threads also advance `work`, one at a time, so what its generator computes (order, augmentation) costs the consumer nothing.
"""

import threading
from collections.abc import Iterator
from types import TracebackType
from typing import Generic, Protocol, TypeVar

import numpy as np

from data.store import ShardStore


class HasIds(Protocol):
    @property
    def ids(self) -> np.ndarray: ...


Item = TypeVar("Item", bound=HasIds)


class ReadAhead(Generic[Item]):
    """An iterator over (item, encoded images), with at most `depth` items read or being read beyond the one last given out.

    What fails in a thread (in `work` or in the store, which names shard and sample) is raised at the item's turn, and again on
    every later call.
    """

    def __init__(self, store: ShardStore, work: Iterator[Item], *, threads: int, depth: int) -> None:
        self._store = store
        self._work = work
        self._work_lock = threading.Lock()
        self._taken = 0  # items taken from `work`; guarded by _work_lock
        self._room = threading.Semaphore(depth)
        self._changed = threading.Condition()  # guards what follows
        self._results: dict[int, tuple[Item, list[np.ndarray]] | BaseException] = {}
        self._given = 0
        self._closed = False
        self._threads = [threading.Thread(target=self._run, name=f"read-ahead-{number}", daemon=True) for number in range(threads)]
        for thread in self._threads:
            thread.start()

    def _run(self) -> None:
        while True:
            self._room.acquire()
            if self._closed:
                return
            with self._work_lock:
                number = self._taken
                self._taken += 1
                try:
                    item = next(self._work)
                except BaseException as error:  # StopIteration too: the end of the work is a result like any other
                    self._give(number, error)
                    self._work = iter(())  # a generator that raised is spent, and so is the work
                    self._room.release()
                    return
            try:
                self._give(number, (item, [self._store.read(int(sample_id)) for sample_id in item.ids]))
            except BaseException as error:
                self._give(number, error)

    def _give(self, number: int, result: tuple[Item, list[np.ndarray]] | BaseException) -> None:
        with self._changed:
            self._results[number] = result
            self._changed.notify_all()

    def __iter__(self) -> Iterator[tuple[Item, list[np.ndarray]]]:
        return self

    def __next__(self) -> tuple[Item, list[np.ndarray]]:
        with self._changed:
            self._changed.wait_for(lambda: self._given in self._results or self._closed)
            if self._closed:
                raise StopIteration
            result = self._results[self._given]
            if isinstance(result, StopIteration):
                raise StopIteration
            if isinstance(result, BaseException):
                try:
                    raise result
                finally:
                    del result  # or its traceback, which holds this frame, would keep all callers alive until a collection
            del self._results[self._given]
            self._given += 1
        self._room.release()
        return result

    def close(self) -> None:
        """Ends and joins the threads; what was read ahead is dropped."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for _ in self._threads:
            self._room.release()
        for thread in self._threads:
            thread.join()
        self._results.clear()

    def __enter__(self) -> "ReadAhead[Item]":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
