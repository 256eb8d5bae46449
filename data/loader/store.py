"""Reads encoded images from a dataset's shards, from any number of threads.

    with ShardStore(index) as store:                                     # for a folder
        encoded = store.read(sample_id)

    with FetchedShards(index, uses, peak_bytes=…, cache_gb=100) as store:    # for a URL, through a cache of whole shards (cache.py)
        encoded = store.read(sample_id)                                  # waits until the shard is fetched
        store.advance(step)                                              # releases the shards of earlier steps

A failed read is retried with exponential backoff. If all tries fail, OSError is raised: one image is bad. If a shard can't be fetched from
a URL, ValueError is raised: an outage.

Threads of FetchedShards fetch the shards of `uses` (order.py) in that order, as far ahead as this process's part of the cache allows.
"""

import errno
import itertools
import math
import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.common.hashing import hash_file
from data.dataset.index import Index, fetch_idx
from data.loader.order import ShardUse
from data.settings import DataConfig
from data.storage.cache import Cache, release
from data.storage.remote import Stopped

READ_TRIES = 6
FIRST_PAUSE = 0.25  # seconds; each of the five pauses is twice the one before, eight seconds in total
FETCH_THREADS = 4  # parallel downloads of a process
_CLOSE_SECONDS = 1.0  # to wait for a download to stop; a stalled one ends later


class _OpenShard:
    """A file descriptor that is closed when the last thread drops it.

    If it were closed on eviction, another file could get the same number while a thread is about to read.
    """

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
    """An open shard that is released from the cache when the last thread drops it."""

    def __del__(self) -> None:
        release(self.descriptor)


class ShardStore(AbstractContextManager):
    """Reads local shards by position (os.pread). The `max_open` most recently used files stay open."""

    def __init__(self, index: Index, max_open: int = 256) -> None:
        self.index = index
        self.max_open = max_open
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()
        self._lock = threading.Lock()
        self._failed: set[int] = set()  # shards whose last read failed
        self._stop = threading.Event()

    def read(self, sample_id: int, *, planned: bool = True) -> np.ndarray:
        """Reads the encoded image of a sample: uint8 (bytes,).

        Args:
            planned: whether the sample's shard is among the uses of FetchedShards, and no step that needs the shard is done.

        Raises:
            OSError: every try failed; the message names the shard.
            ValueError: the shard can't be fetched.
            Stopped: the store was closed.
        """
        shard = self.index.shard_of(sample_id)
        row = self.index.samples[sample_id]
        size, offset = int(row["size"]), int(row["offset"])
        for tried in itertools.count(1):
            try:
                data = self._read_bytes(shard, size, offset, planned)
                break
            except OSError as error:
                # After a read failed for good, other images of the shard get one try: a lost shard would cost hours of pauses.
                if shard in self._failed or tried == READ_TRIES:
                    self._failed.add(shard)
                    name, tries = self.index.shards[shard].name, "1 try" if tried == 1 else f"{tried} tries"
                    raise OSError(f"can't be read from {name} of {self.index.place} ({error.strerror}; {tries})") from error
                if self._stop.wait(FIRST_PAUSE * 2 ** (tried - 1)):
                    raise Stopped from error
        self._failed.discard(shard)
        return np.frombuffer(data, np.uint8)

    def _read_bytes(self, shard: int, size: int, offset: int, planned: bool) -> bytes:
        file = self._shard(shard)
        try:
            return file.read(size, offset)
        except OSError:
            with self._lock:
                self._open.pop(shard, None)  # if the file was replaced, a new descriptor may work
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
        """Releases the shards that only steps before this one need; the images of those steps must have been read."""

    def close(self) -> None:
        """Closes all files and ends waiting reads."""
        self._stop.set()
        with self._lock:
            self.max_open = 0  # also for reads in progress
            self._open.clear()

    def __exit__(self, *error: object) -> None:
        self.close()


@dataclass
class _BookedShard:
    """The number of booked uses of a shard, and the result of fetching the shard, None until then."""

    uses: int
    result: _PinnedShard | Exception | None = None


class FetchedShards(ShardStore):
    """Reads the shards of a dataset at a URL through the local cache of at most `cache_gb` (10^9 bytes).

    Booking a use takes room for its shard. A shard stays pinned until the last step of its booked uses is read. Pinned shards fit into
    this process's reservation: half of the bound, divided by the ranks of the node. The other half keeps shards for the next epoch, and
    has room for another job. `uses` are booked in their order, that of first need. All shards of one step, at most `peak_bytes`, fit, so
    no step waits for a later one. Raises ValueError if `cache_gb` or the disk is too small.
    """

    def __init__(self, index: Index, uses: Iterable[ShardUse], *, peak_bytes: int, cache_gb: float, ranks_on_node: int = 1) -> None:
        super().__init__(index)
        needed, bound = peak_bytes * ranks_on_node, round(cache_gb * 1e9)
        if needed > bound:
            raise ValueError(
                f"{index.place}: data.cache_gb={cache_gb:g} is too small: the shards that the ranks of a node ({ranks_on_node}) need at "
                f"the same time take {_round_up(needed / 1e9)} GB. Set it to at least that; with twice that, shards are fetched ahead"
            )
        self._cache = Cache(index.folder, bound)
        self._cache.check_disk(sum(shard.bytes for shard in index.shards))
        self._exit = ExitStack()
        self._reserved = self._exit.enter_context(self._cache.reserve(peak_bytes, max(peak_bytes, bound // (2 * ranks_on_node))))
        self._uses = iter(uses)
        self._next_lock = threading.Lock()  # guards `_uses`
        self._changed = threading.Condition()  # guards the attributes below
        self._booked_shards: dict[int, _BookedShard] = {}
        self._booked_uses: list[ShardUse] = []
        self._booked_bytes = 0
        self._threads = [threading.Thread(target=self._run, name=f"fetch-{number}", daemon=True) for number in range(FETCH_THREADS)]
        for thread in self._threads:
            thread.start()

    def _run(self) -> None:
        while self._fetch_next():
            pass

    def _fetch_next(self) -> bool:
        """Fetches the next shard; returns False when there is none.

        This frame must hold no reference to a shard. A library that keeps an exception in a reference cycle keeps the exception's
        frames until a garbage collection, and any shard in them would stay pinned.
        """
        shard = self._book()
        if shard is None:
            return False
        try:
            self._set_result(shard, _PinnedShard(fetch_shard(self._cache, self.index, shard, self._stop)))
        except Stopped:
            return False
        except Exception as error:  # raised when the shard is read
            self._set_result(shard, error)
        return True

    def _set_result(self, shard: int, result: _PinnedShard | Exception) -> None:
        with self._changed:
            if shard in self._booked_shards:
                self._booked_shards[shard].result = result
            self._changed.notify_all()

    def _book(self) -> int | None:
        """Books uses, as soon as there is room, until a shard must be fetched; returns the shard's number, None at the end."""
        with self._next_lock:
            for use in self._uses:
                with self._changed:
                    size = self.index.shards[use.shard].bytes
                    while use.shard not in self._booked_shards and self._booked_bytes + size > self._reserved and not self._stop.is_set():
                        self._changed.wait()
                    if self._stop.is_set():
                        return None
                    self._booked_uses.append(use)
                    if use.shard in self._booked_shards:
                        self._booked_shards[use.shard].uses += 1
                        continue
                    self._booked_shards[use.shard] = _BookedShard(uses=1)
                    self._booked_bytes += size
                    return use.shard
        return None

    def _read_bytes(self, shard: int, size: int, offset: int, planned: bool) -> bytes:
        file = self._wait_for(shard, planned)
        if file is None:  # the cache has no room for shards that were not booked
            assert self.index.remote is not None
            return self.index.remote.read_part(self.index.shards[shard].name, offset, size, self._stop)
        return file.read(size, offset)

    def _wait_for(self, shard: int, planned: bool) -> _OpenShard | None:
        """Waits until a shard is fetched, or, if planned, until it is booked and fetched; returns None if it is not booked."""

        def is_decided() -> bool:
            booked = self._booked_shards.get(shard)
            return self._stop.is_set() or (booked.result is not None if booked else not planned)

        with self._changed:
            self._changed.wait_for(is_decided)
            if self._stop.is_set():
                raise Stopped
            result = self._booked_shards[shard].result if shard in self._booked_shards else None
        if isinstance(result, Exception):
            raise ValueError(str(result)) from result  # the message names the shard's URL, or its file in the cache
        return result

    def advance(self, step: int) -> None:
        with self._changed:
            for use in [use for use in self._booked_uses if use.last < step]:
                self._booked_uses.remove(use)
                self._booked_shards[use.shard].uses -= 1
                if not self._booked_shards[use.shard].uses:
                    del self._booked_shards[use.shard]  # releases the shard
                    self._booked_bytes -= self.index.shards[use.shard].bytes
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._stop.set()
            self._booked_shards.clear()
            self._booked_uses.clear()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(_CLOSE_SECONDS)
        self._exit.close()  # ends the reservation


def fetch_shard(cache: Cache, index: Index, shard: int, stop: threading.Event | None = None) -> int:
    """Fetches a shard into the cache unless it is there; returns a descriptor to pass to cache.release."""
    remote, expected = index.remote, index.shards[shard]
    assert remote is not None

    def check(part: Path) -> None:
        if part.stat().st_size != expected.bytes:
            raise ValueError(f"{part.stat().st_size} bytes instead of {expected.bytes}")
        if hash_file(part) != expected.xxh3_128:
            raise ValueError("the checksum differs from that of the packed shard; if this happens again, copy the shard again")

    def write(part: Path) -> None:
        remote.download(expected.name, part, check=check, limit=expected.bytes, stop=stop)

    return cache.pin(expected.name, expected.bytes, write, stop)


@contextmanager
def open_whole_shard(index: Index, shard: int) -> Iterator[Path]:
    """Yields the path of a shard, with its .idx beside it; a shard at a URL is fetched into the cache first."""
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
    """Formats a size, rounded up to three significant digits."""
    unit = 10.0 ** (math.floor(math.log10(gb)) - 2)
    return f"{math.ceil(gb / unit) * unit:.3g}"
