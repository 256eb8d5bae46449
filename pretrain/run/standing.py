"""How a run stands, by what lies in its directory and by what Slurm says: read by anyone, anywhere, without a word to the job itself.

    runs = read([Path("runs/van_b3_in22k")])      a Run each: what is there, as it is
    state, told = judge(run, time.time())         what that comes to, a function of it

Files may be half-written, of another version, or vanish meanwhile: what can't be read is passed over. Of metrics.jsonl only the end is
read. A live holder of the run's lock is told as pretrain/checkpoint/lock.py does it, but at one glance: on its own machine by its
process, elsewhere by when the file was last touched, for which this machine's clock has to agree with the file server's to some 50 s.
"""

import itertools
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from data.common.progress import duration
from pretrain.run import attempts
from pretrain.run.attempts import ATTEMPTS, FAILED, STOP, Attempt, End
from pretrain.run.directory import (
    CHECKPOINTS,
    CONFIG,
    METRICS,
    PATIENCE_S,
    TRAINER,
    list_checkpoints,
    list_locks,
    machine_id,
    process_start,
    step_of,
)

TAIL_BYTES = 256 << 10  # of metrics.jsonl; a record has some 400
SQUEUE_S = 10.0  # that Slurm may take to answer
State = Literal["not started", "queued", "starting", "training", "evaluating", "ending", "silent", "stopped", "failed", "complete"]
Record = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """A job in Slurm's queue. `start` is expected where it waits; None: not known."""

    state: str
    reason: str
    start: float | None


@dataclass(frozen=True)
class Holder:
    """Who has the run's lock. `here`: on this machine, so that `alive` is certain. Times in seconds since the epoch."""

    job: str | None
    process: str  # "process 4711 on node3"
    since: float | None
    here: bool
    alive: bool
    touched: float = field(compare=False)


@dataclass(frozen=True)
class Run:
    """What is known of a run; equal to what was known before where nothing but time has passed.

    Args:
        records: the last of each kind in the end of metrics.jsonl.
        position: the step that training has come to by the records.
        interval: seconds between records of steps; None: not known.
        total: steps of the whole training; None: not known yet.
        saved, saved_at: steps of the checkpoints, the oldest first, and when the newest was made.
        saving: the step that is being saved.
        job: None where Slurm does not have it, or where there is none to ask for or nobody to ask (`queue_known`).
        skipped: steps that changed nothing.
        bytes, free: of the checkpoints, and of their file system.
    """

    folder: Path
    records: dict[str, Record]
    position: int | None
    interval: float | None
    total: int | None
    saved: tuple[int, ...]
    saved_at: float | None
    saving: int | None
    attempts: tuple[Attempt, ...]
    starts: int
    holder: Holder | None
    job: Job | None
    queue_known: bool
    failed: str | None
    stop: bool
    bad_images: int
    skipped: int
    rollbacks: int
    bytes: int
    free: int = field(compare=False)

    @property
    def step(self) -> int | None:
        return self.position if self.position is not None else (self.saved[-1] if self.saved else None)

    @property
    def restarts(self) -> int:
        return max(0, (len(self.attempts) or self.starts) - 1)

    @property
    def job_id(self) -> str | None:
        return _job_id(self.attempts, self.holder)


# ---------------------------------------------------------------- reading


def is_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in (METRICS, CONFIG, CHECKPOINTS, ATTEMPTS, FAILED)) or bool(list_locks(folder))


def find(folder: Path) -> list[Path]:
    """The folder where it is a run directory, else all those below it."""
    try:
        if is_run(folder):
            return [folder]
        return [run for below in sorted(folder.iterdir()) if below.is_dir() and not below.is_symlink() for run in find(below)]
    except PermissionError:  # others' folders
        return []


def read(folders: Iterable[Path]) -> list[Run]:
    now = time.time()
    found = [(folder, tuple(attempts.read(folder)), _holder(folder, now)) for folder in folders]
    jobs = ask_slurm([job for _, tried, held in found if (job := _job_id(tried, held))])
    return [_read(folder, tried, held, jobs) for folder, tried, held in found]


def _read(folder: Path, tried: tuple[Attempt, ...], held: Holder | None, jobs: dict[str, Job] | None) -> Run:
    records = tail(folder / METRICS)
    last = {record["kind"]: record for record in records}
    moved = [record["step"] for record in records if record["kind"] in ("train", "rollback")]
    saved = list_checkpoints(folder / CHECKPOINTS)
    trainer = _part(_json(saved[-1] / TRAINER)) if saved else {}
    if "evaluation" not in last and (evaluation := _part(trainer.get("evaluation"))):
        last["evaluation"] = evaluation
    of_all = [_part(last.get("train")).get("total"), _part(trainer.get("identity")).get("steps")]
    saving = [int(name[1]) for path in (folder / CHECKPOINTS).glob(".partial-*") if (name := re.match(r"\.partial-step-(\d+)-", path.name))]
    job = _job_id(tried, held)
    bad = {record.get("step") for record in _lines(_bytes(folder / "bad_steps.jsonl")) if record.get("skipped") is True}
    return Run(
        folder=folder, records=last, position=moved[-1] if moved else None, interval=_interval(records),
        total=next((value for value in of_all if isinstance(value, int)), None),
        saved=tuple(map(step_of, saved)), saved_at=_modified(saved[-1]) if saved else None, saving=max(saving, default=None),
        attempts=tried, starts=len(list((folder / "starts").glob("[0-9]*"))), holder=held,
        job=jobs.get(job) if jobs is not None and job else None, queue_known=jobs is not None and job is not None,
        failed=_headline(folder / FAILED), stop=(folder / STOP).exists(),
        bad_images=len(_lines(_bytes(folder / "quarantine.jsonl"))), skipped=len(bad),
        rollbacks=len(_json(folder / "rollbacks.json") or ()), bytes=_size(folder / CHECKPOINTS), free=_free(folder),
    )  # fmt: skip


def tail(path: Path) -> list[Record]:
    """The last records in metrics.jsonl, the oldest first; each has kind, step and time."""
    try:
        with path.open("rb") as file:
            begin = max(0, os.fstat(file.fileno()).st_size - TAIL_BYTES)
            file.seek(begin)
            content = file.read()
    except OSError:
        return []
    records = _lines(content.split(b"\n", 1)[-1] if begin else content)
    return [
        record
        for record in records
        if isinstance(record.get("kind"), str) and isinstance(record.get("step"), int) and number(record, "time") is not None
    ]


def _part(value: Any) -> Record:
    return value if isinstance(value, dict) else {}


def number(record: Record, key: str) -> float | None:
    value = record.get(key)
    return value if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) else None


def _lines(content: bytes) -> list[Record]:
    """The objects in a file of one a line."""
    found = []
    for line in content.splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:  # half of one
            continue
    return [value for value in found if isinstance(value, dict)]


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _json(path: Path) -> Any:
    try:
        return json.loads(_bytes(path))
    except ValueError:
        return None


def _headline(path: Path) -> str | None:
    """The first line with text in it; None without the file."""
    if not path.exists():
        return None
    lines = (line.strip("# \t") for line in _bytes(path).decode(errors="replace").splitlines())
    return next(filter(None, lines), path.name)


def _modified(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def _size(folder: Path) -> int:
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(place, name)).st_size
            except OSError:  # pruned meanwhile
                continue
    return total


def _free(folder: Path) -> int:
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    try:
        return shutil.disk_usage(there).free
    except OSError:
        return 0


def _interval(records: Sequence[Record]) -> float | None:
    """Seconds that usually lie between two records of steps: the median, which a restart does not move."""
    times = [record["time"] for record in records if record["kind"] == "train"][-20:]
    return statistics.median(after - before for before, after in itertools.pairwise(times)) if len(times) > 1 else None


def _holder(folder: Path, now: float) -> Holder | None:
    for path in list_locks(folder)[-1:]:
        touched = _modified(path)
        found = _part(_json(path))
        if touched is None:  # released in this moment
            return None
        here = found.get("machine") == machine_id()
        alive = process_start(found.get("pid", 0)) == (found.get("started") or 0) if here else now - touched < PATIENCE_S
        job, since = found.get("job"), found.get("since")
        process = f"process {found.get('pid', '?')} on {found.get('host', '?')}"
        return Holder(job if isinstance(job, str) else None, process, _time(since, "%Y-%m-%d %H:%M:%S %z"), here, alive, touched)
    return None


def _time(text: Any, form: str) -> float | None:
    """Seconds since the epoch; without a zone in it a text means this machine's."""
    try:
        return datetime.strptime(text, form).timestamp()
    except (TypeError, ValueError):
        return None


def _job_id(tried: Sequence[Attempt], held: Holder | None) -> str | None:
    """The Slurm job whose turn it is or was last."""
    found = tried[-1].job if tried else held.job if held else None
    return found if found and re.fullmatch(r"\d+(_\d+)?", found) else None


def ask_slurm(jobs: Sequence[str]) -> dict[str, Job] | None:
    """Those of the jobs that are in Slurm's queue, by id; None where there is no squeue, or no answer."""
    if not jobs or shutil.which("squeue") is None:
        return None
    command = ["squeue", "--noheader", f"--jobs={','.join(sorted(set(jobs)))}", "--format=%i|%T|%r|%S"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SQUEUE_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode:  # a single id that it does not know is an error to it
        return {} if "Invalid job id" in done.stderr else None
    rows = [line.strip().split("|") for line in done.stdout.splitlines()]
    return {row[0]: Job(row[1], row[2], _time(row[3], "%Y-%m-%dT%H:%M:%S")) for row in rows if len(row) == 4}


# ---------------------------------------------------------------- judging


def judge(run: Run, now: float) -> tuple[State, str]:
    """What a run is doing, and what is to be said of that; "" where that is all."""
    held, job = run.holder, run.job
    last = run.attempts[-1] if run.attempts else None
    queued = job is not None and job.state in ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT")
    left_over = queued and held is not None and held.job == run.job_id  # of an attempt that Slurm has ended a moment ago
    if held is not None and not left_over and (held.alive or (not held.here and now - _sign(run) < _patience(run))):
        return _living(run, held, now)
    if queued:
        assert job is not None
        expected = f", expected to start {date(job.start)}" if job.start is not None and job.start > now else ""
        return "queued", f"job {run.job_id} {job.state} ({job.reason}){expected}"
    if run.total is not None and run.total in run.saved:
        return "complete", f"job {run.job_id} {job.state}" if job is not None else ""
    if job is not None:
        told = f"job {run.job_id} {job.state}"
        if last is not None and last.end is None and last.began > _sign(run):
            return "starting", told
        return ("silent", f"{_silence(run, now)}; {told}") if held is not None else ("ending", told)
    if last is not None and last.end is not None:
        return _ended(run, last.end)
    gone = f"job {run.job_id} is no longer in the queue and left no word: cancelled, or lost with its node"
    if run.failed is not None:
        return "failed", f"{run.failed}; see {run.folder / FAILED}"
    if run.queue_known and (held is not None or last is not None):
        return "failed", gone
    if held is not None and held.here:
        return "failed", f"{held.process} has ended without a word; the same command goes on from step {run.saved[-1] if run.saved else 0}"
    if held is not None or last is not None:
        return "silent", _silence(run, now)
    if run.step is not None:
        unsaved = run.step - (run.saved[-1] if run.saved else 0)
        return "stopped", f"the last {unsaved} steps are not saved" if unsaved > 0 else ""
    return "not started", "" if run.folder.exists() else "there is no such folder"


def _living(run: Run, held: Holder, now: float) -> tuple[State, str]:
    record = run.records.get("train")
    told = [f"saving step {run.saving}"] if run.saving is not None else []
    told += [f"{STOP} is there: it saves and ends"] if run.stop else []
    if record is None or (held.since is not None and record["time"] < held.since):
        return "starting", "; ".join([held.process, *told])
    evaluation = run.records.get("evaluation", {})
    if record.get("evaluates") is True and evaluation.get("step") != record["step"]:
        return "evaluating", "; ".join(told)
    age = now - record["time"]
    if run.interval is not None and age > _patience(run):
        told.insert(0, f"no record for {duration(age)}, where one comes every {duration(run.interval)}")
    return "training", "; ".join(told)


def _sign(run: Run) -> float:
    """When something was last heard from the job's processes."""
    signs = [number(record, "time") or 0.0 for record in run.records.values()]
    return max([*signs, run.holder.touched if run.holder else 0.0])


def _patience(run: Run) -> float:
    """Seconds without a record after which that is worth a word."""
    return max(PATIENCE_S, 3 * (run.interval or 0.0))


def _ended(run: Run, end: End) -> tuple[State, str]:
    if end.again and run.queue_known:
        return "stopped", f"{end.reason}; it was to go on, but job {run.job_id} is no longer in the queue"
    if end.again:
        return "queued", f"{end.reason}; it went back to the queue, and squeue can't be asked here"
    return "stopped" if end.outcome in ("complete", "stopped", "ended") else "failed", end.reason


def _silence(run: Run, now: float) -> str:
    began = [attempt.began for attempt in run.attempts[-1:]]
    return f"no sign of life for {duration(now - max([_sign(run), *began]))}"


def date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
