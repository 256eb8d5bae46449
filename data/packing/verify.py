"""Checks a dataset against itself.

    python -m data verify SHARDS            names, sizes and headers: reads about 4 KB a sample
    python -m data verify SHARDS --deep     every byte: checksums, labels, and every image decoded

A line for each fault, then one that says how much was checked.
"""

import json
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from data.common.files import checksum
from data.common.progress import report_progress
from data.dataset.headers import BadImage
from data.dataset.index import Index, compute_fingerprint, open_index
from data.dataset.shards import Describe, Member, find_image, read_label, read_shard
from data.loader.store import open_whole_shard
from data.packing.adopt import Labels
from data.packing.images import DALI_PIXELS, ImageRules, stored_image
from data.packing.workers import workers

_AS_IT_IS = ImageRules(keep_original=True, max_pixels=DALI_PIXELS)


def verify(
    place: str | Path, cache: str | None = None, *, deep: bool = False, processes: int = 1, say: Callable[[str], None] = print
) -> int:
    """Says a line for each fault and one that sums up, and gives the number of faults.

    Quick, it finds files that are missing, left over, or of another size than when they were packed; a classes.json, index.npy or
    .idx that is not the one that was written; tar headers that differ from these; and labels without a class. Deep, it finds any
    change of a shard as well, and images that can't be decoded. The shards of a URL are fetched into `cache`, each whole.
    """
    try:
        index = open_index(place, cache, sizes=False)
    except ValueError as error:
        say(str(error))
        say(f"{place}: 1 fault, without which nothing else can be checked")
        return 1
    _opened.cache_clear()  # of an earlier call in this process; the files may have changed since
    found = 0
    shards = range(len(index.shards))
    with workers(min(processes, len(shards))) as run:
        results = report_progress(run(partial(_shard_faults, place, cache, deep), shards), len(shards), f"verifying shards of {place}")
        for faults in (_dataset_faults(index), *results):
            for fault in faults:
                found += 1
                say(fault)
    size = sum(shard.bytes for shard in index.shards) / 1e9
    depth = "every byte read, every image decoded" if deep else "names, sizes and headers; --deep reads every byte"
    advice = "; copy these files again from where the dataset was packed" if found else ""
    faults_found = "1 fault" if found == 1 else f"{found} faults"
    say(f"{place}: {faults_found} in {len(index)} samples, {len(index.shards)} shards, {size:.3f} GB ({depth}){advice}")
    return found


def _dataset_faults(index: Index) -> Iterator[str]:
    """What is wrong with the files beside the shards."""
    if compute_fingerprint(index.samples, index.shards) != index.fingerprint:
        yield "index.npy, or a shard's name or checksum in dataset.json, is not what it was when the dataset was packed"
    if checksum(index.folder / "classes.json") != _description(index.folder).get("classes_xxh3_128"):
        yield "classes.json is not what it was when the dataset was packed"
    highest = index.samples["label"].max(initial=0)
    if highest >= len(index.classes):
        yield f"index.npy has labels up to {highest}, and there are {len(index.classes)} classes"
    names = {shard.name for shard in index.shards}
    for path in sorted(index.folder.iterdir()):
        if path.suffix == ".tar" and path.name not in names:
            yield f"{path.name} is not in dataset.json"
        elif path.suffix == ".idx" and path.with_suffix(".tar").name not in names:
            yield f"{path.name} belongs to no shard"
        elif path.suffix == ".tmp" or path.name == ".index":
            yield f"{path.name} was left by something that was interrupted; remove it"


@lru_cache(maxsize=1)  # a worker checks many shards of one dataset
def _opened(place: str | Path, cache: str | None) -> Index:
    return open_index(place, cache, sizes=False)


def _description(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "dataset.json").read_text(encoding="utf-8"))


def _shard_faults(place: str | Path, cache: str | None, deep: bool, number: int) -> list[str]:
    """What is wrong with a shard, its .idx and its rows in index.npy."""
    index = _opened(place, cache)
    try:
        with open_whole_shard(index, number) as path:
            return _faults_at(path, index, number, deep)
    except ValueError as error:  # it can't be fetched
        return [str(error)]


def _faults_at(path: Path, index: Index, number: int, deep: bool) -> list[str]:
    shard = index.shards[number]
    if not path.is_file():
        return [f"{shard.name} is missing"]
    if path.stat().st_size != shard.bytes:
        return [f"{shard.name} has {path.stat().st_size} bytes instead of {shard.bytes}"]
    try:
        contents = read_shard(path, _decoding(index) if deep else None)
    except ValueError as error:
        return [str(error)]
    faults = [f"{shard.name}: sample {contents.keys[place]}: {fault}" for place, fault in contents.faults.items()]
    if deep and contents.shard.xxh3_128 != shard.xxh3_128:
        faults.append(f"{shard.name}: its bytes have changed (checksum {contents.shard.xxh3_128} instead of {shard.xxh3_128})")
    idx = path.with_suffix(".idx")
    if not idx.is_file():
        faults.append(f"{idx.name} is missing")
    elif idx.read_bytes() != contents.idx.encode():
        faults.append(f"{idx.name} does not describe {shard.name}")
    rows = index.samples[index.shard_start[number] : index.shard_start[number + 1]]
    if len(contents.rows) != len(rows):
        return [*faults, f"{shard.name}: {len(contents.rows)} samples, and {len(rows)} in index.npy"]
    columns = ["offset", "size", "label", "width", "height"] if deep else ["offset", "size"]
    different = [place for place in np.flatnonzero(contents.rows[columns] != rows[columns]) if place not in contents.faults]
    if different:
        first = different[0]
        more = f"; and so in {len(different) - 1} more" if len(different) > 1 else ""
        faults.append(
            f"{shard.name}: sample {contents.keys[first]}: {', '.join(columns)} are {contents.rows[columns][first]} in the tar, "
            f"{rows[columns][first]} in index.npy{more}"
        )
    return faults


def _decoding(index: Index) -> Describe:
    """A Describe that decodes each image, as strictly as packing does."""
    labels = Labels(_description(index.folder).get("made", {}).get("label_field"), index.classes)

    def describe(sample: list[Member]) -> tuple[int, int, int]:
        try:
            stored = stored_image(find_image(sample).data, _AS_IT_IS)
        except BadImage as error:
            raise ValueError(f"its image can't be used: {error}") from error
        if stored.change:
            raise ValueError(f"its image can't be used: DALI does not read it as it is ({stored.change})")
        return labels.position(read_label(sample, labels.field)), stored.width, stored.height

    return describe
