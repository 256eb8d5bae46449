"""The kernels' machine code, compiled for GPUs that need not be there: nothing spills, and loads take 16 bytes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pretrain.model.fast.triton.tiling import REGISTERS
from tests.support import REPOSITORY

BENCHMARK = ("-m", "benchmarks.training.kernel_resources")


def run_compiling(folder: Path, *arguments: str) -> str:
    """Runs Python with Triton compiling, not interpreting as in the tests' own process; with an empty cache."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder / "cache")}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=REPOSITORY, check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def check(rows: list[dict[str, Any]], kernels: int) -> None:
    assert len(rows) == kernels
    for row in rows:
        convolution = row["kernel_size"] > 0
        assert row["spills"] == 0, row
        assert row["stack_bytes"] == 0, row
        assert row["registers"] <= REGISTERS[4 if row["type"] == "fp32" else 2], row
        assert row["atomics"] == 0, row
        assert row["loads_128_bit"] > 0, row
        # What a shortcut loads besides is one number for each pixel, of its image's dropped path.
        assert not convolution or row["loads_128_bit"] == row["loads"], row
        sums = row["part"] == "weight gradient" or (row["gelu"] and row["part"].startswith("input gradient"))
        assert row["shared_bytes"] == 0 or not convolution or sums, row


@pytest.mark.long
@pytest.mark.slow
def test_nothing_spills_on_hopper(tmp_path: Path) -> None:
    out = tmp_path / "resources.json"
    run_compiling(tmp_path, *BENCHMARK, "--model", "van_b3", "--capability", "90", "--out", str(out))
    check(json.loads(out.read_text())["rows"], kernels=4 * (3 + 3 + 3 + 4))


@pytest.mark.full
@pytest.mark.parametrize("activations", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("image_size", ["224", "384"])
def test_nothing_spills_anywhere(tmp_path: Path, activations: str, image_size: str) -> None:
    out = tmp_path / "resources.json"
    run_compiling(tmp_path, *BENCHMARK, "--type", activations, "--image-size", image_size, "--out", str(out))
    check(json.loads(out.read_text())["rows"], kernels=3 * 9 * (3 + 3 + 3 + 4))


@pytest.mark.long
@pytest.mark.slow
def test_spills_would_be_seen(tmp_path: Path) -> None:
    """The control: with a third of the registers there are some."""
    code = (
        "from benchmarks.training.kernel_resources import Layer, kernels, resources\n"
        "kernel = kernels(Layer(512, 56, 3, gelu='after'), 'bf16')[0]\n"
        "kernel.options = kernel.options | {'maxnreg': 56}\n"
        "found = resources(kernel, 90)\n"
        "print(found['spills'] > 100 and found['stack_bytes'] > 0)\n"
    )
    assert run_compiling(tmp_path, "-c", code) == "True\n"
