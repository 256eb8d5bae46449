"""A local cache of a remote dataset: a folder of bounded size, shared by all processes of a node.

    cache = Cache(folder, bound=100e9)
    with cache.reserve(at_least=6e9, wanted=50e9) as reserved:      # bytes that this process may pin at the same time
        descriptor = cache.pin(name, size, write)                   # calls write(path) if the file is not in the cache
        …                                                           # the file is not evicted
        release(descriptor)

    FOLDER/train-000000.tar          a complete, checked shard; processes that need it hold a shared lock
    FOLDER/train-000001.tar.part     a download, of the shard's final size; the downloading process holds an exclusive lock
    FOLDER/reserved-…                one per process, which holds a lock on it; the size of the file is the reservation
    FOLDER/lock                      locked while any of the above changes

All locks are flock's, which end with their process. So a killed process leaves no locks, and its partial downloads are overwritten or
evicted. Only shards count toward the bound and are evicted; the index and .idx files stay.
"""

import errno
import fcntl
import math
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from data.storage.remote import Stopped

POLL = 0.05  # seconds between checks on another process
_SHARDS = (".tar", ".tar.part")


def choose_cache_root(configured: str | None) -> Path:
    """Returns the configured folder for caches, or one in the node's scratch space if the environment names that.

    Raises ValueError without either. There is no default such as /tmp, which is often held in memory.
    """
    if configured is not None:
        return Path(configured)
    scratch = os.environ.get("SLURM_TMPDIR") or os.environ.get("TMPDIR")
    if scratch is None:
        raise ValueError(
            "a dataset at a URL needs a folder for local copies, best on a local disk of the node: set data.cache=FOLDER "
            "(--cache FOLDER for python -m data); without it SLURM_TMPDIR or TMPDIR is used, but neither is set"
        )
    return Path(scratch) / f"van-pretrain-{os.getuid()}"


class Cache:
    """The cache of one dataset, with at most `bound` bytes of shards. Raises ValueError when the folder can't be created."""

    def __init__(self, folder: Path, bound: float = math.inf) -> None:
        self.folder, self.bound = folder, bound
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"{folder}: can't be created ({error}); set data.cache to a folder that you may write to") from error

    def keep(self, name: str, write: Callable[[Path], None]) -> Path:
        """Returns the path of a file that is never evicted; if it does not exist, `write` makes it at a temporary path."""
        os.close(self.pin(name, 0, write))
        return self.folder / name

    def pin(self, name: str, size: int, write: Callable[[Path], None], stop: threading.Event | None = None) -> int:
        """Opens a file for reading and protects it from eviction until its descriptor is passed to `release`.

        If the file does not exist, one process writes it while the others wait.

        Args:
            size: its size in bytes, for which room is made; 0 for files other than shards.
            write: called with the path of a temporary file, which is renamed when `write` returns. Errors of `write` are raised.
            stop: ends the wait for another process or for room.

        Raises:
            ValueError: the disk is full of files in use.
            Stopped: `stop` was set.
        """
        stop = stop or threading.Event()
        part = self.folder / f"{name}.part"
        while True:
            with self._locked():
                descriptor = self._open(name)
                if descriptor is not None:
                    return descriptor
                descriptor = self._claim(part, size)
            if descriptor is not None:
                break
            if stop.wait(POLL):
                raise Stopped
        try:
            write(part)
            os.fsync(descriptor)
        except BaseException:
            with self._locked():
                part.unlink()
                os.close(descriptor)
            raise
        with self._locked():
            part.rename(self.folder / name)
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        return descriptor

    def _open(self, name: str) -> int | None:
        try:
            descriptor = os.open(self.folder / name, os.O_RDONLY)
        except FileNotFoundError:
            return None
        fcntl.flock(descriptor, fcntl.LOCK_SH)  # never waits: complete files are locked exclusively only under `_locked`
        return descriptor

    def _claim(self, part: Path, size: int) -> int | None:
        """Opens and locks a temporary file of `size` bytes; returns None if another process holds it or there is no room yet."""
        descriptor = os.open(part, os.O_RDWR | os.O_CREAT, 0o644)
        if not _try_lock(descriptor):
            os.close(descriptor)
            return None
        is_allocated = False
        try:
            is_allocated = self._allocate(part, descriptor, size)
        finally:
            if not is_allocated:
                part.unlink()
                os.close(descriptor)
        return descriptor if is_allocated else None

    def _allocate(self, part: Path, descriptor: int, size: int) -> bool:
        """Allocates a file's final size, evicting shards if needed; returns False if the bound leaves no room yet."""
        os.ftruncate(descriptor, 0)
        if not size:
            return True
        used = self._shrink(self.bound - size)
        while used <= self.bound - size:
            try:
                os.posix_fallocate(descriptor, 0, size)
                return True
            except OSError as error:
                os.ftruncate(descriptor, 0)
                before, used = used, self._shrink(used - 1)
                if error.errno not in (errno.ENOSPC, errno.EDQUOT) or used == before:
                    raise ValueError(
                        f"{part}: no room for {size / 1e9:.2f} GB beside {used / 1e9:.2f} GB of shards in use ({error.strerror}); "
                        f"lower data.cache_gb ({self.bound / 1e9:g}), free space, or set data.cache to another folder"
                    ) from error
        return False

    def _shrink(self, limit: float) -> int:
        """Evicts unused shards, least recently used first, down to `limit` bytes; returns the bytes that are left."""
        entries = [(path.suffix != ".part", path.stat().st_mtime_ns, path) for path in self.folder.iterdir() if path.name.endswith(_SHARDS)]
        used = sum(path.stat().st_size for *_, path in entries)
        for *_, path in sorted(entries):
            if used <= limit:
                break
            size = path.stat().st_size
            if _evict(path):
                used -= size
        return used

    @contextmanager
    def reserve(self, at_least: int, wanted: int) -> Iterator[int]:
        """Reserves bytes that this process may pin at the same time, and yields their number.

        The number is `wanted`, or `at_least` if other processes have left less room. All reservations together never exceed the bound.
        So a process that waits for room waits only for files that are being released or can be evicted, and processes can't deadlock.
        Raises ValueError if there is no room for `at_least`.
        """
        with self._locked():
            self._shrink(self.bound)
            others = 0
            for path in self.folder.glob("reserved-*"):
                if not _evict(path):
                    others += path.stat().st_size
            left = int(self.bound) - others
            if at_least > left:
                raise ValueError(
                    f"{self.folder}: data.cache_gb={self.bound / 1e9:g} is too small for all processes that use it: others on this "
                    f"node have reserved {others / 1e9:.2f} GB, this one needs {at_least / 1e9:.2f} GB. Raise data.cache_gb or "
                    "set another data.cache"
                )
            reserved = wanted if wanted <= left else at_least
            descriptor, name = tempfile.mkstemp(prefix="reserved-", dir=self.folder)
            _try_lock(descriptor)
            os.ftruncate(descriptor, reserved)
        try:
            yield reserved
        finally:
            with self._locked():
                os.unlink(name)
            os.close(descriptor)

    def check_disk(self, wanted: int) -> None:
        """Raises ValueError if the disk is too small for the bound, or for `wanted` bytes if those are fewer."""
        with self._locked():
            cached = sum(path.stat().st_size for path in self.folder.iterdir() if path.name.endswith(_SHARDS))
            room = shutil.disk_usage(self.folder).free + cached
        if min(self.bound, wanted) > room:
            raise ValueError(
                f"{self.folder}: its disk has room for {room / 1e9:.2f} GB of shards, less than data.cache_gb={self.bound / 1e9:g}; "
                "lower that, free space, or set data.cache to another folder"
            )

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Holds the cache's lock, which excludes all other threads and processes of the node."""
        descriptor = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def release(descriptor: int) -> None:
    """Releases a pinned file: it may then be evicted, after all files that were released earlier."""
    now = time.time_ns()
    os.utime(descriptor, ns=(now, now))  # the kernel's clock for file times has steps of milliseconds
    os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False


def _evict(path: Path) -> bool:
    """Removes a file unless a process has locked it; returns whether it did."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if not _try_lock(descriptor):
            return False
        path.unlink()
        return True
    finally:
        os.close(descriptor)
