"""Packs images into a dataset of tar shards, in parallel, and so that it can be stopped at any moment and started again.

    python -m data pack SOURCE OUT                  OUT/train/NAME-train-000000.tar …, a dataset as index.py describes it
    python -m data pack SOURCE OUT --part 2/8       a share of the work, for several machines; the last to finish merges

    OUT/train.packing/plan/       which entry of the source goes into which shard (plan.py); written once, before all else
    OUT/train.packing/done/       a file for each shard that is whole, with its index rows: its presence says so
    OUT/train.packing/scratch/    a folder for each process that writes
    OUT/train/                    shards as they become whole; at last index.npy, classes.json, rejected.jsonl, dataset.json

Every image is decoded once (images.py): what can't be is left out and listed in rejected.jsonl. A shard is the unit of work. Its
bytes follow from plan and source alone, so whoever packs it, and however often, the result is the same; it is written in scratch,
synced, renamed to its final name, and then declared done. Merging makes the rest of the dataset from what lies in done/ and
removes the folder OUT/train.packing. No step relies on another process not being at the same one.
"""

import contextlib
import errno
import fcntl
import itertools
import json
import os
import shutil
import socket
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from data.common.files import publish, sync
from data.common.progress import report_progress
from data.dataset.headers import BadImage
from data.dataset.index import DTYPE, Index, Shard, open_index, write_index
from data.dataset.shards import Sample, write_shard
from data.packing.plan import HELD_OUT, Plan, Settings, open_plan, write_plan
from data.packing.sources import read_classes, recognise, shown
from data.packing.workers import Run
from data.packing.workers import workers as pool

MAX_REJECTED = 0.01


def pack(
    source: Path,
    out: Path,
    settings: Settings,
    *,
    max_rejected: int | float = MAX_REJECTED,
    workers: int = 1,
    part: tuple[int, int] = (0, 1),
    merge_only: bool = False,
) -> list[Index]:
    """Packs a source into OUT, or goes on where an earlier call stopped; with `part` (i, n) only each n-th shard, from the i-th.

    Gives the finished datasets: of the split and, with a holdout, of `val`; none while other parts are at work. `max_rejected` is a
    number or, below 1, a share of the files. Where no classes are given, another split than `train` takes those of OUT/train.

    Raises ValueError for a source that is none (see sources.recognise), for other settings than those the packing was begun with, for
    too many rejected images, and when reading or writing fails. Work that is done is kept.
    """
    source = source.absolute()
    if settings.holdout is not None and settings.split == HELD_OUT:
        raise ValueError(f"--split {HELD_OUT} is what --holdout makes; give another split, or no holdout")
    if out.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"{out} lies inside {source}; give an OUT elsewhere")
    if settings.classes is None and settings.split != "train":
        settings = replace(settings, classes=_classes_of_train(out))
    made = _made(source, settings)
    folder, work = out / settings.split, out / f"{settings.split}.packing"
    try:
        if (folder / "dataset.json").is_file():
            found = json.loads((folder / "dataset.json").read_text(encoding="utf-8")).get("made", {})
            _check_same(folder, found, made | {"versions": found.get("versions")}, f"remove {folder}")
            _say(f"{folder} is packed already")
        else:
            with pool(workers) as run:
                plan = _planned(source, out, work, settings, made, run, new=not merge_only)
                _check_same(work, plan.made, made, f"remove {work} and {folder}")
                if not merge_only:
                    _pack_shards(plan, out, work, part, max_rejected, run)
            missing = sum(not _done(work, number).is_file() for number in range(len(plan.shards)))
            if not missing:
                _merge(plan, out, work, settings.splits, max_rejected)
            elif not (folder / "dataset.json").is_file():  # else another process has merged, and is removing the folder
                if merge_only:
                    raise ValueError(f"{work}: {missing} of {len(plan.shards)} shards are not packed yet")
                _say(f"part {part[0]}/{part[1]} is packed; {missing} of {len(plan.shards)} shards are left to other parts")
                return []
    except FileNotFoundError:  # or has removed it under this one's feet
        if not (folder / "dataset.json").is_file():
            raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ValueError(f"{out}: no space left. What is packed is kept: make room and start the same command again") from error
        raise
    except MemoryError as error:
        raise ValueError("memory is short; fewer --workers need less. What is packed is kept: start the same command again") from error
    finally:
        _clear(work)
    shutil.rmtree(work, ignore_errors=True)
    return [open_index(out / split) for split in settings.splits]


def _made(source: Path, settings: Settings) -> dict[str, Any]:
    """How the dataset is made, for dataset.json: all that its bytes depend on beside those of the source."""
    classes, labels = settings.classes, settings.labels
    return {
        "command": "python -m data pack",
        "source": shown(str(source)),
        "labels": None if labels is None else shown(str(labels.absolute())),
        "classes": None if classes is None else f"{len(classes)}, xxh3_64 {xxhash.xxh3_64_hexdigest(json.dumps(classes).encode())}",
        **{name: getattr(settings, name) for name in ("split", "name", "shard_bytes", "seed", "holdout")},
        **asdict(settings.rules),
        "versions": {name: version(name) for name in ("pillow", "simplejpeg")},
    }


def _classes_of_train(out: Path) -> tuple[str, ...] | None:
    """The classes of OUT/train, which the labels of another split are to mean; None where there is none."""
    if (out / "train" / "classes.json").is_file():
        return read_classes(out / "train")
    if (out / "train.packing").is_dir():
        raise ValueError(f"{out / 'train'}, whose classes this split should have, is not packed yet; wait for it, or give --classes")
    return None


def _check_same(folder: Path, found: dict[str, Any], given: dict[str, Any], begin_anew: str) -> None:
    differ = [f"{name} {found.get(name)} instead of {value}" for name, value in given.items() if found.get(name) != value]
    if differ:
        raise ValueError(f"{folder} was made with other settings: {'; '.join(differ)}. Give those, or another OUT, or {begin_anew}")


def make_empty(out: Path) -> None:
    """Makes a folder; raises ValueError when it holds anything already."""
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()):
        raise ValueError(f"{out} is not empty; give another folder, or remove what an earlier packing left there")


def _planned(source: Path, out: Path, work: Path, settings: Settings, made: dict[str, Any], run: Run, *, new: bool) -> Plan:
    """The plan that is there; or with `new` one that is made now, unless another process is at it: then waits for that."""
    open_plan.cache_clear()
    if (work / "plan").is_dir():
        return open_plan(work / "plan")
    if not new:
        raise ValueError(f"{out}: nothing of {settings.split} is packed yet")
    found = recognise(source, settings.labels)
    work.mkdir(parents=True, exist_ok=True)
    with _one_at_a_time(work / "lock"), _scratch(work) as scratch:
        if not (work / "plan").is_dir():
            if (out / settings.split / "dataset.json").is_file():
                raise FileNotFoundError(work / "plan")  # another process has merged since this one looked
            for split in settings.splits:
                make_empty(out / split)
            sync(out)
            write_plan(scratch, found, settings, made, run)
            try:
                os.rename(scratch, work / "plan")
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):  # where locks don't work, another may have been faster
                    raise
            sync(work)
    return open_plan(work / "plan")


def _pack_shards(plan: Plan, out: Path, work: Path, part: tuple[int, int], max_rejected: int | float, run: Run) -> None:
    """Packs what is left of a part's shards."""
    _clear(work)
    (work / "done").mkdir(exist_ok=True)
    mine = range(part[0], len(plan.shards), part[1])
    done = [number for number in mine if _done(work, number).is_file()]
    rejected = [line for number in done for line in _read_done(work, number).rejected]
    todo = sorted(set(mine) - set(done))
    if done:
        _say(f"{len(done)} of {len(mine)} shards are packed already")
    _check_rejected(rejected, max_rejected, plan)
    entries = sum(plan.shards[number].stop - plan.shards[number].start for number in todo)
    results = run(partial(pack_shard, out, work), todo)
    for found, _ in report_progress(results, entries, f"packing {out}", weigh=lambda result: result[1]):
        rejected += found
        _check_rejected(rejected, max_rejected, plan)


def pack_shard(out: Path, work: Path, number: int) -> tuple[list[dict[str, str]], int]:
    """Packs one shard of a plan, wholly; gives what it rejected and the number of its entries."""
    plan = open_plan(work / "plan")
    shard = plan.shards[number]
    rejected: list[dict[str, str]] = []
    changes: Counter[str] = Counter()
    histogram = np.zeros((3, 256), np.int64)

    def samples() -> Iterator[Sample]:
        for entry in plan.order[shard.start : shard.stop].tolist():
            try:
                stored = plan.stored(entry)
            except BadImage as error:
                rejected.append({"key": plan.key(entry), "path": plan.path(entry), "reason": str(error)})
                continue
            if stored.change:
                changes[stored.change] += 1
            histogram[:] += stored.histogram
            yield Sample(plan.key(entry), stored.encoded, plan.label(entry), stored.extension)

    good = samples()
    with _scratch(work) as scratch:
        written, rows = [], np.zeros(0, DTYPE)
        if first := next(good, None):  # a shard of which nothing is left is not written
            path = out / shard.split / shard.file
            described, rows = write_shard(scratch / shard.file, itertools.chain([first], good))
            written = [asdict(described)]
            for final in (path.with_suffix(".idx"), path):
                os.replace(scratch / final.name, final)
            sync(path.parent)
        about = {"shards": written, "rejected": rejected, "changes": changes}
        with open(scratch / "done.npz", "wb") as file:
            np.savez(file, rows=rows, histogram=histogram, about=np.frombuffer(json.dumps(about).encode(), np.uint8))
            publish(file, _done(work, number))
    return rejected, shard.stop - shard.start


@dataclass(frozen=True, eq=False)
class Done:
    """What packing a shard gave: `shards` has its description, or nothing where no image was left; `histogram` is (3, 256)."""

    shards: list[Shard]
    rows: np.ndarray
    rejected: list[dict[str, str]]
    changes: dict[str, int]
    histogram: np.ndarray


def _done(work: Path, number: int) -> Path:
    return work / "done" / f"{number:06d}.npz"


def _read_done(work: Path, number: int) -> Done:
    with np.load(_done(work, number)) as found:
        about = json.loads(found["about"].tobytes())
        shards = [Shard(**shard) for shard in about["shards"]]
        return Done(shards, found["rows"], about["rejected"], about["changes"], found["histogram"])


def _check_rejected(rejected: Sequence[dict[str, str]], max_rejected: int | float, plan: Plan) -> None:
    allowed = max_rejected if max_rejected >= 1 else int(max_rejected * len(plan))
    if len(rejected) > allowed:
        reasons = "; ".join(f"{line['path']}: {line['reason']}" for line in rejected[:3])
        raise ValueError(
            f"too many images are rejected: {len(rejected)} so far, and --max-rejected allows {allowed} of {len(plan)}. The first: "
            f"{reasons}. What is packed is kept; the same command with a higher --max-rejected goes on"
        )


def _merge(plan: Plan, out: Path, work: Path, splits: Sequence[str], max_rejected: int | float) -> None:
    """Makes datasets of packed shards. dataset.json comes last, that of the split after that of its holdout."""
    packed = [(shard.split, _read_done(work, number)) for number, shard in enumerate(plan.shards)]
    _check_rejected([line for _, done in packed for line in done.rejected], max_rejected, plan)
    with _scratch(work) as scratch:
        for split in splits:
            parts = [done for of, done in packed if of == split]
            (scratch / split).mkdir()
            rejected = [line for done in parts for line in done.rejected]
            with open(scratch / split / "rejected.jsonl", "w", encoding="utf-8") as file:
                file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in rejected)
            sync(scratch / split / "rejected.jsonl")
            shards = [shard for done in parts for shard in done.shards]
            rows = [done.rows for done in parts if done.shards]
            if not shards:
                raise ValueError(f"{out / split}: no image is left of {len(rejected)}; the first: {rejected[0]}")
            write_index(scratch / split, shards, rows, plan.classes, **_about(parts), made=plan.made)
        for split in splits:
            for name in ("rejected.jsonl", "classes.json", "index.npy"):
                os.replace(scratch / split / name, out / split / name)
        for split in reversed(splits):
            sync(out / split)
            os.replace(scratch / split / "dataset.json", out / split / "dataset.json")
            sync(out / split)


def _about(parts: Sequence[Done]) -> dict[str, Any]:
    """What dataset.json tells of a dataset's images: sizes in bytes and pixels; mean and standard deviation of red, green and blue, in
    units of full intensity, over the pixels that images.py counts; how many were changed while packing, and how; how many rejected."""
    rows = np.concatenate([done.rows for done in parts])
    histogram = np.sum([done.histogram for done in parts], axis=0)
    levels = np.arange(256) / 255
    mean = histogram @ levels / histogram.sum(axis=1)
    std = np.sqrt(histogram @ levels**2 / histogram.sum(axis=1) - mean**2)
    images: dict[str, Any] = {
        name: {
            "min": int(values.min()),
            "median": float(np.median(values)),
            "mean": round(float(values.mean()), 1),
            "max": int(values.max()),
        }
        for name, values in (("bytes", rows["size"]), ("width", rows["width"]), ("height", rows["height"]))
    }
    images |= {"mean": np.round(mean, 4).tolist(), "std": np.round(std, 4).tolist()}
    changes = sum((Counter(done.changes) for done in parts), Counter())
    return {"images": images, "changes": dict(sorted(changes.items())), "rejected": sum(len(done.rejected) for done in parts)}


@contextlib.contextmanager
def _scratch(work: Path) -> Iterator[Path]:
    """A folder of this process's own, gone afterwards."""
    (work / "scratch").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{socket.gethostname()}.{os.getpid()}.", dir=work / "scratch") as folder:
        yield Path(folder)


def _clear(work: Path) -> None:
    """Removes what processes of this machine left in scratch when they were killed."""
    for folder in (work / "scratch").glob("*"):
        machine, process, _ = folder.name.rsplit(".", 2)
        if machine == socket.gethostname():
            try:
                os.kill(int(process), 0)
            except ProcessLookupError:
                shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    """Waits while another process, here or on another machine, holds the same lock; a process that ends lets go of it."""
    with open(path, "w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say("another process lists the source; waiting for it")
            fcntl.lockf(file, fcntl.LOCK_EX)
        except OSError:  # a file system without locks: each process makes the plan, and that of the first counts
            pass
        yield


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
