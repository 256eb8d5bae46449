"""Runs a real training job in tests: its ranks, DALI, DeepSpeed, checkpoints; small, on the CPU of this machine."""

import json
import multiprocessing
from pathlib import Path
from typing import Any

from tests.support.ranks import Prepare, join, start_training

# Everything of the recipe that has randomness or state in it is on. 120 images and a global batch of 16: 7 steps an epoch.
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
    """Starts a job whose run directory is `folder`/run; output goes to `folder`/log, appended. For `prepare` see start_training."""
    config = folder / "small.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    config.write_text(SMALL)
    places = [f"data.train={dataset / 'train'}", f"data.val={dataset / 'val'}", f"run.dir={folder / 'run'}"]
    return start_training(ranks, folder / "log", [str(config), *places, *overrides], prepare=prepare)


def run(folder: Path, dataset: Path, *overrides: str, ranks: int, code: int = 0, prepare: Prepare | None = None) -> str:
    """Runs a job to its end, which must be with this exit code; returns its output."""
    before = len((folder / "log").read_text()) if (folder / "log").exists() else 0
    found = join(start(folder, dataset, *overrides, ranks=ranks, prepare=prepare)).first
    output = (folder / "log").read_text()[before:]
    assert found == code, f"exit code {found}, expected {code}:\n{output[-4000:]}"
    return output


def metrics(folder: Path, kind: str) -> list[dict[str, Any]]:
    records = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
    return [record for record in records if record["kind"] == kind]
