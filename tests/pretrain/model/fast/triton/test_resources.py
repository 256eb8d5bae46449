"""The machine code of the kernels, compiled for GPUs that need not be present: nothing spills, and loads take 16 bytes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pretrain.model.fast.triton.tiling import REGISTERS
from tests.support import REPOSITORY

MEASURE = """
import json
from tests.support.kernel_code import measure
print(json.dumps(list(measure({models}, {image_size}, [{activations!r}], {capabilities}))))
"""
KERNELS = 4 + 3 + 3  # of the 3x3, the 5x5 and the 7x7


def run_compiling(folder: Path, code: str) -> Any:
    """Runs code in a process where Triton compiles, with an empty cache; returns the JSON that the code prints."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder / "cache")}
    command = [sys.executable, "-c", code]
    return json.loads(subprocess.run(command, env=environment, cwd=REPOSITORY, check=True, stdout=subprocess.PIPE, text=True).stdout)


def check(rows: list[dict[str, Any]], count: int) -> None:
    assert len(rows) == count
    for row in rows:
        assert row["spills"] == 0, row
        assert row["stack_bytes"] == 0, row
        assert row["registers"] <= REGISTERS[4 if row["type"] == "fp32" else 2], row
        assert row["atomics"] == 0, row
        assert row["loads_128_bit"] > 0, row
        if row["size"]:  # a convolution; the residual add also loads a number for each pixel, of its image's dropped path
            assert row["loads_128_bit"] == row["loads"], row
            has_sums = "gradient" in row["kernel"] and not (row["kernel"].startswith("7x7 input") or row["kernel"].endswith("of GELU"))
            assert row["shared_bytes"] == 0 or has_sums, row


@pytest.mark.long
@pytest.mark.slow
def test_nothing_spills_on_hopper(tmp_path: Path) -> None:
    code = MEASURE.format(models=["van_b3"], image_size=224, activations="bf16", capabilities=[90])
    check(run_compiling(tmp_path, code), count=4 * KERNELS + 3)


@pytest.mark.full
@pytest.mark.parametrize("activations", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("image_size", [224, 384])
def test_nothing_spills_anywhere(tmp_path: Path, activations: str, image_size: int) -> None:
    models = ["van_b3", "van_b4", "van_b5", "van_b6"]
    code = MEASURE.format(models=models, image_size=image_size, activations=activations, capabilities=[80, 90, 100])
    check(run_compiling(tmp_path, code), count=3 * (9 * KERNELS + 3))


@pytest.mark.long
@pytest.mark.slow
def test_spills_are_counted(tmp_path: Path) -> None:
    """The control: with a third of the registers."""
    code = """
import json
from tests.support.kernel_code import Layer, kernels, resources
kernel = kernels(Layer(512, 56, 3, gelu="after"), "bf16")[0]
kernel.options = kernel.options | {"maxnreg": 56}
print(json.dumps(resources(kernel, 90)))
"""
    counted = run_compiling(tmp_path, code)
    assert counted["spills"] > 100
    assert counted["stack_bytes"] > 0
