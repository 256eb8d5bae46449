"""Reads items ahead in background threads.

    with ReadAhead(work, read, threads=4, depth=6) as reader:
        for result in reader:      # read(item) for each item of `work`, in that order
            …

The threads also advance `work`, one at a time, so the consumer does not wait for the generator that computes the sample order.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class ReadAhead(AbstractContextManager, Generic[Item, Result]):
    """Iterates over the results of `read`, which several threads call, in the order of `work`.

    At most `depth` items are read, or being read, beyond the last one that was returned. An error in `work` or `read` is raised when its
    item is due, and again on every later call.
    """

    def __init__(self, work: Iterator[Item], read: Callable[[Item], Result], *, threads: int, depth: int) -> None:
        self._work, self._read = work, read
        self._work_lock = threading.Lock()
        self._taken = 0  # items taken from `work`; guarded by _work_lock
        self._room = threading.Semaphore(depth)
        self._changed = threading.Condition()  # guards the attributes below
        self._results: dict[int, Result | BaseException] = {}
        self._returned = 0
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
                except BaseException as error:  # StopIteration too: the end of the work is passed on as a result
                    self._set_result(number, error)
                    self._work = iter(())  # a generator that raised can't be resumed
                    self._room.release()
                    return
            try:
                self._set_result(number, self._read(item))
            except BaseException as error:
                self._set_result(number, error)

    def _set_result(self, number: int, result: Result | BaseException) -> None:
        with self._changed:
            self._results[number] = result
            self._changed.notify_all()

    def __iter__(self) -> Iterator[Result]:
        return self

    def __next__(self) -> Result:
        with self._changed:
            self._changed.wait_for(lambda: self._returned in self._results or self._closed)
            if self._closed:
                raise StopIteration
            result = self._results[self._returned]
            if isinstance(result, StopIteration):
                raise StopIteration
            if isinstance(result, BaseException):
                try:
                    raise result
                finally:
                    del result  # the traceback refers to this frame, and would keep the callers' frames until a garbage collection
            del self._results[self._returned]
            self._returned += 1
        self._room.release()
        return result

    def close(self) -> None:
        """Ends and joins the threads, and drops results that were read ahead."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for _ in self._threads:
            self._room.release()
        for thread in self._threads:
            thread.join()
        self._results.clear()

    def __exit__(self, *error: object) -> None:
        self.close()
