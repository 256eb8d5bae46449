"""The local copy of a remote dataset: whole files in one folder, bounded, shared by all processes of a node.

    cache = Cache(folder, bound=100e9)
    with cache.reserve(at_least=6e9, wanted=50e9) as reserved:      # what this process may keep at once, in bytes
        descriptor = cache.pin(name, size, write)                   # write(path) is called if the file is not there
        …                                                           # not evicted
        release(descriptor)

    FOLDER/train-000000.tar          a whole, checked shard; locked shared by whoever uses it or will soon
    FOLDER/train-000001.tar.part     being fetched, of its final size; locked exclusively by the process that fetches it
    FOLDER/reserved-…                one for each process, locked by it, of the size that it may keep
    FOLDER/lock                      locked for the moment in which something of the above changes

All locks are flock's, which end with their process: one that was killed leaves nothing that is locked, and what it left half
fetched is overwritten or evicted. Only shards count for the bound and are evicted; the index and .idx files stay.
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

POLL = 0.05  # seconds between looks at what another process is doing
_SHARDS = (".tar", ".tar.part")


def choose_cache_root(configured: str | None) -> Path:
    """Where caches lie: the configured folder, else one in the node's own scratch space if the environment names that.

    Raises ValueError where it does not: /tmp is often memory, and no place to put a dataset unasked.
    """
    scratch = os.environ.get("SLURM_TMPDIR") or os.environ.get("TMPDIR")
    if configured is None and scratch is None:
        raise ValueError(
            "a dataset at a URL needs a folder for local copies, best on a disk of the node itself: set data.cache=FOLDER "
            "(--cache FOLDER for python -m data); SLURM_TMPDIR or TMPDIR would be taken, but neither is set"
        )
    return Path(configured) if configured is not None else Path(scratch or "") / f"van-pretrain-{os.getuid()}"


class Cache:
    """The copy of one dataset. `bound`, in bytes, is for its shards. Raises ValueError when the folder can't be made."""

    def __init__(self, folder: Path, bound: float = math.inf) -> None:
        self.folder, self.bound = folder, bound
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"{folder}: can't be made ({error}); set data.cache to a folder that you may write to") from error

    def keep(self, name: str, write: Callable[[Path], None]) -> Path:
        """The path of a file that is never evicted, written first if it is not there."""
        os.close(self.pin(name, 0, write))
        return self.folder / name

    def pin(self, name: str, size: int, write: Callable[[Path], None], stop: threading.Event | None = None) -> int:
        """Opens a file and keeps it from eviction until its descriptor is given to `release`.

        If it is not there, room is made for its `size` bytes and `write` is called with the path of a temporary file, which
        gets the final name when that returns. Of several processes one does so, and the others wait for it.

        Raises ValueError when the disk is full of files in use, Stopped when `stop` is set while this waits, and what `write`
        raises.
        """
        stop = stop or threading.Event()
        part = self.folder / f"{name}.part"
        while True:
            with self._alone():
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
            with self._alone():
                part.unlink()
                os.close(descriptor)
            raise
        with self._alone():
            part.rename(self.folder / name)
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        return descriptor

    def _open(self, name: str) -> int | None:
        try:
            descriptor = os.open(self.folder / name, os.O_RDONLY)
        except FileNotFoundError:
            return None
        fcntl.flock(descriptor, fcntl.LOCK_SH)  # never waits: whole files are locked exclusively under `_alone` only
        return descriptor

    def _claim(self, part: Path, size: int) -> int | None:
        """An exclusively locked temporary file of `size` bytes; None when another process has it, or there is no room now."""
        descriptor = os.open(part, os.O_RDWR | os.O_CREAT, 0o644)
        if not _try_lock(descriptor):
            os.close(descriptor)
            return None
        try:
            if self._allocate(part, descriptor, size):
                return descriptor
            part.unlink()
            os.close(descriptor)
            return None
        except BaseException:
            part.unlink()
            os.close(descriptor)
            raise

    def _allocate(self, part: Path, descriptor: int, size: int) -> bool:
        """Gives a file its final size on the disk, evicting what it must; False where the bound leaves no room now."""
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

    def _shrink(self, most: float) -> int:
        """Evicts shards that nobody uses, the longest unused first, until there are no more than `most` bytes. Gives what is left."""
        found = [(path.suffix != ".part", path.stat().st_mtime_ns, path) for path in self.folder.iterdir() if path.name.endswith(_SHARDS)]
        used = sum(path.stat().st_size for *_, path in found)
        for *_, path in sorted(found):
            if used <= most:
                break
            size = path.stat().st_size
            if _evict(path):
                used -= size
        return used

    @contextmanager
    def reserve(self, at_least: int, wanted: int) -> Iterator[int]:
        """Gives how many bytes this process may keep pinned at once: `wanted`, or `at_least` where others have left no more.

        What there is above the bound is evicted first. All that processes have reserved is never more than the bound: so one that
        waits for room waits for what is being released or can be evicted, never for another that waits as well.

        Raises ValueError when not even `at_least` is left.
        """
        with self._alone():
            self._shrink(self.bound)
            others = 0
            for path in self.folder.glob("reserved-*"):
                if not _evict(path):
                    others += path.stat().st_size
            left = int(self.bound) - others
            if at_least > left:
                raise ValueError(
                    f"{self.folder}: data.cache_gb={self.bound / 1e9:g} is too small for all that use it: other processes on this "
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
            with self._alone():
                os.unlink(name)
            os.close(descriptor)

    def check_disk(self, wanted: int) -> None:
        """Raises ValueError where the disk has no room for the bound, or for `wanted` bytes of shards if those are fewer."""
        with self._alone():
            held = sum(path.stat().st_size for path in self.folder.iterdir() if path.name.endswith(_SHARDS))
            room = shutil.disk_usage(self.folder).free + held
        if min(self.bound, wanted) > room:
            raise ValueError(
                f"{self.folder}: its disk has room for {room / 1e9:.2f} GB of shards, less than data.cache_gb={self.bound / 1e9:g}; "
                "lower that, free space, or set data.cache to another folder"
            )

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One thread of one process of the node at a time."""
        descriptor = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def release(descriptor: int) -> None:
    """Lets a pinned file be evicted, after all that were released before it."""
    now = time.time_ns()
    os.utime(descriptor, ns=(now, now))  # the kernel's own clock for this moves in steps of milliseconds
    os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False


def _evict(path: Path) -> bool:
    """Removes a file that nobody has locked."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if not _try_lock(descriptor):
            return False
        path.unlink()
        return True
    finally:
        os.close(descriptor)
