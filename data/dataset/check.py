"""Whether a dataset's shards are what was packed, as far as a job looks before it starts; for a folder, not for a URL.

    faults = find_damaged_shards(index, range(rank, len(index.shards), ranks), checksums=False)

That all shards are there in their sizes is checked where the index is opened (index.py). Shards of URLs are compared with their
checksums when they are fetched (store.py).
"""

import os
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from data.common.hashing import hash_file
from data.common.progress import report_progress
from data.dataset.index import Index
from data.dataset.shards import StrictTarInfo

THREADS = 4
_HEADER = tarfile.BLOCKSIZE


def find_damaged_shards(index: Index, shards: Sequence[int], *, checksums: bool, quiet: bool = False) -> list[str]:
    """What is wrong with these shards, a text each: whether a tar header of the right size lies in front of their first and last
    image, which two small reads tell; with `checksums` every byte is read. Not `quiet`, it says how far that is."""
    if index.remote:
        return []
    with ThreadPoolExecutor(THREADS) as pool:
        results = pool.map(partial(_fault, index, checksums), shards)
        if checksums and not quiet:
            results = report_progress(results, len(shards), f"checksums of {index.place}, this rank's share of the shards")
        return [fault for fault in results if fault]


def _fault(index: Index, checksums: bool, number: int) -> str | None:
    shard = index.shards[number]
    path = index.folder / shard.name
    try:
        if checksums:
            found = hash_file(path)
            return f"{shard.name} has the checksum {found} instead of {shard.xxh3_128}" if found != shard.xxh3_128 else None
        samples = index.samples[index.shard_start[number] : index.shard_start[number + 1]]
        with open(path, "rb") as file:
            for row in samples[[0, -1]] if len(samples) else samples:
                header = os.pread(file.fileno(), _HEADER, int(row["offset"]) - _HEADER)
                if StrictTarInfo.frombuf(header, "utf-8", "surrogateescape").size != row["size"]:
                    raise tarfile.ReadError("a file of another size")
    except tarfile.TarError as error:
        return f"{shard.name} has no image where the index says ({error})"
    except OSError as error:
        return f"{shard.name} can't be read ({error.strerror})"
    return None
