"""The use of a GPU by a job, without a GPU: whole jobs on one that computes nothing (tests/support/idle_gpu).

Its numbers mean nothing; what the host asks of the GPU does. No step waits for the device, in any function of PyTorch, DeepSpeed or this
project, unless a line of the log or a checkpoint is due.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import REPOSITORY, idle_gpu
from tests.support.jobs import SMALL

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (shutil.which("gcc") and shutil.which("nm")), reason="such a GPU is compiled, by gcc and binutils"),
]
DUE = {3, 5, 6}  # of seven steps: a line of the log, a checkpoint, the end


@pytest.fixture(scope="module")
def gpu(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return idle_gpu.build(tmp_path_factory.mktemp("idle_gpu"))


def job(folder: Path, drawn: Path, gpu: dict[str, str], *settings: str, **environment: str) -> tuple[list[dict[str, Any]], str]:
    """Returns the counts of each completed step, and the output of the job."""
    config = folder / "small.yaml"
    config.write_text(SMALL)
    places = [f"data.train={drawn / 'train'}", f"run.dir={folder / 'run'}"]
    given = ["engine.device=cuda", "engine.micro_batch=8", "epochs=1", "run.log_every=4", "run.save_every=6"]
    command = [sys.executable, "-m", "tests.support.gpu_job", str(config), *places, *given, *settings]
    ran = subprocess.run(command, env=os.environ | gpu | environment, capture_output=True, text=True, timeout=1200)
    lines = [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]
    return [line for line in lines if line.get("step", -1) >= 0], ran.stdout + ran.stderr


@pytest.mark.parametrize(
    "settings",
    [
        ["engine.zero_stage=0", "engine.precision=fp16", "optim.clip_grad=1"],
        ["engine.zero_stage=1", "model.graphs=true"],
        pytest.param(["engine.zero_stage=1", "model.kernels=triton"], marks=pytest.mark.full),  # compiles for half a minute
        pytest.param(["engine.zero_stage=1", "engine.sync_bn=true", "model.checkpoint_stages=[0,1]"], marks=pytest.mark.full),
    ],
    ids=" ".join,
)
def test_no_step_waits_for_the_device(tmp_path: Path, drawn: Path, gpu: dict[str, str], settings: list[str]) -> None:
    steps, output = job(tmp_path, drawn, gpu, *settings)
    waits = {line["step"]: line["waits"] for line in steps}
    assert {step: found for step, found in waits.items() if step > 0 and step not in DUE} == {1: {}, 2: {}, 4: {}}, output[-4000:]
    assert waits[3]["pretrain/monitor/interval.py:close"]  # a wait is seen where there is one
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all("launch_bound" in record for record in records if record["kind"] == "train")
    if "model.graphs=true" in settings:
        assert "graphs: 4 stages, forward and backward" in output
        assert max(line["launches"] for line in steps if line["step"] in (1, 2, 4)) < 400  # of two micro-steps: without, 3,672


STEPS = """
import torch
from types import SimpleNamespace
from tests.support.idle_gpu import IdleGpu
from pretrain.monitor.interval import Interval

gpu, device = IdleGpu(), torch.device("cuda", 0)
number = torch.zeros((), device=device)
interval = Interval(device, capacity=3, accumulation=2, detects_launch_bound=True)
for step, busy in enumerate((False, True, False)):
    gpu.set_busy(busy)
    interval.add(number)
    interval.add(number)
    interval.end_step(step, SimpleNamespace(norm=number, found_inf=number))
print(interval.launch_bound)
"""


def test_a_launch_bound_step_is_detected(gpu: dict[str, str]) -> None:
    """A step is not launch-bound if the GPU still has work when all of the step is launched."""
    ran = subprocess.run([sys.executable, "-c", STEPS], env=os.environ | gpu, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert ran.stdout == "[True, False, True]\n", ran.stderr


@pytest.mark.long
def test_out_of_memory_names_the_micro_batch_that_fits(tmp_path: Path, drawn: Path, gpu: dict[str, str]) -> None:
    wanted = ["data.image_size=224", "global_batch=64", "engine.micro_batch=64"]
    _, output = job(tmp_path, drawn, gpu, *wanted, IDLE_GPU_BYTES=str(3 << 30))
    assert "out of memory with engine.micro_batch=64: of 3.2 GB" in output
    assert "engine.micro_batch=32 should fit" in output
    _, output = job(tmp_path, drawn, gpu, *wanted, "engine.micro_batch=32", IDLE_GPU_BYTES=str(3 << 30))
    assert '"code": 0' in output
