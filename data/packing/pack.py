"""Packs images into a dataset of tar shards, in parallel. A packing can be stopped at any moment and resumed.

    python -m data pack SOURCE OUT                  OUT/train/NAME-train-000000.tar …, a dataset as index.py describes it
    python -m data pack SOURCE OUT --part 2/8       a part of the work, for several machines; the last to finish merges

    OUT/train.packing/plan/       which entry of the source goes into which shard (plan.py); written once, first
    OUT/train.packing/done/       one file per finished shard, with its index rows; its presence marks the shard as finished
    OUT/train.packing/scratch/    one folder per writing process
    OUT/train/                    the finished shards; last come index.npy, classes.json, rejected.jsonl, dataset.json

Every image is decoded once (images.py); an image that can't be used is rejected and listed in rejected.jsonl. A shard is the unit
of work. Its bytes depend on plan and source alone, so the result is the same for every process and every attempt. A shard is
written in scratch, synced, renamed to its final name, and then marked as finished. Merging makes the dataset's other files from
done/ and removes OUT/train.packing. Several processes may safely run the same step at the same time.
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
from data.packing.labels import escape_name, read_classes
from data.packing.plan import HOLDOUT_SPLIT, Plan, Settings, open_plan, write_plan
from data.packing.sources import recognize_source
from data.packing.workers import Run, start_workers

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
    """Packs a source (sources.py) into one folder per split in OUT, or resumes an earlier call.

    Args:
        settings: the settings of the result. Without classes, a split other than `train` takes those of OUT/train.
        max_rejected: the number of images or, below 1, the fraction of the files that may be rejected.
        workers: number of processes.
        part: (i, n) packs every n-th shard from the i-th.
        merge_only: pack nothing; make the dataset of the finished shards.

    Returns:
        The finished datasets: the split and, with a holdout, `val`. Empty while other parts are unfinished.

    Raises:
        ValueError: the source is not recognized, settings differ from those of the earlier call, too many images are rejected, or a
            read or write fails. Finished work is kept.
    """
    source = source.absolute()
    settings = _check_settings(source, out, settings)
    made = _describe_settings(source, settings)
    folder, work = out / settings.split, out / f"{settings.split}.packing"
    try:
        if _is_packed(folder):
            earlier = json.loads((folder / "dataset.json").read_text(encoding="utf-8")).get("made", {})
            _check_same(folder, earlier, made | {"versions": earlier.get("versions")}, f"remove {folder}")
            _log(f"{folder} is already packed")
        else:
            with start_workers(workers, preload=["webdataset"]) as run:
                plan = _open_or_write_plan(source, out, settings, made, run, is_new=not merge_only)
                _check_same(work, plan.made, made, f"remove {work} and {folder}")
                if not merge_only:
                    _pack_shards(plan, out, work, part, max_rejected, run)
            missing = sum(not _result_path(work, number).is_file() for number in range(len(plan.shards)))
            if not missing:
                _merge(plan, out, work, settings.splits, max_rejected)
            elif not _is_packed(folder):  # otherwise another process has merged and is removing the work folder
                if merge_only:
                    raise ValueError(f"{work}: {missing} of {len(plan.shards)} shards are not packed yet")
                _log(f"part {part[0]}/{part[1]} is packed; {missing} of {len(plan.shards)} shards remain for other parts")
                return []
    except FileNotFoundError:
        if not _is_packed(folder):  # otherwise another process has merged and removed the work folder
            raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ValueError(f"{out}: no space left. Packed shards are kept: make room and start the same command again") from error
        raise
    except MemoryError as error:
        raise ValueError("out of memory; fewer --workers need less. Packed shards are kept: start the same command again") from error
    finally:
        _remove_stale_scratch(work)
    shutil.rmtree(work, ignore_errors=True)
    return [open_index(out / split) for split in settings.splits]


def _check_settings(source: Path, out: Path, settings: Settings) -> Settings:
    """Checks the settings and returns them, with the classes of OUT/train if the split takes those."""
    if settings.holdout is not None and settings.split == HOLDOUT_SPLIT:
        raise ValueError(f"--holdout writes the split {HOLDOUT_SPLIT}; give another --split, or no --holdout")
    if out.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"{out} lies inside {source}; give an OUT elsewhere")
    if settings.classes is None and settings.split != "train":
        return replace(settings, classes=_read_train_classes(out))
    return settings


def _is_packed(folder: Path) -> bool:
    return (folder / "dataset.json").is_file()


def _describe_settings(source: Path, settings: Settings) -> dict[str, Any]:
    """Describes, for dataset.json, everything except the source's bytes that the dataset's bytes depend on."""
    classes, labels = settings.classes, settings.labels
    return {
        "command": "python -m data pack",
        "source": escape_name(str(source)),
        "labels": None if labels is None else escape_name(str(labels.absolute())),
        "classes": None if classes is None else f"{len(classes)}, xxh3_64 {xxhash.xxh3_64_hexdigest(json.dumps(classes).encode())}",
        **{name: getattr(settings, name) for name in ("split", "name", "shard_bytes", "seed", "holdout")},
        **asdict(settings.rules),
        "versions": {name: version(name) for name in ("pillow", "simplejpeg")},
    }


def _read_train_classes(out: Path) -> tuple[str, ...] | None:
    """Reads the classes of OUT/train, so that labels mean the same in all splits; returns None if there is no OUT/train."""
    if (out / "train" / "classes.json").is_file():
        return read_classes(out / "train")
    if (out / "train.packing").is_dir():
        raise ValueError(f"{out / 'train'}, whose classes this split takes, is not packed yet; wait for it, or give --classes")
    return None


def _check_same(folder: Path, earlier: dict[str, Any], made: dict[str, Any], restart: str) -> None:
    differences = [f"{name} {earlier.get(name)} instead of {value}" for name, value in made.items() if earlier.get(name) != value]
    if differences:
        raise ValueError(f"{folder} was made with other settings: {'; '.join(differences)}. Give those, or another OUT, or {restart}")


def create_empty_folder(out: Path) -> None:
    """Creates a folder; raises ValueError if it exists and is not empty."""
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()):
        raise ValueError(f"{out} is not empty; give another folder, or remove the files of an earlier packing")


def _open_or_write_plan(source: Path, out: Path, settings: Settings, made: dict[str, Any], run: Run, *, is_new: bool) -> Plan:
    """Opens the plan. With `is_new`, writes a missing plan, or waits for another process that is writing it."""
    work = out / f"{settings.split}.packing"
    open_plan.cache_clear()
    if (work / "plan").is_dir():
        return open_plan(work / "plan")
    if not is_new:
        raise ValueError(f"{out}: no shard of {settings.split} is packed yet")
    recognized = recognize_source(source, settings.labels)
    work.mkdir(parents=True, exist_ok=True)
    with _lock(work / "lock"), _make_scratch(work) as scratch:
        if not (work / "plan").is_dir():
            if _is_packed(out / settings.split):  # another process has merged since pack() checked
                raise FileNotFoundError(work / "plan")
            for split in settings.splits:
                create_empty_folder(out / split)
            sync(out)
            write_plan(scratch, recognized, settings, made, run)
            try:
                os.rename(scratch, work / "plan")
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):  # on a file system without locks, another process was faster
                    raise
            sync(work)
    return open_plan(work / "plan")


def _pack_shards(plan: Plan, out: Path, work: Path, part: tuple[int, int], max_rejected: int | float, run: Run) -> None:
    """Packs the unfinished shards of a part."""
    _remove_stale_scratch(work)
    (work / "done").mkdir(exist_ok=True)
    numbers = range(part[0], len(plan.shards), part[1])
    finished = [number for number in numbers if _result_path(work, number).is_file()]
    unfinished = sorted(set(numbers) - set(finished))
    rejected = [line for number in finished for line in _read_result(work, number).rejected]
    if finished:
        _log(f"{len(finished)} of {len(numbers)} shards are already packed")
    _check_rejected(rejected, max_rejected, plan)
    entries = sum(plan.shards[number].stop - plan.shards[number].start for number in unfinished)
    results = run(partial(pack_shard, out, work), unfinished)
    for shard_rejected, _ in report_progress(results, entries, f"packing {out}", weigh=lambda result: result[1]):
        rejected += shard_rejected
        _check_rejected(rejected, max_rejected, plan)


def pack_shard(out: Path, work: Path, number: int) -> tuple[list[dict[str, str]], int]:
    """Packs the plan's shard of this number.

    Returns the rejected entries, as lines of rejected.jsonl, and the shard's number of entries.
    """
    plan = open_plan(work / "plan")
    shard = plan.shards[number]
    rejected: list[dict[str, str]] = []
    changes: Counter[str] = Counter()
    histogram = np.zeros((3, 256), np.int64)

    def convert_entries() -> Iterator[Sample]:
        for entry in plan.order[shard.start : shard.stop].tolist():
            try:
                image = plan.convert(entry)
            except BadImage as error:
                rejected.append({"key": plan.read_key(entry), "path": plan.describe_path(entry), "reason": str(error)})
                continue
            if image.change:
                changes[image.change] += 1
            histogram[:] += image.histogram
            yield Sample(plan.read_key(entry), image.encoded, plan.read_label(entry), image.extension)

    samples = convert_entries()
    with _make_scratch(work) as scratch:
        written, rows = [], np.zeros(0, DTYPE)
        if first := next(samples, None):  # a shard without a usable image is not written
            path = out / shard.split / shard.file
            description, rows = write_shard(scratch / shard.file, itertools.chain([first], samples))
            written = [asdict(description)]
            for final in (path.with_suffix(".idx"), path):
                os.replace(scratch / final.name, final)
            sync(path.parent)
        about = {"shards": written, "rejected": rejected, "changes": changes}
        with open(scratch / "done.npz", "wb") as file:
            np.savez(file, rows=rows, histogram=histogram, about=np.frombuffer(json.dumps(about).encode(), np.uint8))
            publish(file, _result_path(work, number))
    return rejected, shard.stop - shard.start


@dataclass(frozen=True, eq=False)
class ShardResult:
    """The result of packing a shard. `shards` is empty if no image was usable; `histogram` is int64 (3, 256)."""

    shards: list[Shard]
    rows: np.ndarray
    rejected: list[dict[str, str]]
    changes: dict[str, int]
    histogram: np.ndarray


def _result_path(work: Path, number: int) -> Path:
    return work / "done" / f"{number:06d}.npz"


def _read_result(work: Path, number: int) -> ShardResult:
    with np.load(_result_path(work, number)) as arrays:
        about = json.loads(arrays["about"].tobytes())
        shards = [Shard(**shard) for shard in about["shards"]]
        return ShardResult(shards, arrays["rows"], about["rejected"], about["changes"], arrays["histogram"])


def _check_rejected(rejected: Sequence[dict[str, str]], max_rejected: int | float, plan: Plan) -> None:
    allowed = max_rejected if max_rejected >= 1 else int(max_rejected * len(plan))
    if len(rejected) > allowed:
        reasons = "; ".join(f"{line['path']}: {line['reason']}" for line in rejected[:3])
        raise ValueError(
            f"too many images are rejected: {len(rejected)} so far, and --max-rejected allows {allowed} of {len(plan)}. The first: "
            f"{reasons}. Packed shards are kept; resume with the same command and a higher --max-rejected"
        )


def _merge(plan: Plan, out: Path, work: Path, splits: Sequence[str], max_rejected: int | float) -> None:
    """Makes datasets of the packed shards. Each dataset.json is written last, the split's after its holdout's."""
    packed = [(shard.split, _read_result(work, number)) for number, shard in enumerate(plan.shards)]
    _check_rejected([line for _, result in packed for line in result.rejected], max_rejected, plan)
    with _make_scratch(work) as scratch:
        for split in splits:
            results = [result for result_split, result in packed if result_split == split]
            (scratch / split).mkdir()
            rejected = [line for result in results for line in result.rejected]
            with open(scratch / split / "rejected.jsonl", "w", encoding="utf-8") as file:
                file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in rejected)
            sync(scratch / split / "rejected.jsonl")
            shards = [shard for result in results for shard in result.shards]
            rows = [result.rows for result in results if result.shards]
            if not shards:
                raise ValueError(f"{out / split}: all {len(rejected)} images are rejected; the first: {rejected[0]}")
            write_index(scratch / split, shards, rows, plan.classes, **_summarize(results), made=plan.made)
        for split in splits:
            for name in ("rejected.jsonl", "classes.json", "index.npy"):
                os.replace(scratch / split / name, out / split / name)
        for split in reversed(splits):
            sync(out / split)
            os.replace(scratch / split / "dataset.json", out / split / "dataset.json")
            sync(out / split)


def _summarize(results: Sequence[ShardResult]) -> dict[str, Any]:
    """Summarizes a dataset's images for dataset.json.

    Returns sizes in bytes and pixels; mean and standard deviation of red, green and blue in units of full intensity, over the rows that
    the histograms count; the number of images by change; and the number of rejected images.
    """
    rows = np.concatenate([result.rows for result in results])
    histogram = np.sum([result.histogram for result in results], axis=0)
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
    changes = sum((Counter(result.changes) for result in results), Counter())
    return {"images": images, "changes": dict(sorted(changes.items())), "rejected": sum(len(result.rejected) for result in results)}


@contextlib.contextmanager
def _make_scratch(work: Path) -> Iterator[Path]:
    """Yields a folder for this process and removes it afterwards."""
    (work / "scratch").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{socket.gethostname()}.{os.getpid()}.", dir=work / "scratch") as folder:
        yield Path(folder)


def _remove_stale_scratch(work: Path) -> None:
    """Removes the scratch folders of killed processes of this machine."""
    for folder in (work / "scratch").glob("*"):
        machine, process, _ = folder.name.rsplit(".", 2)
        if machine == socket.gethostname():
            try:
                os.kill(int(process), 0)
            except ProcessLookupError:
                shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Holds a file lock, waiting for a process on any machine that holds it; the lock ends with its process."""
    with open(path, "w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _log("another process is listing the source; waiting for it")
            fcntl.lockf(file, fcntl.LOCK_EX)
        except OSError:  # a file system without locks: every process writes the plan, and the first rename wins
            pass
        yield


def _log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
