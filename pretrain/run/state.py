"""Determines the state of runs from the files in their directories and from Slurm's queue, without contacting the jobs.

    for run in read([Path("runs/van_b3_in22k")]): state, remark = state_of(run, time.time())

Files may be half-written, of another version, or vanish during the read: what can't be read is skipped. The holder of a run's lock is alive
if its process exists. A holder on another machine is alive if it has recently touched the lock or written a record; this requires that the
clocks of this machine and of the file server agree within about 50 s.
"""

import itertools
import json
import math
import os
import re
import shutil
import statistics
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, TypeVar

from data.common.text import format_duration
from pretrain.run import attempts, directory
from pretrain.run.attempts import ATTEMPTS, STOP, Attempt
from pretrain.run.directory import CHECKPOINTS, METRICS, PATIENCE_S, step_of

TAIL_BYTES = 256 << 10  # read from the end of metrics.jsonl; a record has about 400
SQUEUE_TIMEOUT_S = 10.0
QUEUED = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT")  # Slurm's names for a job that waits
State = Literal["waiting", "running", "stalled", "stopped", "failed", "complete"]
Record = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class Holder:
    """Describes the process that holds the run's lock. Times are in seconds since the epoch."""

    job: str | None
    process: str  # "process 4711 on node3"
    since: float | None
    exists: bool | None  # None: on another machine
    touched: float = field(compare=False)  # the lock


@dataclass(frozen=True)
class Run:
    """Describes a run by its files and Slurm's queue. Two values are equal if only time has passed between them."""

    folder: Path
    records: dict[str, Record]  # the newest of each kind near the end of metrics.jsonl
    step: int | None
    interval: float | None  # seconds between two records of steps
    total: int | None  # steps of the whole training
    saved: tuple[int, ...]  # steps of the checkpoints, oldest first
    is_saving: bool
    attempts: tuple[Attempt, ...]
    restarts: int
    holder: Holder | None
    job_id: str | None  # Slurm job of the newest attempt, or of the lock's holder if no attempt is recorded
    should_stop: bool  # STOP exists
    bad_images: int
    skipped: int  # steps without an update
    size: int  # bytes of all checkpoints
    free: int | None = field(compare=False)  # bytes of their file system
    job: str | None = None  # state of the job in Slurm's queue, as in `ask_slurm`; None: not in the queue, or unknown
    is_queue_known: bool = False

    @property
    def last_sign(self) -> float:
        """Returns when the job's processes last touched the lock or wrote a record; 0 if never."""
        return max([record["time"] for record in self.records.values()] + [self.holder.touched if self.holder else 0.0])

    @property
    def patience(self) -> float:
        """Returns the seconds without a record after which a run counts as stalled."""
        return max(PATIENCE_S, 3 * (self.interval or 0.0))


# ---------------------------------------------------------------- read


def find_runs(folder: Path) -> list[Path]:
    """Returns `folder` if it is a run directory, otherwise all run directories below it."""
    try:
        names = (METRICS, directory.CONFIG, CHECKPOINTS, ATTEMPTS)
        if any((folder / name).exists() for name in names) or directory.list_locks(folder):
            return [folder]
        return [run for below in sorted(folder.iterdir()) if below.is_dir() and not below.is_symlink() for run in find_runs(below)]
    except PermissionError:
        return []


def read(folders: Sequence[Path]) -> list[Run]:
    runs = [read_run(folder) for folder in folders]
    jobs = ask_slurm([run.job_id for run in runs if run.job_id])
    return [with_queue(run, jobs) for run in runs]


def with_queue(run: Run, jobs: dict[str, str] | None) -> Run:
    """Returns a run with its job's state in Slurm's queue; `jobs` is the result of `ask_slurm`."""
    if jobs is None or run.job_id is None:
        return run
    return replace(run, job=jobs.get(run.job_id), is_queue_known=True)


def ask_slurm(jobs: Sequence[str]) -> dict[str, str] | None:
    """Returns the states of the jobs in Slurm's queue, by id: `RUNNING`, or `PENDING (Priority), expected to start TIME`.

    Returns None if squeue does not exist or does not answer.
    """
    if not jobs or shutil.which("squeue") is None:
        return None
    command = ["squeue", "--noheader", f"--jobs={','.join(sorted(set(jobs)))}", "--format=%i|%T|%r|%S"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=SQUEUE_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if result.returncode:  # squeue reports a single unknown id as an error
        return {} if "Invalid job id" in result.stderr else None
    states = {}
    for line in result.stdout.splitlines():
        job, state, reason, start = line.strip().split("|")
        states[job] = state
        if state in QUEUED:
            states[job] += f" ({reason})" + (f", expected to start {start}" if start != "N/A" else "")
    return states


def read_run(folder: Path) -> Run:
    """Reads a run directory, which need not exist."""
    checkpoints = directory.list_checkpoints(folder / CHECKPOINTS)
    saved = tuple(map(step_of, checkpoints))
    history = read_records(folder / METRICS)
    records = {record["kind"]: record for record in history}
    steps = [record["step"] for record in history if record["kind"] in ("train", "rollback")]
    times = [record["time"] for record in history if record["kind"] == "train"][-20:]
    total = get_number(records.get("train", {}), "total")
    tried, holder = tuple(attempts.read(folder)), _read_holder(folder)
    starts = len(tried) or len(list((folder / "starts").glob("[0-9]*")))
    job_id = tried[-1].job if tried else holder.job if holder else None
    return Run(
        folder=folder, records=records, total=int(total) if total else None, saved=saved,
        step=steps[-1] if steps else (saved[-1] if saved else None), is_saving=any((folder / CHECKPOINTS).glob(".partial-*")),
        # The median, which a restart between two records does not affect.
        interval=statistics.median(after - before for before, after in itertools.pairwise(times)) if len(times) > 1 else None,
        attempts=tried, restarts=max(0, starts - 1), holder=holder,
        job_id=job_id if job_id and re.fullmatch(r"\d+(_\d+)?", job_id) else None,
        should_stop=(folder / STOP).exists(), bad_images=len(_read_json_lines(folder / "quarantine.jsonl")),
        skipped=len({line.get("step") for line in _read_json_lines(folder / "bad_steps.jsonl") if line.get("skipped") is True}),
        size=sum(map(_size, checkpoints)),
        free=_or_default(lambda: shutil.disk_usage(folder).free, None),
    )  # fmt: skip


def _or_default(read: Callable[[], T], default: T) -> T:
    """Returns the result of `read`, or `default` for files that vanish or can't be read."""
    try:
        return read()
    except OSError:
        return default


def _size(folder: Path) -> int:
    return _or_default(lambda: sum(entry.stat().st_size for entry in os.scandir(folder)), 0)


def _read_holder(folder: Path) -> Holder | None:
    if not (locks := directory.list_locks(folder)):
        return None
    lock = next(iter(_read_json_lines(locks[-1])), {})
    touched = _or_default(lambda: locks[-1].stat().st_mtime, None)
    if touched is None:  # released a moment ago
        return None
    is_local = lock.get("machine") == directory.machine_id()
    exists = directory.process_start(lock.get("pid", 0)) == (lock.get("started") or 0) if is_local else None
    try:
        since = datetime.strptime(lock.get("since"), "%Y-%m-%d %H:%M:%S %z").timestamp()  # type: ignore[arg-type]
    except (TypeError, ValueError):
        since = None
    job, process = lock.get("job"), f"process {lock.get('pid', '?')} on {lock.get('host', '?')}"
    return Holder(job if isinstance(job, str) else None, process, since, exists, touched)


def read_records(path: Path) -> list[Record]:
    """Returns the last records of metrics.jsonl, oldest first; each has a kind, a step and a time."""
    return [
        record
        for record in _read_json_lines(path, TAIL_BYTES)
        if isinstance(record.get("kind"), str) and isinstance(record.get("step"), int) and get_number(record, "time") is not None
    ]


def get_number(record: Record, key: str) -> float | None:
    value = record.get(key)
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def _read_json_lines(path: Path, last_bytes: int | None = None) -> list[Record]:
    """Returns the objects in a file with one JSON object per line; skips incomplete and other lines."""
    values = []
    try:
        with path.open("rb") as file:
            if last_bytes is not None:
                file.seek(max(0, os.fstat(file.fileno()).st_size - last_bytes))
            lines = file.read().splitlines()
    except OSError:
        return []
    for line in lines:
        try:
            values.append(json.loads(line))
        except ValueError:
            continue
    return [value for value in values if isinstance(value, dict)]


# ---------------------------------------------------------------- decide


def state_of(run: Run, now: float) -> tuple[State, str]:
    """Returns a run's state and a remark that explains it, which may be empty."""
    holder, job, last = run.holder, run.job, run.attempts[-1] if run.attempts else None
    is_queued = job is not None and job.startswith(QUEUED)
    if holder is not None and not (is_queued and holder.job == run.job_id):  # the lock of a queued job is that of its last attempt
        is_alive = now - run.last_sign < run.patience if holder.exists is None else holder.exists
        if is_alive:
            return _state_of_process(run, holder, now)
    if is_queued:
        return "waiting", f"job {run.job_id} {job}"
    if run.total in run.saved:
        return "complete", f"job {run.job_id} {job}" if job is not None else ""
    if job is not None:
        is_new = last is not None and last.end is None and last.began > run.last_sign
        if holder is None or is_new:
            return "running", f"job {run.job_id} {job}"
        return "stalled", f"{_silence(run, now)}; job {run.job_id} {job}"
    return _state_at_rest(run, now)


def _state_of_process(run: Run, holder: Holder, now: float) -> tuple[State, str]:
    """Returns the state of a run whose lock is held by a live process."""
    record, evaluation = run.records.get("train"), run.records.get("evaluation", {})
    remarks = ["saving a checkpoint"] if run.is_saving else []
    remarks += [f"{STOP} exists: the job saves and ends"] if run.should_stop else []
    if record is None or (holder.since is not None and record["time"] < holder.since):
        remarks.insert(0, f"starting, {holder.process}")
    elif record.get("evaluates") is True and evaluation.get("step") != record["step"]:
        remarks.insert(0, "evaluating")
    elif not run.is_saving and run.interval is not None and now - record["time"] > run.patience:
        remarks.insert(0, f"no record for {format_duration(now - record['time'])}, expected every {format_duration(run.interval)}")
        return "stalled", "; ".join(remarks)
    return "running", "; ".join(remarks)


def _state_at_rest(run: Run, now: float) -> tuple[State, str]:
    """Returns the state of an incomplete run without a live process or a job in the queue."""
    last, holder, saved = run.attempts[-1] if run.attempts else None, run.holder, run.saved[-1] if run.saved else 0
    if last is not None and last.end is not None:
        if last.end.again and not run.is_queue_known:
            return "waiting", f"{last.end.reason}; the job was requeued (squeue is not available here)"
        if last.end.again:
            return "stopped", f"{last.end.reason}; the job was requeued, but job {run.job_id} is no longer in the queue"
        return "stopped" if last.end.outcome in ("complete", "stopped", "ended") else "failed", last.end.reason
    if last is None and holder is None:
        if run.step is None:
            return "waiting", "no step yet" if run.folder.exists() else "no such folder yet"
        return "stopped", f"the last {run.step - saved} steps are not saved" if run.step > saved else ""
    if run.is_queue_known:
        return "failed", f"job {run.job_id} is no longer in the queue and did not report its end: canceled, or lost with its node"
    if holder is not None and holder.exists is False:
        return "failed", f"{holder.process} has ended without a message; the same command resumes at step {saved}"
    return "stalled", _silence(run, now)


def _silence(run: Run, now: float) -> str:
    began = [attempt.began for attempt in run.attempts[-1:]]
    return f"no sign of life for {format_duration(now - max([run.last_sign, *began]))}"
