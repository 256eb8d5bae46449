"""The demo's last step, which loads exported weights in a process of its own. (The whole demo takes minutes: `make demo`.)"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from examples.demo import LOAD
from pretrain.weights.export import export

pytestmark = pytest.mark.slow


def test_exports_are_loaded_and_compared_with_the_run(runs: Path, tmp_path: Path) -> None:
    folder, file = tmp_path / "timm", tmp_path / "van.pth"
    export(runs / "averaged", "timm", folder, average=True)
    export(runs / "averaged", "official", file, average=True)
    command = [sys.executable, "-c", LOAD, folder, file, runs / "averaged"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "equal logits (to 1e-5) from the run, the timm folder and the authors' format" in done.stdout

    contents = torch.load(file)
    contents["state_dict"]["head.bias"][3] += 1e-3
    torch.save(contents, file)
    damaged = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert damaged.returncode == 1
    assert "not close" in damaged.stderr
