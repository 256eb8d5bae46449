"""Makes a dataset, in place, of tar shards that others wrote: img2dataset, open_clip, timm, webdataset's ShardWriter.

    python -m data index SHARDS [--classes FILE] [--label FIELD]

Tars are read once and never touched. Beside them appear a .idx each, index.npy, classes.json and dataset.json, once all shards
have been read without a fault. Until then what was found waits in SHARDS/.index, from which a run that was cut short goes on.
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
import xxhash

from data.common.files import publish
from data.common.progress import report_progress
from data.dataset.headers import read_image_size
from data.dataset.index import Index, Shard, compute_fingerprint, open_index, write_index
from data.dataset.shards import Member, find_image, read_label, read_shard, write_idx
from data.packing.workers import workers

MAX_CLASSES = 1 << 20  # a greater label is an identifier of something, not a position in a list of classes
_FAULTS_SHOWN = 5


def index_shards(
    folder: Path, *, classes: Sequence[str] | None = None, field: str | None = None, processes: int = 1, force: bool = False
) -> Index:
    """Makes a dataset of the .tar files in `folder`, in the order of their names.

    Labels are the numbers in .cls members or, with `field`, what that field of the .json members holds: a number or a class name.
    A number is a position in `classes`; without `classes` numbers are named by their decimal text, and names are sorted.

    Raises ValueError, and writes nothing, for samples that can't be used, for a folder without shards, and, unless `force`, for
    one that is a dataset already and would become another.
    """
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        raise ValueError(f"{folder}: no .tar files in it")
    found = folder / ".index"
    found.mkdir(exist_ok=True)
    read = partial(_read, found=found, field=field, classes=None if classes is None else tuple(classes))
    with workers(min(processes, len(paths))) as run:
        results = report_progress(run(read, paths), len(paths), f"reading shards of {folder}")
        faults = [fault for shard_faults in results for fault in shard_faults]
    try:
        if faults:
            more = f"; and {len(faults) - _FAULTS_SHOWN} more" if len(faults) > _FAULTS_SHOWN else ""
            raise ValueError(
                f"{folder} can't be indexed as it is: {'; '.join(faults[:_FAULTS_SHOWN])}{more}. Nothing was written. "
                f"Packing anew leaves out images that can't be used: `python -m data pack {folder} OUT`"
            )
        shards, rows, classes = _gather(folder, [found / f"{path.name}.npz" for path in paths], classes)
        old = _description(folder)
        same = (old.get("fingerprint"), old.get("classes")) == (compute_fingerprint(np.concatenate(rows), shards), list(classes))
        if (folder / "dataset.json").exists() and not (same or force):
            raise ValueError(f"{folder} is a dataset already, of other shards, labels or classes; --force makes it one of these")
    except ValueError:
        shutil.rmtree(found)
        raise
    if same:  # what else was told of the dataset stays
        about = {key: value for key, value in old.items() if key not in ("classes", "shards")}
    else:  # no reader may take the new .idx files and the old rows for one dataset
        about = {"made": {"command": "python -m data index", "label_field": field}}
        (folder / "dataset.json").unlink(missing_ok=True)
    for path in paths:
        os.replace(found / f"{path.stem}.idx", path.with_suffix(".idx"))
    write_index(folder, shards, rows, classes, **about)
    shutil.rmtree(found)
    return open_index(folder)


def _read(path: Path, *, found: Path, field: str | None, classes: tuple[str, ...] | None) -> list[str]:
    """Reads a shard and keeps what there is to know of it in `found`, unless it is there already. Gives a line for each fault."""
    status = path.stat()
    origin = xxhash.xxh3_128_hexdigest(repr((status.st_size, status.st_mtime_ns, field, classes)).encode())
    saved = found / f"{path.name}.npz"
    if saved.exists() and _load(saved)[0]["origin"] == origin:
        return []
    labels = Labels(field, classes)
    try:
        contents = read_shard(path, labels.describe)
    except ValueError as error:
        return [str(error)]
    if contents.faults:
        return [f"{path.name}: sample {contents.keys[number]}: {fault}" for number, fault in contents.faults.items()]
    if not contents.keys:
        return [f"{path.name}: no samples in it; remove it, as DALI takes no empty shard"]
    write_idx(found / f"{path.stem}.idx", contents.idx)
    about = {"origin": origin, "shard": asdict(contents.shard), "numbers": labels.numbers, "names": labels.new_names()}
    with open(saved.with_suffix(".tmp"), "wb") as file:
        np.savez(file, rows=contents.rows, about=json.dumps(about))
        publish(file, saved)
    return []


def _load(saved: Path) -> tuple[dict[str, Any], np.ndarray]:
    with np.load(saved) as arrays:
        return json.loads(str(arrays["about"])), arrays["rows"]


class Labels:
    """Turns the labels of a shard into positions: in `classes`, or else among the names that the shard has."""

    def __init__(self, field: str | None, classes: tuple[str, ...] | None) -> None:
        self.field, self.classes = field, classes
        self.positions = {name: position for position, name in enumerate(classes or ())}
        self.numbers = False  # whether there were labels that are numbers

    def new_names(self) -> list[str]:
        return list(self.positions) if self.classes is None else []

    def describe(self, sample: list[Member]) -> tuple[int, int, int]:
        """A Describe of data.dataset.shards."""
        return self.position(read_label(sample, self.field)), *read_image_size(find_image(sample).data)

    def position(self, label: int | str) -> int:
        if isinstance(label, str):
            if self.classes is None:
                return self.positions.setdefault(label, len(self.positions))
            if label not in self.positions:
                raise ValueError(f"its class {label!r} is none of the {len(self.classes)} given ones")
            return self.positions[label]
        self.numbers = True
        count = MAX_CLASSES if self.classes is None else len(self.classes)
        if not 0 <= label < count:
            raise ValueError(f"its label is {label}, and classes are numbered from 0 to {count - 1}")
        return label


def _gather(folder: Path, saved: Sequence[Path], classes: Sequence[str] | None) -> tuple[list[Shard], list[np.ndarray], Sequence[str]]:
    """The descriptions and rows of all shards, with labels that are positions in the classes returned beside them.

    Raises ValueError when some labels are numbers and others names.
    """
    abouts, rows = zip(*map(_load, saved), strict=True)
    shards = [Shard(**about["shard"]) for about in abouts]
    if classes is not None:
        return shards, list(rows), classes
    names = sorted({name for about in abouts for name in about["names"]})
    if not names:
        return shards, list(rows), [str(number) for number in range(1 + max(int(part["label"].max()) for part in rows))]
    if any(about["numbers"] for about in abouts):
        raise ValueError(f"{folder}: labels are numbers in some samples and names in others; --classes FILE says what numbers mean")
    positions = {name: position for position, name in enumerate(names)}
    for about, part in zip(abouts, rows, strict=True):
        part["label"] = np.array([positions[name] for name in about["names"]], np.uint32)[part["label"]]
    return shards, list(rows), names


def _description(folder: Path) -> dict[str, Any]:
    """dataset.json with the names of the classes in it; empty where there is none that can be read."""
    try:
        names = json.loads((folder / "classes.json").read_text(encoding="utf-8"))
        return json.loads((folder / "dataset.json").read_text(encoding="utf-8")) | {"classes": names}
    except (OSError, ValueError):
        return {}
