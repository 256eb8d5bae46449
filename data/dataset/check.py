"""Checks the shards of a dataset in a folder before a job starts.

    faults = find_damaged_shards(index, range(rank, len(index.shards), ranks), checksums=False)

open_index checks that all shards exist and have the right size. Shards at URLs are checked against their checksums when they are fetched
(store.py).
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
    """Finds shards, by number, that have changed since they were packed; returns a message for each.

    With `checksums` every byte is read. Otherwise two small reads check the tar headers of the first and last image. A dataset at a URL
    is not checked.
    """
    if index.remote:
        return []
    with ThreadPoolExecutor(THREADS) as pool:
        results = pool.map(partial(_check_shard, index, checksums), shards)
        if checksums and not quiet:
            results = report_progress(results, len(shards), f"checksums of {index.place}, this rank's shards")
        return [fault for fault in results if fault]


def _check_shard(index: Index, checksums: bool, number: int) -> str | None:
    shard = index.shards[number]
    path = index.folder / shard.name
    try:
        if checksums:
            checksum = hash_file(path)
            return f"{shard.name} has the checksum {checksum} instead of {shard.xxh3_128}" if checksum != shard.xxh3_128 else None
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
