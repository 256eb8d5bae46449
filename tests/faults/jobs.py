"""Whole training jobs on two ranks of this machine, each rank `python -m pretrain train` in a process forked from one that has imported
what takes seconds to import; one rank may be told to hit itself (points.py)."""

import atexit
import json
import multiprocessing
import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from launch.__main__ import free_port
from pretrain import checkpoint
from tests.faults.points import POINTS, Fault, inject
from tests.ranks import HEAVY

# All that has randomness or state in it is on: accumulation (2), drop path, mixup and cutmix (by default), the moving average. 32 images
# and a global batch of 8: 4 steps an epoch, so that the fifth step, which is hit, lies behind an epoch's end and before a second one's.
CONFIG = """
name: fault
seed: 5
global_batch: 8
epochs: 2
steps: 7
model: {name: van_b0, classes: 4, drop_path: 0.1}
data: {image_size: 32, lanes: 4, window: 16, decode_threads: 1, read_threads: 1}
optim: {lr: 1e-3, warmup_epochs: 0.5}
engine: {device: cpu, micro_batch: 2, ema_decay: 0.9}
run: {log_every: 1, save_every: 2, eval_every: 0.75, keep: 1}
"""
Change = Callable[[], None]
STEPS, RANKS = 7, 2
KINDS = ("weight", "exp_avg", "exp_avg_sq", "ema", "buffer", "buffer_ema")
PATIENCE_S, LEAVE_S = 240, 5


@dataclass(frozen=True)
class Ended:
    """How a job's ranks ended: exit codes (negative: killed by that signal), and whether it had to be ended, as a rank was stopped."""

    codes: list[int | None]
    stopped: bool


def start(
    folder: Path, dataset: Path, *overrides: str, fault: Fault | None = None, change: Change | None = None, job: str = "1"
) -> list[multiprocessing.Process]:
    """Starts a job whose run directory is `folder`/run; output goes to `folder`/log, appended.

    Args:
        change: is called in every rank's process before anything else, to switch something off.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "fault.yaml").write_text(CONFIG)
    arguments = [str(folder / "fault.yaml"), f"data.train={dataset / 'train'}", f"data.val={dataset / 'val'}", f"run.dir={folder / 'run'}"]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*HEAVY, "pretrain.train", "pretrain.van", "tests.faults.jobs"])
    shared = {"WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "SLURM_JOB_ID": job}
    processes = []
    for rank in range(RANKS):
        environment = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        own = fault if fault is not None and POINTS[fault.point].rank == rank else None
        processes.append(context.Process(target=_be_rank, args=(folder, [*arguments, *overrides], environment, own, change), daemon=True))
        processes[-1].start()
    return processes


def _be_rank(folder: Path, arguments: list[str], environment: dict[str, str], fault: Fault | None, change: Change | None) -> None:
    os.environ |= environment
    with (folder / "log").open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    if fault is not None:
        inject(fault)
    if change is not None:
        change()
    sys.argv = ["pretrain", "train", *arguments]
    from pretrain.__main__ import main

    try:
        sys.exit(main())
    finally:
        atexit._run_exitfuncs()  # multiprocessing's processes leave them out


def wait(processes: list[multiprocessing.Process]) -> Ended:
    """Waits as launch/ does: when a rank fails, the others have a moment to end. A job of which a rank is stopped is killed."""
    deadline = time.monotonic() + PATIENCE_S
    leave: float | None = None
    stopped = False
    while any(process.exitcode is None for process in processes):
        assert time.monotonic() < deadline, "the job did not end"
        if any(process.exitcode not in (None, 0, 85) for process in processes) and leave is None:
            leave = time.monotonic() + LEAVE_S
        if not stopped and any(_is_stopped(process) for process in processes):
            time.sleep(1)  # the others must not go on without it
            assert all(process.exitcode is None for process in processes)
            stopped, leave = True, time.monotonic()
        if leave is not None and time.monotonic() >= leave:
            kill(processes)
        time.sleep(0.02)
    return Ended([process.exitcode for process in processes], stopped)


def kill(processes: list[multiprocessing.Process]) -> None:
    for process in processes:
        process.kill()
        process.join()


def _is_stopped(process: multiprocessing.Process) -> bool:
    try:
        return process.exitcode is None and psutil.Process(process.pid).status() == psutil.STATUS_STOPPED
    except psutil.NoSuchProcess:
        return False


def run(folder: Path, dataset: Path, *overrides: str, fault: Fault | None = None, change: Change | None = None) -> Ended:
    return wait(start(folder, dataset, *overrides, fault=fault, change=change))


def log_of(folder: Path) -> str:
    return (folder / "log").read_text()


def resumed_steps(folder: Path) -> list[int]:
    """The steps at which the job's later starts went on."""
    return [int(step) for step in re.findall(r"resumed at step (\d+) of", log_of(folder))]


def reached(folder: Path) -> int:
    """The last step that was made."""
    return max(losses(folder), default=0)


def losses(folder: Path) -> dict[int, float]:
    """Of each step, the last time it was made."""
    path = folder / "run" / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {record["step"]: record["loss"] for record in records if record["kind"] == "train"}


def final_state(folder: Path) -> dict[str, torch.Tensor]:
    path = checkpoint.newest_whole(folder / "run" / "checkpoints", print)
    assert path is not None
    assert path.name == f"step-{STEPS:09d}"
    return checkpoint.read(path, KINDS)


def same_end(folder: Path, other: Path) -> bool:
    """Whether two jobs ended with the same bits of weights, optimizer and statistics, and saw the same losses at every step."""
    one, two = final_state(folder), final_state(other)
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one) and losses(folder) == losses(other)


def clear(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
