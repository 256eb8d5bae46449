"""Runs whole training jobs on two ranks of this machine, one of which may send itself a signal (points.py)."""

import multiprocessing
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.faults.points import POINTS, Fault, inject
from tests.support.jobs import differing, final_state, metrics
from tests.support.ranks import Ended, join, start_training

# Every part with randomness or state is on: accumulation (2), drop path, mixup and cutmix (by default), the moving average. 32 images and a
# global batch of 8 make 4 steps an epoch, so the fifth step, which is hit, follows an epoch's end.
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


def start(
    folder: Path, dataset: Path, *overrides: str, fault: Fault | None = None, change: Change | None = None, job: str = "1"
) -> list[multiprocessing.Process]:
    """Starts a job in the run directory FOLDER/run; its output is appended to FOLDER/log. `change` runs first in every rank's process."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "fault.yaml").write_text(CONFIG)
    arguments = [str(folder / "fault.yaml"), f"data.train={dataset / 'train'}", f"data.val={dataset / 'val'}", f"run.dir={folder / 'run'}"]
    environment = {"SLURM_JOB_ID": job}
    return start_training(
        RANKS, folder / "log", [*arguments, *overrides], environment=environment, prepare=partial(_prepare, fault, change)
    )


def _prepare(fault: Fault | None, change: Change | None, rank: int) -> None:
    if fault is not None and POINTS[fault.point].rank == rank:
        inject(fault)
    if change is not None:
        change()


def run(folder: Path, dataset: Path, *overrides: str, fault: Fault | None = None, change: Change | None = None) -> Ended:
    return join(start(folder, dataset, *overrides, fault=fault, change=change))


def log_of(folder: Path) -> str:
    return (folder / "log").read_text()


def resumed_steps(folder: Path) -> list[int]:
    """Returns the steps at which the job's later starts resumed."""
    return [int(step) for step in re.findall(r"resumed at step (\d+) of", log_of(folder))]


def reached(folder: Path) -> int:
    """Returns the last step that was made."""
    return max(losses(folder), default=0)


def losses(folder: Path) -> dict[int, float]:
    """Returns the loss of each step, from the last time that it was made."""
    return {record["step"]: record["loss"] for record in metrics(folder, "train")} if (folder / "run" / "metrics.jsonl").exists() else {}


def same_end(folder: Path, other: Path) -> bool:
    """Returns whether two jobs ended with the same bits of weights, optimizer and statistics, and the same losses at every step."""
    return not differing(final_state(folder, STEPS), final_state(other, STEPS)) and losses(folder) == losses(other)
