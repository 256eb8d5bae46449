"""Plans a packing: which entry of a source goes into which shard, as arrays on disk that every worker maps.

    PLAN/plan.json         the settings that the result depends on, and the entries of each shard
    PLAN/classes.json      class names in label order
    PLAN/containers.json   the source's folders or tars
    PLAN/faults.json       by entry number, why an entry can't be used, apart from its image: a shard's sample without a label
    PLAN/entries.bin       one row of sources.ENTRY per file of the source, in listing order
    PLAN/text.bin          their keys and names
    PLAN/order.bin         uint32: the entries, shard after shard

The plan is a pure function of source and settings. Entries are ordered by a hash of their key and the seed. So any prefix of the
shards is an unbiased sample, and the order does not depend on the layout of the source.
"""

import contextlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from data.common.counter_rng import Draw, hash64
from data.common.files import sync
from data.common.progress import report_progress
from data.dataset.headers import BadImage
from data.dataset.shards import TAR_OVERHEAD
from data.packing.images import ImageRules, StoredImage, convert_image
from data.packing.labels import escape_name
from data.packing.sources import ENTRY, SHARDS, Container, Source, read_entry
from data.packing.workers import Run

HOLDOUT_SPLIT = "val"
_MEASURED_ENTRIES = 256  # entries whose stored size is measured
_MAX_FILE_BYTES = 1 << 30  # no image file is larger, and reading a larger file could exhaust the memory


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of a packing. With the source, they determine every byte of the result.

    Attributes:
        name: shards are called NAME-SPLIT-000000.tar.
        shard_bytes: the approximate size of a shard.
        holdout: images per class or, below 1, the fraction of all images that go to the split `val`.
        classes: all classes in label order; None for the source's.
        labels: the file of labels of images without classes.
    """

    name: str
    split: str = "train"
    shard_bytes: int = 256 << 20
    seed: int = 0
    holdout: int | float | None = None
    classes: tuple[str, ...] | None = None
    labels: Path | None = None
    rules: ImageRules = field(default_factory=ImageRules)

    @property
    def splits(self) -> tuple[str, ...]:
        return (self.split,) if self.holdout is None else (self.split, HOLDOUT_SPLIT)


@dataclass(frozen=True)
class PlannedShard:
    """A shard to write: entries `start` to `stop` of the plan's order."""

    split: str
    file: str
    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class Plan:
    """An open plan. `made` describes source and settings for dataset.json."""

    root: Path
    made: dict[str, Any]
    rules: ImageRules
    shards: tuple[PlannedShard, ...]
    classes: tuple[str, ...]
    containers: tuple[Container, ...]
    entries: np.ndarray
    text: np.ndarray
    order: np.ndarray
    faults: dict[int, str]

    def __len__(self) -> int:
        return len(self.order)

    def read_label(self, entry: int) -> int:
        return int(self.entries["label"][entry])

    def read_key(self, entry: int) -> str:
        row = self.entries[entry]
        start = int(row["text"])
        return self.text[start : start + int(row["key_bytes"])].tobytes().decode()

    def read_name(self, entry: int) -> str:
        row = self.entries[entry]
        start = int(row["text"]) + int(row["key_bytes"])
        return os.fsdecode(self.text[start : start + int(row["name_bytes"])].tobytes())

    def describe_path(self, entry: int) -> str:
        """Returns the path of an entry's file relative to the source's root, followed by the member in a tar."""
        return escape_name(os.path.join(self.containers[int(self.entries["container"][entry])].path, self.read_name(entry)))

    def convert(self, entry: int) -> StoredImage:
        """Reads and converts an entry. Raises BadImage if it can't be used, ValueError if it can't be read."""
        if entry in self.faults:
            raise BadImage(self.faults[entry])
        row = self.entries[entry]
        if row["size"] > _MAX_FILE_BYTES:
            raise BadImage(f"{row['size']} bytes; an image file has at most {_MAX_FILE_BYTES}")
        container = self.containers[int(row["container"])]
        return convert_image(read_entry(self.root, container, self.read_name(entry), int(row["offset"]), int(row["size"])), self.rules)


@lru_cache(maxsize=1)
def open_plan(folder: Path) -> Plan:
    """Maps a plan, once per process."""
    plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    return Plan(
        root=Path(plan["root"]),
        made=plan["made"],
        rules=ImageRules(**plan["rules"]),
        shards=tuple(PlannedShard(**shard) for shard in plan["shards"]),
        classes=tuple(json.loads((folder / "classes.json").read_text(encoding="utf-8"))),
        containers=tuple(Container(**container) for container in json.loads((folder / "containers.json").read_text())),
        entries=np.memmap(folder / "entries.bin", ENTRY, "r"),
        text=np.memmap(folder / "text.bin", np.uint8, "r"),
        order=np.memmap(folder / "order.bin", np.uint32, "r"),
        faults={int(entry): fault for entry, fault in json.loads((folder / "faults.json").read_text()).items()},
    )


def write_plan(folder: Path, source: Source, settings: Settings, made: dict[str, Any], run: Run) -> None:
    """Lists a source and writes the plan to an empty folder.

    Labels are positions in the given classes, or else in the sorted class names. `made` describes source and settings for dataset.json.
    Raises ValueError for a source without files, a class that is not among the given ones, repeated keys, and a holdout without images.
    """
    for shard_in_key in (False, True):
        classes, faults = write_listing(folder, source, settings.classes, run, shard_in_key=shard_in_key)
        entries = np.memmap(folder / "entries.bin", ENTRY, "r")
        order, repeated = draw_order(entries["hash"], settings.seed)
        if not len(repeated) or source.kind != SHARDS:
            break
    held = draw_holdout(entries["label"], entries["hash"], settings.holdout, settings.seed)[order]
    if settings.holdout is not None and not held.any():
        raise ValueError(f"--holdout {settings.holdout} of {len(order)} images in {len(classes)} classes holds out no image")
    order = np.concatenate([order[~held], order[held]]).astype(np.uint32)
    text = np.memmap(folder / "text.bin", np.uint8, "r")
    plan = Plan(source.root, made, settings.rules, (), classes, source.containers, entries, text, order, faults)
    if len(repeated):
        one, other = map(plan.describe_path, repeated.tolist())
        raise ValueError(f"{source.root}: {one} and {other} have the same key, {plan.read_key(int(repeated[0]))}")

    cost = entries["size"][order] * measure_size_ratio(plan) + TAR_OVERHEAD
    shards: list[PlannedShard] = []
    first = 0
    for split, count in ((settings.split, int(np.count_nonzero(~held))), (HOLDOUT_SPLIT, int(np.count_nonzero(held)))):
        for number, (start, stop) in enumerate(cut_shards(cost[first : first + count], settings.shard_bytes)):
            shards.append(PlannedShard(split, f"{settings.name}-{split}-{number:06d}.tar", first + start, first + stop))
        first += count
    order.tofile(folder / "order.bin")
    description = {"root": str(source.root), "made": made, "rules": asdict(settings.rules), "shards": [asdict(shard) for shard in shards]}
    containers = [asdict(container) for container in source.containers]
    for name, value in (("plan", description), ("classes", classes), ("containers", containers), ("faults", faults)):
        (folder / f"{name}.json").write_text(json.dumps(value, indent=1), encoding="ascii")
    for path in folder.iterdir():
        sync(path)
    sync(folder)


def write_listing(
    folder: Path, source: Source, classes: Sequence[str] | None, run: Run, *, shard_in_key: bool = False
) -> tuple[tuple[str, ...], dict[int, str]]:
    """Writes entries.bin and text.bin, with one container's listing in memory at a time.

    `classes` are in label order; None for the source's. With `shard_in_key` the keys of shards' samples begin with the shard's name.
    Returns the classes, and the faults by entry number. Raises ValueError for a source without files, and for a label without a class.
    """
    known = source.classes if classes is None else classes
    indexed = source.classes or classes  # numeric labels are positions in this list
    numbers = {name: number for number, name in enumerate(known or ())}

    def number_label(label: str | int | None, container: Container) -> int:
        if label is None:  # the entry has a fault and will be rejected
            return 0
        where = escape_name(str(source.root / container.path))
        if isinstance(label, int):
            if indexed is None:
                raise ValueError(f"{where}: labels are numbers; give --classes, the list that they index")
            if not 0 <= label < len(indexed):
                raise ValueError(f"{where}: label {label} of {len(indexed)} classes")
            label = indexed[label]
        if known is not None and label not in numbers:
            raise ValueError(f"{where}: class {label} is not among the {len(known)} given classes")
        return numbers.setdefault(label, len(numbers))

    listings = run(source.make_lister(shard_in_key=shard_in_key), source.containers)
    entries = text_bytes = 0
    faults: dict[int, str] = {}
    with open(folder / "entries.bin", "wb") as rows, open(folder / "text.bin", "wb") as text:
        for number, listing in enumerate(report_progress(listings, len(source.containers), f"listing {source.root}")):
            labels = np.array([number_label(label, source.containers[number]) for label in listing.labels], np.uint32)
            listing.rows["label"] = labels[listing.rows["label"]]
            listing.rows["container"] = number
            listing.rows["text"] += text_bytes
            faults |= {entries + row: fault for row, fault in listing.faults.items()}
            entries += len(listing.rows)
            rows.write(listing.rows.tobytes())
            text_bytes += text.write(listing.text)
    if not entries:
        raise ValueError(f"{source.root}: {source.kind} without a file in them")
    if known is not None:
        return tuple(known), faults
    provisional = np.memmap(folder / "entries.bin", ENTRY, "r+")["label"]  # numbered in the order of first occurrence
    provisional[:] = np.argsort(np.argsort(list(numbers)))[provisional]
    return tuple(sorted(numbers)), faults


def draw_order(hashes: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Orders entries by a hash of their key's hash and the seed.

    Returns the order, int64 (N,), and two entries with the same hash, int64 (2,), or none, (0,).
    """
    drawn = hash64(seed, Draw.PACK, hashes)  # a bijection of the hash
    order = np.argsort(drawn, kind="stable")
    drawn = drawn[order]
    repeated = np.flatnonzero(drawn[1:] == drawn[:-1])[:1]
    return order, np.concatenate([order[repeated], order[repeated + 1]])


def draw_holdout(labels: np.ndarray, hashes: np.ndarray, holdout: int | float | None, seed: int) -> np.ndarray:
    """Draws the entries to hold out, bool (N,).

    `holdout` is, below 1, a fraction of all entries, otherwise a number per class, limited to half of the class. The draw depends on the
    hash of an entry's key, uint64 (N,), and, for a number per class, on the hashes of the class.
    """
    if holdout is None:
        return np.zeros(len(labels), bool)
    drawn = hash64(seed, Draw.HOLDOUT, hashes)
    if holdout < 1:
        return drawn < np.uint64(holdout * 2.0**64)
    counts = np.bincount(labels)
    by_class = np.lexsort((drawn, labels))
    rank = np.empty(len(labels), np.int64)
    rank[by_class] = np.arange(len(labels)) - (np.cumsum(counts) - counts)[labels[by_class]]
    return rank < np.minimum(holdout, counts // 2)[labels]


def measure_size_ratio(plan: Plan) -> float:
    """Measures the stored bytes per byte of the source on the first entries of the order."""
    source_bytes = stored_bytes = 0
    for entry in plan.order[:_MEASURED_ENTRIES].tolist():
        with contextlib.suppress(BadImage):
            stored_bytes += len(plan.convert(entry).encoded)
            source_bytes += int(plan.entries["size"][entry])
    return stored_bytes / source_bytes if source_bytes else 1.0


def cut_shards(cost: np.ndarray, shard_bytes: int) -> list[tuple[int, int]]:
    """Cuts entries of `cost` bytes each into shards, (start, stop), of equal size close to `shard_bytes`."""
    if not len(cost):
        return []
    ends = np.cumsum(cost)
    count = max(1, round(float(ends[-1]) / shard_bytes))
    inner = np.searchsorted(ends, ends[-1] * (np.arange(1, count) / count))
    edges = np.unique(np.concatenate([[0], inner, [len(cost)]]))
    return list(pairwise(edges.tolist()))
