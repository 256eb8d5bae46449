"""Verifies that a dataset has not changed since it was packed.

    python -m data verify SHARDS            names, sizes and headers: reads about 4 KB per sample
    python -m data verify SHARDS --deep     every byte: checksums, labels, and every image decoded

Prints one line per fault, and a summary.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from data.common.hashing import hash_file
from data.common.progress import report_progress
from data.dataset.headers import BadImage
from data.dataset.index import Index, compute_fingerprint, open_index
from data.dataset.shards import Describe, Member, find_image, read_label, read_shard
from data.loader.store import open_whole_shard
from data.packing.adopt import Labels, read_description
from data.packing.images import DALI_PIXELS, ImageRules, convert_image
from data.packing.workers import start_workers

_KEEP_ALL = ImageRules(keep_original=True, max_pixels=DALI_PIXELS)


def verify(
    place: str | Path, cache: str | None = None, *, deep: bool = False, processes: int = 1, log: Callable[[str], None] = print
) -> int:
    """Logs one line per fault of the dataset in a folder or at a URL; returns the number of faults.

    A quick check finds missing, extra and resized files; a classes.json, index.npy or .idx that differs from the one written; tar headers
    that differ from index.npy or .idx; and labels without a class. A `deep` check reads every byte and decodes every image, and so also
    finds every change of a shard, and images that can't be decoded. `cache` is the folder for whole copies of a URL's shards.
    """
    try:
        index = open_index(place, cache, sizes=False)
    except ValueError as error:
        log(str(error))
        log(f"{place}: 1 fault; nothing else can be checked")
        return 1
    _open_index.cache_clear()  # the files may have changed since an earlier call in this process
    count = 0
    shards = range(len(index.shards))
    with start_workers(min(processes, len(shards))) as run:
        results = report_progress(run(partial(_check_shard, place, cache, deep), shards), len(shards), f"verifying shards of {place}")
        for faults in (_check_files(index), *results):
            for fault in faults:
                count += 1
                log(fault)
    size = sum(shard.bytes for shard in index.shards) / 1e9
    depth = "every byte read, every image decoded" if deep else "names, sizes and headers; --deep reads every byte"
    remedy = "; copy these files again from the original dataset" if count else ""
    log(
        f"{place}: {count} fault{'' if count == 1 else 's'} in {len(index)} samples, {len(index.shards)} shards, {size:.3f} GB "
        f"({depth}){remedy}"
    )
    return count


def _check_files(index: Index) -> Iterator[str]:
    """Yields the faults of the files beside the shards."""
    if compute_fingerprint(index.samples, index.shards) != index.fingerprint:
        yield "index.npy, or a shard's name or checksum in dataset.json, differs from the packed dataset"
    if hash_file(index.folder / "classes.json") != read_description(index.folder).get("classes_xxh3_128"):
        yield "classes.json differs from the packed dataset"
    highest = index.samples["label"].max(initial=0)
    if highest >= len(index.classes):
        yield f"index.npy has labels up to {highest}, but there are only {len(index.classes)} classes"
    names = {shard.name for shard in index.shards}
    for path in sorted(index.folder.iterdir()):
        if path.suffix == ".tar" and path.name not in names:
            yield f"{path.name} is not in dataset.json"
        elif path.suffix == ".idx" and path.with_suffix(".tar").name not in names:
            yield f"{path.name} belongs to no shard"
        elif path.suffix == ".tmp" or path.name == ".index":
            yield f"{path.name} is left over from an interrupted command; remove it"


@lru_cache(maxsize=1)  # a worker checks many shards of one dataset
def _open_index(place: str | Path, cache: str | None) -> Index:
    return open_index(place, cache, sizes=False)


def _check_shard(place: str | Path, cache: str | None, deep: bool, number: int) -> list[str]:
    """Returns the faults of a shard, its .idx and its rows in index.npy."""
    index = _open_index(place, cache)
    try:
        with open_whole_shard(index, number) as path:
            return _check_shard_file(path, index, number, deep)
    except ValueError as error:  # the shard can't be fetched
        return [str(error)]


def _check_shard_file(path: Path, index: Index, number: int, deep: bool) -> list[str]:
    shard = index.shards[number]
    if not path.is_file():
        return [f"{shard.name} is missing"]
    if path.stat().st_size != shard.bytes:
        return [f"{shard.name} has {path.stat().st_size} bytes instead of {shard.bytes}"]
    try:
        contents = read_shard(path, _make_deep_check(index) if deep else None)
    except ValueError as error:
        return [str(error)]
    faults = [f"{shard.name}: sample {contents.keys[row]}: {fault}" for row, fault in contents.faults.items()]
    if deep and contents.shard.xxh3_128 != shard.xxh3_128:
        faults.append(f"{shard.name}: its bytes have changed (checksum {contents.shard.xxh3_128} instead of {shard.xxh3_128})")
    idx = path.with_suffix(".idx")
    if not idx.is_file():
        faults.append(f"{idx.name} is missing")
    elif idx.read_bytes() != contents.idx.encode():
        faults.append(f"{idx.name} does not describe {shard.name}")
    rows = index.samples[index.shard_start[number] : index.shard_start[number + 1]]
    if len(contents.rows) != len(rows):
        return [*faults, f"{shard.name}: {len(contents.rows)} samples, but {len(rows)} in index.npy"]
    columns = ["offset", "size", "label", "width", "height"] if deep else ["offset", "size"]
    different = [row for row in np.flatnonzero(contents.rows[columns] != rows[columns]) if row not in contents.faults]
    if different:
        first = different[0]
        more = f"; and {len(different) - 1} more samples" if len(different) > 1 else ""
        faults.append(
            f"{shard.name}: sample {contents.keys[first]}: {', '.join(columns)} are {contents.rows[columns][first]} in the tar, "
            f"{rows[columns][first]} in index.npy{more}"
        )
    return faults


def _make_deep_check(index: Index) -> Describe:
    """Returns a Describe that decodes each image as strictly as packing does."""
    labels = Labels(read_description(index.folder).get("made", {}).get("label_field"), index.classes)

    def describe(sample: list[Member]) -> tuple[int, int, int]:
        try:
            image = convert_image(find_image(sample).data, _KEEP_ALL)
        except BadImage as error:
            raise ValueError(f"its image can't be used: {error}") from error
        if image.change:
            raise ValueError(f"its image can't be used: DALI can't read it as stored ({image.change})")
        return labels.find_position(read_label(sample, labels.field)), image.width, image.height

    return describe
