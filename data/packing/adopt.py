"""Makes a dataset, in place, of tar shards that other tools wrote: img2dataset, open_clip, timm, webdataset's ShardWriter.

    python -m data index SHARDS [--classes FILE] [--label FIELD]

Each tar is read once and never changed. After all shards are read without a fault, each gets an .idx beside it, and the folder
gets index.npy, classes.json and dataset.json. Until then SHARDS/.index keeps the results, from which an interrupted run resumes.
"""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data.common.files import open_to_replace
from data.common.hashing import hash_bytes
from data.common.progress import report_progress
from data.common.text import join_first
from data.dataset.headers import read_image_size
from data.dataset.index import Index, Shard, compute_fingerprint, open_index, write_index
from data.dataset.shards import Member, find_image, read_label, read_shard, write_idx
from data.packing.workers import start_workers

MAX_CLASSES = 1 << 20  # a larger label is an identifier, not a position in a list of classes


def index_shards(
    folder: Path, *, classes: Sequence[str] | None = None, field: str | None = None, processes: int = 1, force: bool = False
) -> Index:
    """Makes a dataset of the .tar files in a folder, in the order of their names.

    Args:
        classes: class names in label order. If None, numbers are named by their decimal text, and class names are sorted.
        field: the field of the .json members that holds a number or a class name; None for the number in the .cls members.
        force: replace a different dataset in the folder.

    Raises:
        ValueError: a sample can't be used, the folder has no shards or, without `force`, the folder is already a different dataset.
            Nothing is written then.
    """
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        raise ValueError(f"{folder}: no .tar files in it")
    results = folder / ".index"
    results.mkdir(exist_ok=True)
    read = partial(_read_shard, results=results, field=field, classes=None if classes is None else tuple(classes))
    with start_workers(min(processes, len(paths))) as run:
        fault_lists = report_progress(run(read, paths), len(paths), f"reading shards of {folder}")
        faults = [fault for shard_faults in fault_lists for fault in shard_faults]
    try:
        if faults:
            raise ValueError(
                f"{folder} can't be indexed: {join_first(faults, '; ')}. Nothing was written. "
                f"To drop images that can't be used, pack the shards: `python -m data pack {folder} OUT`"
            )
        shards, rows, classes = _combine(folder, [results / f"{path.name}.npz" for path in paths], classes)
        earlier = read_description(folder)
        is_same = (earlier.get("fingerprint"), earlier.get("classes")) == (compute_fingerprint(np.concatenate(rows), shards), list(classes))
        if (folder / "dataset.json").exists() and not (is_same or force):
            raise ValueError(f"{folder} is already a dataset of other shards, labels or classes; --force replaces it")
    except ValueError:
        shutil.rmtree(results)
        raise
    if is_same:  # keep the rest of the description
        about = {key: value for key, value in earlier.items() if key not in ("classes", "shards")}
    else:  # no reader may combine the new .idx files with the earlier rows
        about = {"made": {"command": "python -m data index", "label_field": field}}
        (folder / "dataset.json").unlink(missing_ok=True)
    for path in paths:
        os.replace(results / f"{path.stem}.idx", path.with_suffix(".idx"))
    write_index(folder, shards, rows, classes, **about)
    shutil.rmtree(results)
    return open_index(folder)


def _read_shard(path: Path, *, results: Path, field: str | None, classes: tuple[str, ...] | None) -> list[str]:
    """Reads a shard and writes its rows and .idx to `results`, unless an earlier run has done so; returns the shard's faults."""
    status = path.stat()
    origin = hash_bytes(repr((status.st_size, status.st_mtime_ns, field, classes)).encode())
    saved = results / f"{path.name}.npz"
    if saved.exists() and _load_result(saved)[0]["origin"] == origin:
        return []
    labels = Labels(field, classes)
    try:
        contents = read_shard(path, labels.describe)
    except ValueError as error:
        return [str(error)]
    if contents.faults:
        return [f"{path.name}: sample {contents.keys[number]}: {fault}" for number, fault in contents.faults.items()]
    if not contents.keys:
        return [f"{path.name}: no samples in it; remove it, as DALI accepts no empty shard"]
    write_idx(results / f"{path.stem}.idx", contents.idx)
    names = list(labels.positions) if classes is None else []
    about = {"origin": origin, "shard": asdict(contents.shard), "numbers": labels.has_numbers, "names": names}
    with open_to_replace(saved, "wb") as file:
        np.savez(file, rows=contents.rows, about=json.dumps(about))
    return []


def _load_result(saved: Path) -> tuple[dict[str, Any], np.ndarray]:
    with np.load(saved) as arrays:
        return json.loads(str(arrays["about"])), arrays["rows"]


class Labels:
    """Maps the labels of a shard to positions: in `classes` or, if None, among the names that occur in the shard."""

    def __init__(self, field: str | None, classes: tuple[str, ...] | None) -> None:
        self.field, self.classes = field, classes
        self.positions = {name: position for position, name in enumerate(classes or ())}
        self.has_numbers = False

    def describe(self, sample: list[Member]) -> tuple[int, int, int]:
        """Returns a sample's label, width and height: a Describe of data.dataset.shards."""
        return self.find_position(read_label(sample, self.field)), *read_image_size(find_image(sample).data)

    def find_position(self, label: int | str) -> int:
        if isinstance(label, str):
            if self.classes is None:
                return self.positions.setdefault(label, len(self.positions))
            if label not in self.positions:
                raise ValueError(f"its class {label!r} is not among the {len(self.classes)} given classes")
            return self.positions[label]
        self.has_numbers = True
        count = MAX_CLASSES if self.classes is None else len(self.classes)
        if not 0 <= label < count:
            raise ValueError(f"its label is {label}; labels are from 0 to {count - 1}")
        return label


def _combine(folder: Path, saved: Sequence[Path], classes: Sequence[str] | None) -> tuple[list[Shard], list[np.ndarray], Sequence[str]]:
    """Combines the results of all shards; returns shards, rows and classes, with labels as positions in the classes."""
    abouts, rows = zip(*map(_load_result, saved), strict=True)
    shards = [Shard(**about["shard"]) for about in abouts]
    if classes is not None:
        return shards, list(rows), classes
    names = sorted({name for about in abouts for name in about["names"]})
    if not names:
        return shards, list(rows), [str(number) for number in range(1 + max(int(part["label"].max()) for part in rows))]
    if any(about["numbers"] for about in abouts):
        raise ValueError(f"{folder}: labels are numbers in some samples and names in others; give --classes, the list that numbers index")
    positions = {name: position for position, name in enumerate(names)}
    for about, part in zip(abouts, rows, strict=True):
        part["label"] = np.array([positions[name] for name in about["names"]], np.uint32)[part["label"]]
    return shards, list(rows), names


def read_description(folder: Path) -> dict[str, Any]:
    """Reads dataset.json and adds the class names; returns an empty dict if a file can't be read."""
    try:
        names = json.loads((folder / "classes.json").read_text(encoding="utf-8"))
        return json.loads((folder / "dataset.json").read_text(encoding="utf-8")) | {"classes": names}
    except (OSError, ValueError):
        return {}
