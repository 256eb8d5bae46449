"""Computes checksums, 128-bit xxhash in hex, of bytes, JSON values and files.

The checksums detect damage and distinguish contents, but do not protect against forgery.
"""

import json
from pathlib import Path
from typing import Any

import xxhash

_BLOCK_BYTES = 1 << 22

new_hash = xxhash.xxh3_128  # for content that comes in parts: .update(bytes), .hexdigest()


def hash_bytes(content: bytes) -> str:
    return new_hash(content).hexdigest()


def hash_json(value: Any) -> str:
    """Returns the checksum of a JSON value; the order of keys does not matter."""
    return hash_bytes(json.dumps(value, sort_keys=True).encode())


def hash_file(path: Path) -> str:
    digest = new_hash()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
