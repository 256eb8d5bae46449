"""Disks that fail, die, are slow or watched: the system calls of a checkpoint's writing thread, call by call."""

import errno
import itertools
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CALLS = ("open", "write", "fsync", "mkdir", "rename", "replace", "unlink", "rmdir", "utime")
Act = Callable[[int, str, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


class Killed(BaseException):
    """Ends the writing thread as if its process had been killed: no call after it gets to the disk either."""


@contextmanager
def small_file_system(place: Path, size: str) -> Iterator[Path]:
    """Mounts an empty file system of a size in the words of `mount`; skips the test where that is not allowed."""
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"a small file system needs root: {mounted.stderr.decode().strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


@contextmanager
def disk(act: Act) -> Iterator[None]:
    """Sends the writing thread's calls through `act(number, name, original, args, kwargs)`, counted from 0."""
    originals = {name: getattr(os, name) for name in CALLS}
    numbers = itertools.count()

    def wrap(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if threading.current_thread().name != "checkpoint-writer":
                return originals[name](*args, **kwargs)
            return act(next(numbers), name, originals[name], args, kwargs)

        return call

    for name in CALLS:
        setattr(os, name, wrap(name))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(os, name, original)


class FailsOnce:
    """Lets one call fail; a write fails after half of its bytes."""

    def __init__(self, at: int, code: int = errno.ENOSPC):
        self.at, self.code, self.hit = at, code, False

    def __call__(self, number: int, name: str, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if number == self.at:
            self.hit = True
            if name == "write":
                original(args[0], args[1][: len(args[1]) // 2])
            raise OSError(self.code, os.strerror(self.code), str(args[0]))
        return original(*args, **kwargs)


class Dies:
    """Lets no call reach the disk from one call on; of a write half of the bytes do."""

    def __init__(self, at: int):
        self.at, self.hit = at, False

    def __call__(self, number: int, name: str, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if number < self.at:
            return original(*args, **kwargs)
        if number == self.at:
            self.hit = True
            if name == "write":
                original(args[0], args[1][: len(args[1]) // 2])
        raise Killed


class Slow:
    """Delays each call."""

    def __init__(self, seconds: float):
        self.seconds = seconds

    def __call__(self, number: int, name: str, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        time.sleep(self.seconds)
        return original(*args, **kwargs)


class Watched:
    """Follows what a loss of power would leave: bytes survive once their file is synced, a name once its directory is.

    `unsafe` lists everything that was built on something that would not have survived.
    """

    def __init__(self) -> None:
        self.bytes: set[Path] = set()  # files with bytes that are not durable
        self.names: set[Path] = set()  # names that are not durable
        self.unsafe: list[str] = []

    def __call__(self, number: int, name: str, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name == "write":
            self.bytes.add(_path_of(args[0]))
        elif name == "fsync":
            synced = _path_of(args[0])
            self.bytes.discard(synced)
            self.names -= {path for path in self.names if path.parent == synced}
        elif name == "open" and args[1] & os.O_CREAT:
            path = Path(args[0])
            if path.name == "MANIFEST.json":
                self._demand("a manifest is begun", {file for file in self.bytes if file.parent == path.parent})
            self.names.add(path)
        elif name in ("rename", "replace"):
            source, target = Path(args[0]), Path(args[1])
            visible = {path for path in self.names if not path.name.startswith(".") and path.parent == target.parent}
            if target.name.startswith(".removed-"):
                self._demand(f"{source.name} goes", visible)
            else:
                inside = {path for path in self.bytes | self.names if source in path.parents} | (self.bytes & {source})
                self._demand(f"{target.name} gets its name", inside | visible)
            self.names = (self.names - {source}) | {target}
        return original(*args, **kwargs)

    def _demand(self, event: str, weak: set[Path]) -> None:
        if weak:
            self.unsafe.append(f"{event} while {sorted(path.name for path in weak)} are not durable")


def _path_of(descriptor: int) -> Path:
    return Path(os.readlink(f"/proc/self/fd/{descriptor}"))
