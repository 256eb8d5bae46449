"""Damages images in a copy of a dataset, in place: shards keep their sizes, and the index does not change."""

import shutil
from collections.abc import Callable
from pathlib import Path

from data.dataset.index import Index, open_index
from tests.support.image_corpus import set_header_size


def _cut(encoded: bytes) -> bytes:
    """Replaces the second half by zeros."""
    half = len(encoded) // 2
    return encoded[:half] + bytes(len(encoded) - half)


def _without_tables(jpeg: bytes) -> bytes:
    """Marks the quantization tables as application segments: the header can be read, but nothing decodes."""
    assert b"\xff\xdb" in jpeg
    return jpeg.replace(b"\xff\xdb", b"\xff\xe9")


# The header check detects the first three, only DALI's decoding the last.
KINDS: dict[str, Callable[[bytes], bytes]] = {
    "cut": _cut,
    "zeros": lambda encoded: bytes(len(encoded)),
    "another size": lambda encoded: set_header_size(encoded, 64, 64),
    "no tables": _without_tables,
}


def damaged_copy(index: Index, folder: Path, damage: dict[int, str]) -> Index:
    """Copies a dataset and damages samples, each in its kind."""
    copy = open_index(shutil.copytree(index.folder, folder))
    for sample, kind in damage.items():
        row = copy.samples[sample]
        with open(copy.folder / copy.shards[copy.shard_of(sample)].name, "r+b") as file:
            file.seek(int(row["offset"]))
            encoded = file.read(int(row["size"]))
            hurt = KINDS[kind](encoded)
            assert len(hurt) == len(encoded)
            assert hurt != encoded
            file.seek(int(row["offset"]))
            file.write(hurt)
    return copy
