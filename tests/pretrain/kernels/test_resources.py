"""The kernels' machine code, compiled for GPUs that need not be there: nothing spills, and loads take 16 bytes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pretrain.kernels.tiling import REGISTERS
from tests.ranks import REPOSITORY

BENCHMARK = ("-m", "benchmarks.kernel_resources")


def run_compiling(folder: Path, *arguments: str) -> str:
    """Runs Python with Triton compiling, not interpreting as in the tests' own process; with an empty cache."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder / "cache")}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=REPOSITORY, check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def check(rows: list[dict[str, Any]], kernels: int) -> None:
    assert len(rows) == kernels
    for row in rows:
        assert row["spills"] == 0, row
        assert row["stack_bytes"] == 0, row
        assert row["registers"] <= REGISTERS[4 if row["type"] == "fp32" else 2], row
        assert row["atomics"] == 0, row
        # What the shortcut loads besides is one number for each pixel, of its image's dropped path.
        small = 1 if "shortcut" in row["layers"][0] and row["type"] == "bf16" else 0
        assert row["loads_128_bit"] == row["loads"] - small > 0, row
        if "weight gradient" not in row["layers"][0] and "shortcut" not in row["layers"][0]:
            assert row["shared_bytes"] == 0, row


@pytest.mark.slow
def test_nothing_spills_on_hopper(tmp_path: Path) -> None:
    out = tmp_path / "resources.json"
    run_compiling(tmp_path, *BENCHMARK, "--capability", "90", "--image-size", "224", "--out", str(out))
    check(json.loads(out.read_text())["rows"], kernels=26)


@pytest.mark.full
@pytest.mark.parametrize("capability", ["80", "90", "100"])
def test_nothing_spills_anywhere(tmp_path: Path, capability: str) -> None:
    out = tmp_path / "resources.json"
    run_compiling(tmp_path, *BENCHMARK, "--capability", capability, "--type", "bf16", "fp16", "fp32", "--out", str(out))
    check(json.loads(out.read_text())["rows"], kernels=120)


def test_spills_would_be_seen(tmp_path: Path) -> None:
    """The control: with a third of the registers there are some."""
    code = (
        "from benchmarks.kernel_resources import kernels, resources\n"
        "kernel = kernels('bf16')[0]\n"
        "kernel.options = kernel.options | {'maxnreg': 56}\n"
        "found = resources(kernel, 90)\n"
        "print(found['spills'] > 100 and found['stack_bytes'] > 0)\n"
    )
    assert run_compiling(tmp_path, "-c", code) == "True\n"
