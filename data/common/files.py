"""Writes files atomically: a file appears whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


@contextmanager
def open_to_replace(path: Path, mode: str = "w", **options: Any) -> Iterator[IO[Any]]:
    """Opens a temporary file that becomes `path`, whole and durable, when the block ends without an error."""
    with open(path.with_name(path.name + ".tmp"), mode, **options) as file:
        yield file
        publish(file, path)


def publish(file: IO[Any], path: Path) -> None:
    """Makes an open temporary file durable, then renames it to `path`, so that no reader sees a partial file."""
    file.flush()
    os.fsync(file.fileno())
    os.replace(file.name, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Makes the bytes of a file, or the names in a folder, durable (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
