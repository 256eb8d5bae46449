"""The benchmark of layers; Triton's kernels run in the interpreter, on maps of a few pixels."""

import json

import pytest
import torch
from triton import knobs

from benchmarks.training import layers
from benchmarks.training.__main__ import main
from benchmarks.training.layers import Layer, Part

DEVICE = torch.device("cpu" if knobs.runtime.interpret else "cuda")


def test_layers_are_those_of_the_model() -> None:
    found = layers.layers("van_b3", 224)
    assert len(found) == 4 * 4
    assert found[:4] == [
        Layer(64, 56, 5, gelu="before", count=3), Layer(64, 56, 7, 3, count=3), Layer(512, 56, 3, gelu="after", count=3),
        Layer(64, 56, 0, count=6),
    ]  # fmt: skip
    assert sum(layer.count for layer in found if layer.kernel_size) == 3 * 38
    assert [layer.size for layer in layers.layers("van_b6", 200)[::4]] == [50, 25, 13, 7]


def test_every_part_is_timed_and_agrees() -> None:
    chosen = [Layer(8, 5, 7, 3), Layer(8, 4, 3, gelu="after"), Layer(8, 4, 5, gelu="before"), Layer(8, 4, 0)]
    copy, rows = json.loads(json.dumps(layers.measure(chosen, 2, torch.float32, DEVICE)))
    parts = [[row["part"] for row in rows if row["layer"] == str(layer)] for layer in chosen]
    assert parts == [
        ["forward", "weight gradient", "input gradient"],
        ["forward", "weight gradient", "input gradient", "forward, GELU"],
        ["forward", "weight gradient", "input gradient, GELU's", "gate's gradients"],
        ["forward", "backward"],
    ]
    for row in rows:
        assert row["difference"] < 1e-5
        for case in ("triton", "pytorch_nhwc", *([] if row["layer"].startswith("residual") else ["pytorch_nchw"])):
            times = row[f"{case}_ms"]
            assert 0 < times["tenth"] <= times["median"] <= times["ninetieth"]
            assert row[f"{case}_share_of_copy"] == pytest.approx(row["map_bytes"] / times["median"] * 1000 / copy)
    assert rows[0]["map_bytes"] == 2 * (2 * 8 * 5 * 5) * 4


def test_difference_shows_a_wrong_result() -> None:
    right = torch.ones(4)
    wrong = torch.tensor([1.0, 1.0, 1.5, 1.0])
    assert layers.difference(Part("", 0, {"triton": lambda: wrong, "pytorch_nhwc": lambda: right})) == 0.5


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_benchmark_without_a_gpu_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--gpu", "--batch", "2"]) == 2
    assert capsys.readouterr().err == "error: --gpu can't run here: the device is cpu\n"
