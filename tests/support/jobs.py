"""Runs a small training job on the CPU of this machine, with DALI, DeepSpeed and checkpoints."""

import json
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pretrain import checkpoint
from tests.support.ranks import Prepare, join, start_training

# Every part of a recipe that has randomness or state is on. 120 images and a global batch of 16 make 7 steps an epoch.
SMALL = """
name: small
seed: 5
global_batch: 16
epochs: 3
model: {name: van_b0, classes: 10, drop_path: 0.1}
data: {image_size: 32, lanes: 4, window: 16, decode_threads: 1, read_threads: 1}
optim: {lr: 1e-3, warmup_epochs: 0.5}
engine: {device: cpu, micro_batch: 4, ema_decay: 0.9}
run: {log_every: 1, save_every: 4}
"""


def start(folder: Path, dataset: Path, *overrides: str, ranks: int, prepare: Prepare | None = None) -> list[multiprocessing.Process]:
    """Starts a job in the run directory FOLDER/run; its output is appended to FOLDER/log. `prepare` is that of start_training."""
    config = folder / "small.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    config.write_text(SMALL)
    places = [f"data.train={dataset / 'train'}", f"data.val={dataset / 'val'}", f"run.dir={folder / 'run'}"]
    return start_training(ranks, folder / "log", [str(config), *places, *overrides], prepare=prepare)


def run(folder: Path, dataset: Path, *overrides: str, ranks: int, code: int = 0, prepare: Prepare | None = None) -> str:
    """Runs a job to its end; returns its output. Raises AssertionError for another exit code than `code`."""
    before = len((folder / "log").read_text()) if (folder / "log").exists() else 0
    exit_code = join(start(folder, dataset, *overrides, ranks=ranks, prepare=prepare)).first
    output = (folder / "log").read_text()[before:]
    assert exit_code == code, f"exit code {exit_code}, expected {code}:\n{output[-4000:]}"
    return output


def wait_until(happened: Callable[[], bool], job: list[multiprocessing.Process], folder: Path) -> None:
    """Waits until something has happened; raises AssertionError if a rank of the job ends before."""
    deadline = time.monotonic() + 200
    while not happened():
        assert all(rank.exitcode is None for rank in job), (folder / "log").read_text()[-4000:]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def final_state(folder: Path, steps: int) -> dict[str, torch.Tensor]:
    """Returns the state in the newest checkpoint of `folder`/run, which must be of this step."""
    path = checkpoint.find_newest_whole(folder / "run" / "checkpoints", print)
    assert path is not None
    assert path.name == f"step-{steps:09d}"
    return checkpoint.read_tensors(path, ("weight", "exp_avg", "exp_avg_sq", "ema", "buffer", "buffer_ema"))


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    """Returns the names of the tensors that differ in any bit."""
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


def metrics(folder: Path, kind: str) -> list[dict[str, Any]]:
    records = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
    return [record for record in records if record["kind"] == kind]
