"""Files that appear whole or not at all, and their checksums."""

import os
from pathlib import Path
from typing import IO, Any

import xxhash

_BLOCK_BYTES = 1 << 22


def publish(file: IO[Any], path: Path) -> None:
    """Makes an open temporary file durable and gives it its final name, so that a reader sees the whole of it or nothing."""
    file.flush()
    os.fsync(file.fileno())
    os.replace(file.name, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Makes a file's bytes, or the names in a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def checksum(path: Path) -> str:
    """The 128-bit xxhash of a file's bytes, in hex."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
