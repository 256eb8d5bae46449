"""What goes into which shard: a source's listing and the order of its entries, as arrays on disk that every worker maps.

    PLAN/plan.json         settings that the result depends on, and what each shard holds
    PLAN/classes.json      class names, in the order of labels
    PLAN/containers.json   the source's folders or tars
    PLAN/faults.json       why entries can't be used whatever their images, by number: samples of shards without a label
    PLAN/entries.bin       a row of sources.ENTRY for each file of the source, as listed
    PLAN/text.bin          their keys and names
    PLAN/order.bin         uint32: the entries, shard after shard

The plan is a pure function of source and settings. Entries are in the order of hashes of their keys and the seed, so any prefix of
the shards is an unbiased draw, and the order does not depend on how the same images lie in a source.
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
from data.packing.images import ImageRules, Stored, stored_image
from data.packing.sources import ENTRY, Container, Source, read, shown
from data.packing.workers import Run

HELD_OUT = "val"
_TRIED = 256  # entries whose stored size is measured
_OVERHEAD = 2048  # bytes of a sample in a tar: two headers, the label and padding
_BIGGEST = 1 << 30  # bytes; no image file is as large, and reading what is could take all memory


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What decides the result of a packing, beside source and classes. Shards are called NAME-SPLIT-000000.tar and have about
    `shard_bytes`. `holdout` is a number of images a class, or a share below 1. `classes` are all classes in label order; `labels` is
    the file of labels for images without classes."""

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
        return (self.split,) if self.holdout is None else (self.split, HELD_OUT)


@dataclass(frozen=True)
class PlannedShard:
    """`start` to `stop` are places in the plan's order."""

    split: str
    file: str
    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class Plan:
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

    def label(self, entry: int) -> int:
        return int(self.entries["label"][entry])

    def key(self, entry: int) -> str:
        row = self.entries[entry]
        start = int(row["text"])
        return self.text[start : start + int(row["key_bytes"])].tobytes().decode()

    def name(self, entry: int) -> str:
        row = self.entries[entry]
        start = int(row["text"]) + int(row["key_bytes"])
        return os.fsdecode(self.text[start : start + int(row["name_bytes"])].tobytes())

    def path(self, entry: int) -> str:
        """Where an entry lies, for people: the file below the source's root, and the member where that is a tar."""
        return shown(os.path.join(self.containers[int(self.entries["container"][entry])].path, self.name(entry)))

    def stored(self, entry: int) -> Stored:
        """An entry as it goes into a shard. Raises BadImage for what can't be used, ValueError for what can't be read."""
        if entry in self.faults:
            raise BadImage(self.faults[entry])
        row = self.entries[entry]
        if row["size"] > _BIGGEST:
            raise BadImage(f"{row['size']} bytes are no image")
        container = self.containers[int(row["container"])]
        return stored_image(read(self.root, container, self.name(entry), int(row["offset"]), int(row["size"])), self.rules)


@lru_cache(maxsize=1)
def open_plan(folder: Path) -> Plan:
    """Maps a plan; the same object for a process's every call."""
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
    """Lists a source and writes the plan into an empty folder; `run` maps a function over a sequence, here or in processes.

    Labels are positions in the classes that are given, or else in their sorted names. Raises ValueError for a source without files, a
    class that is not among the given ones, keys that repeat, and a holdout of nothing.
    """
    for shard_in_key in (False, True):
        classes, faults = write_listing(folder, source, settings.classes, run, shard_in_key=shard_in_key)
        entries = np.memmap(folder / "entries.bin", ENTRY, "r")
        order, repeated = drawn_order(entries["hash"], settings.seed)
        if not len(repeated) or source.kind != "WebDataset shards":
            break
    held = held_out(entries["label"], entries["hash"], settings.holdout, settings.seed)[order]
    if settings.holdout is not None and not held.any():
        raise ValueError(f"--holdout {settings.holdout} of {len(order)} images in {len(classes)} classes holds out none")
    order = np.concatenate([order[~held], order[held]]).astype(np.uint32)
    text = np.memmap(folder / "text.bin", np.uint8, "r")
    plan = Plan(source.root, made, settings.rules, (), classes, source.containers, entries, text, order, faults)
    if len(repeated):
        one, other = repeated.tolist()
        raise ValueError(f"{source.root}: {plan.path(one)} and {plan.path(other)} have the same key, {plan.key(one)}")

    cost = entries["size"][order] * stored_share(plan) + _OVERHEAD
    shards: list[dict[str, Any]] = []
    first = 0
    for split, count in ((settings.split, int(np.count_nonzero(~held))), (HELD_OUT, int(np.count_nonzero(held)))):
        for number, (start, stop) in enumerate(cuts(cost[first : first + count], settings.shard_bytes)):
            shards.append(
                {"split": split, "file": f"{settings.name}-{split}-{number:06d}.tar", "start": first + start, "stop": first + stop}
            )
        first += count
    order.tofile(folder / "order.bin")
    description = {"root": str(source.root), "made": made, "rules": asdict(settings.rules), "shards": shards}
    containers = [asdict(container) for container in source.containers]
    for name, value in (("plan", description), ("classes", classes), ("containers", containers), ("faults", faults)):
        (folder / f"{name}.json").write_text(json.dumps(value, indent=1), encoding="ascii")
    for path in folder.iterdir():
        sync(path)
    sync(folder)


def write_listing(
    folder: Path, source: Source, pinned: Sequence[str] | None, run: Run, *, shard_in_key: bool = False
) -> tuple[tuple[str, ...], dict[int, str]]:
    """Writes entries.bin and text.bin; gives the classes, and what is wrong with entries. Only the part at hand is in memory."""
    known = source.classes if pinned is None else pinned
    numbers = {name: number for number, name in enumerate(known or ())}

    def label_of(label: str | int | None, container: Container) -> int:
        if label is None:  # it will be rejected
            return 0
        where = f"{shown(str(source.root / container.path))}"
        if isinstance(label, int):
            names = source.classes or pinned
            if names is None:
                raise ValueError(f"{where}: labels are numbers; give --classes, the list that they index")
            if not 0 <= label < len(names):
                raise ValueError(f"{where}: label {label} of {len(names)} classes")
            label = names[label]
        if known is not None and label not in numbers:
            raise ValueError(f"{where}: class {label} is not among the {len(known)} given classes")
        return numbers.setdefault(label, len(numbers))

    parts = run(source.lister(shard_in_key=shard_in_key), source.containers)
    entries = text_bytes = 0
    faults: dict[int, str] = {}
    with open(folder / "entries.bin", "wb") as rows, open(folder / "text.bin", "wb") as text:
        for number, part in enumerate(report_progress(parts, len(source.containers), f"listing {source.root}")):
            labels = np.array([label_of(label, source.containers[number]) for label in part.labels], np.uint32)
            part.rows["label"] = labels[part.rows["label"]]
            part.rows["container"] = number
            part.rows["text"] += text_bytes
            faults |= {entries + row: fault for row, fault in part.faults.items()}
            entries += len(part.rows)
            rows.write(part.rows.tobytes())
            text_bytes += text.write(part.text)
    if not entries:
        raise ValueError(f"{source.root}: {source.kind} without a file in them")
    if known is not None:
        return tuple(known), faults
    provisional = np.memmap(folder / "entries.bin", ENTRY, "r+")["label"]  # numbered as classes were met
    provisional[:] = np.argsort(np.argsort(list(numbers)))[provisional]
    return tuple(sorted(numbers)), faults


def drawn_order(hashes: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The entries in the order of their hashes and the seed, int64 (N,); and two entries that share a hash, or none, int64 (2,) or (0,)."""
    drawn = hash64(seed, Draw.PACK, hashes)  # a bijection of the hash
    order = np.argsort(drawn, kind="stable")
    drawn = drawn[order]
    repeated = np.flatnonzero(drawn[1:] == drawn[:-1])[:1]
    return order, np.concatenate([order[repeated], order[repeated + 1]])


def held_out(labels: np.ndarray, hashes: np.ndarray, holdout: int | float | None, seed: int) -> np.ndarray:
    """Which entries are held out, bool (N,): those whose hash is below a share, or the N smallest hashes of each class, though
    never more than half of a class. It follows from an entry's key (and for a number, the keys of its class)."""
    if holdout is None:
        return np.zeros(len(labels), bool)
    drawn = hash64(seed, Draw.HOLDOUT, hashes)
    if holdout < 1:
        return drawn < np.uint64(holdout * 2.0**64)
    counts = np.bincount(labels)
    by_class = np.lexsort((drawn, labels))
    place = np.empty(len(labels), np.int64)
    place[by_class] = np.arange(len(labels)) - (np.cumsum(counts) - counts)[labels[by_class]]
    return place < np.minimum(holdout, counts // 2)[labels]


def stored_share(plan: Plan) -> float:
    """Stored bytes for each byte of the source, measured on the first entries of the order."""
    read = stored = 0
    for entry in plan.order[:_TRIED].tolist():
        with contextlib.suppress(BadImage):
            stored += len(plan.stored(entry).encoded)
            read += int(plan.entries["size"][entry])
    return stored / read if read else 1.0


def cuts(cost: np.ndarray, shard_bytes: int) -> list[tuple[int, int]]:
    """Cuts entries, of so many bytes each, into shards of equal bytes, as near to `shard_bytes` as goes: (start, stop) of each."""
    if not len(cost):
        return []
    ends = np.cumsum(cost)
    count = max(1, round(float(ends[-1]) / shard_bytes))
    inner = np.searchsorted(ends, ends[-1] * (np.arange(1, count) / count))
    edges = np.unique(np.concatenate([[0], inner, [len(cost)]]))
    return list(pairwise(edges.tolist()))
