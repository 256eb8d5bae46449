"""Reads encoded images from a dataset's shards, from as many threads as one likes.

    with ShardStore(index) as store:                                     # of a folder
        encoded = store.read(sample_id)

    with FetchedShards(index, uses, at_once=…, cache_gb=100) as store:   # of a URL: through a cache of whole shards (cache.py)
        encoded = store.read(sample_id)                                  # waits for the shard if it is not there yet
        store.advance(step)                                              # steps before this one are read: their shards may go

A read that fails is tried again, with growing pauses: what is left after that is an OSError, of a single image. A shard at a URL that
can't be fetched is another matter: an outage, told by a ValueError.

Threads of its own fetch the shards of `uses` (order.py) in that order, as far ahead as this process's part of the cache allows.
"""

import errno
import itertools
import math
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from data.common.hashing import hash_file
from data.dataset.index import Index, fetch_idx
from data.loader.order import ShardUse
from data.settings import DataConfig
from data.storage.cache import Cache, release
from data.storage.remote import Stopped

READ_TRIES = 6
FIRST_PAUSE = 0.25  # seconds; each pause is twice the one before, the last of five 4: eight seconds in all
FETCH_THREADS = 4  # downloads at a time, a process
_CLOSE_SECONDS = 1.0  # to wait for a download to notice; one that is stalled ends by itself


class _OpenShard:
    """A file descriptor that closes when the last thread that uses it lets go. Closing it on eviction instead would let the
    number be reused by another file under a thread that is about to read."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def read(self, size: int, offset: int) -> bytes:
        data = os.pread(self.descriptor, size, offset)
        if len(data) != size:
            raise OSError(errno.ENODATA, f"the shard ends early: {len(data)} of {size} bytes at {offset}")
        return data

    def __del__(self) -> None:
        os.close(self.descriptor)


class _PinnedShard(_OpenShard):
    def __del__(self) -> None:
        release(self.descriptor)


class ShardStore:
    """Local shard files, read by position (os.pread). At most `max_open` stay open, the most recently used ones."""

    waited_s = 0.0  # seconds that readers, all of them together, have waited for shards to be fetched

    def __init__(self, index: Index, max_open: int = 256) -> None:
        self.index = index
        self.max_open = max_open
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()
        self._lock = threading.Lock()
        self._failed: set[int] = set()  # shards of which the last read failed
        self._stop = threading.Event()

    def read(self, sample_id: int, *, planned: bool = True) -> np.ndarray:
        """The encoded image of a sample, uint8 (bytes,). `planned` is for shards that are fetched (FetchedShards).

        Raises OSError, naming the shard, when no try gave the whole image.
        """
        shard = self.index.shard_of(sample_id)
        row = self.index.samples[sample_id]
        size, offset = int(row["size"]), int(row["offset"])
        for tried in itertools.count(1):
            try:
                data = self._bytes(shard, size, offset, planned)
                break
            except OSError as error:
                # Once all tries have failed in a shard its other images get one: a shard that is gone would cost hours of pauses.
                if shard in self._failed or tried == READ_TRIES:
                    self._failed.add(shard)
                    name, tries = self.index.shards[shard].name, "1 try" if tried == 1 else f"{tried} tries"
                    raise OSError(f"can't be read from {name} of {self.index.place} ({error.strerror}; {tries})") from error
                if self._stop.wait(FIRST_PAUSE * 2 ** (tried - 1)):
                    raise Stopped from error
        self._failed.discard(shard)
        return np.frombuffer(data, np.uint8)

    def _bytes(self, shard: int, size: int, offset: int, planned: bool) -> bytes:
        file = self._shard(shard)
        try:
            return file.read(size, offset)
        except OSError:
            with self._lock:
                self._open.pop(shard, None)  # where a file was replaced another descriptor may work
            raise

    def _shard(self, shard: int) -> _OpenShard:
        with self._lock:
            file = self._open.pop(shard, None)
            if file is None:
                file = _OpenShard(os.open(self.index.folder / self.index.shards[shard].name, os.O_RDONLY))
            self._open[shard] = file
            while len(self._open) > self.max_open:
                self._open.popitem(last=False)
            return file

    def advance(self, step: int) -> None:
        """All that steps before this one take has been read."""

    def close(self) -> None:
        """Closes all files; ends the reads that wait."""
        self._stop.set()
        with self._lock:
            self.max_open = 0  # also for a read that is going on
            self._open.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


@dataclass
class _Held:
    """A shard that is wanted: how many uses want it, and what came of fetching it, when that has ended."""

    uses: int
    result: _PinnedShard | Exception | None = None


class FetchedShards(ShardStore):
    """The shards of a dataset at a URL. `uses` are those that will be read, in the order of first need, and `at_once` the most
    bytes of them that are in use in the same step.

    A shard is held from the moment in which a use of it is booked until the last step of its booked uses has been read. What
    is held stays within what this process has reserved of the cache, half of the bound shared by the ranks of the node: the
    shards in use and, with what that leaves, those that come next. The other half keeps shards that are done, for the next
    epoch, and has room for another job. As uses are booked in the order of need, and all that one step takes fits, a step
    never waits for a later one.

    Raises ValueError when `cache_gb`, or its disk, is too small.
    """

    def __init__(self, index: Index, uses: Iterable[ShardUse], *, at_once: int, cache_gb: float, ranks_on_node: int = 1) -> None:
        super().__init__(index)
        needed, bound = at_once * ranks_on_node, round(cache_gb * 1e9)
        if needed > bound:
            raise ValueError(
                f"{index.place}: data.cache_gb={cache_gb:g} is too small: the shards that the ranks of a node ({ranks_on_node}) need at "
                f"the same time take {_round_up(needed / 1e9)} GB. Set it to that or more, better twice that: what is left is fetched ahead"
            )
        self._cache = Cache(index.folder, bound)
        self._cache.check_disk(sum(shard.bytes for shard in index.shards))
        self._exit = ExitStack()
        self._reserved = self._exit.enter_context(self._cache.reserve(at_once, max(at_once, bound // (2 * ranks_on_node))))
        self._uses = iter(uses)
        self._next_lock = threading.Lock()  # for `_uses`
        self._changed = threading.Condition()  # guards what follows
        self._held: dict[int, _Held] = {}
        self._booked: list[ShardUse] = []
        self._held_bytes = 0
        self._threads = [threading.Thread(target=self._run, name=f"fetch-{number}", daemon=True) for number in range(FETCH_THREADS)]
        for thread in self._threads:
            thread.start()

    def _run(self) -> None:
        while self._fetch_next():
            pass

    def _fetch_next(self) -> bool:
        """Fetches a shard; False when there is none left to fetch.

        Refers to no shard itself: a library that keeps the exception of a failed try in a cycle keeps this frame too, until a
        collection, and what a frame refers to stays pinned.
        """
        shard = self._book()
        if shard is None:
            return False
        try:
            self._give(shard, _PinnedShard(fetch_shard(self._cache, self.index, shard, self._stop)))
        except Stopped:
            return False
        except Exception as error:  # is raised when the shard is read
            self._give(shard, error)
        return True

    def _give(self, shard: int, result: _PinnedShard | Exception) -> None:
        with self._changed:
            if shard in self._held:
                self._held[shard].result = result
            self._changed.notify_all()

    def _book(self) -> int | None:
        """Books uses, each as soon as there is room for it, until one is of a shard that is not held: that is to be fetched.
        None when there are no more."""
        with self._next_lock:
            for use in self._uses:
                with self._changed:
                    size = self.index.shards[use.shard].bytes
                    while use.shard not in self._held and self._held_bytes + size > self._reserved and not self._stop.is_set():
                        self._changed.wait()
                    if self._stop.is_set():
                        return None
                    self._booked.append(use)
                    if use.shard in self._held:
                        self._held[use.shard].uses += 1
                        continue
                    self._held[use.shard] = _Held(uses=1)
                    self._held_bytes += size
                    return use.shard
        return None

    def _bytes(self, shard: int, size: int, offset: int, planned: bool) -> bytes:
        """`planned`: the shard is among the uses, and none of the steps that need it is done. Of any other shard that is not held
        the bytes are read from the URL, past the cache: it has no room for what was not booked."""
        file = self._held_file(shard, planned)
        if file is None:
            assert self.index.remote is not None
            return self.index.remote.read_part(self.index.shards[shard].name, offset, size, self._stop)
        return file.read(size, offset)

    def _held_file(self, shard: int, planned: bool) -> _OpenShard | None:
        def decided() -> bool:
            held = self._held.get(shard)
            return self._stop.is_set() or (held.result is not None if held else not planned)

        with self._changed:
            began = time.monotonic()
            self._changed.wait_for(decided)
            self.waited_s += time.monotonic() - began
            if self._stop.is_set():
                raise Stopped
            result = self._held[shard].result if shard in self._held else None
        if isinstance(result, Exception):
            raise ValueError(str(result)) from result  # which names the shard's URL, or its file in the cache
        return result

    def advance(self, step: int) -> None:
        with self._changed:
            for use in [use for use in self._booked if use.last < step]:
                self._booked.remove(use)
                self._held[use.shard].uses -= 1
                if not self._held[use.shard].uses:
                    del self._held[use.shard]  # and so the shard is released
                    self._held_bytes -= self.index.shards[use.shard].bytes
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._stop.set()
            self._held.clear()
            self._booked.clear()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(_CLOSE_SECONDS)
        self._exit.close()  # gives the reservation back


def fetch_shard(cache: Cache, index: Index, shard: int, stop: threading.Event | None = None) -> int:
    """A descriptor of a shard's copy in the cache, which is there until it is released (cache.release)."""
    remote, wanted = index.remote, index.shards[shard]
    assert remote is not None

    def check(part: Path) -> None:
        if part.stat().st_size != wanted.bytes:
            raise ValueError(f"{part.stat().st_size} bytes instead of {wanted.bytes}")
        if hash_file(part) != wanted.xxh3_128:
            raise ValueError("other bytes than were packed, by their checksum; if this stays so, copy the shard again")

    def write(part: Path) -> None:
        remote.download(wanted.name, part, check=check, limit=wanted.bytes, stop=stop)

    return cache.pin(wanted.name, wanted.bytes, write, stop)


@contextmanager
def open_whole_shard(index: Index, shard: int) -> Iterator[Path]:
    """The path of a shard, with its .idx beside it; of a dataset at a URL, of its copy in the cache, fetched and checked."""
    path = index.folder / index.shards[shard].name
    if index.remote is None:
        yield path
        return
    fetch_idx(index, shard)
    size = index.shards[shard].bytes
    cache = Cache(index.folder, DataConfig.cache_gb * 1e9)
    with cache.reserve(size, size):
        descriptor = fetch_shard(cache, index, shard)
        try:
            yield path
        finally:
            release(descriptor)


def _round_up(gb: float) -> str:
    """To three digits."""
    unit = 10.0 ** (math.floor(math.log10(gb)) - 2)
    return f"{math.ceil(gb / unit) * unit:.3g}"
