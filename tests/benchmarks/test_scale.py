"""The arithmetic of docs/performance.md's section on scale, against one case by hand, and against what must hold in any case."""

import dataclasses

import pytest
import timm
import torch

from benchmarks.scale import GPUS, LAUNCH, NETWORKS, NODE, Job, days, largest_micro_batch, launches, step
from pretrain.monitor.traffic import list_collectives

FAST, SLOW = NETWORKS.values()
# 80 M parameters, 320 MB; 8 buckets.
JOB = Job("van_b3", [10_000_000] * 8, 1000, 10_000_000, {"eager": 4000, "fused": 1000}, 300_000_000, 8192, 90.0)


def test_by_hand() -> None:
    """64 GPUs: 128 images each, which is one micro-batch, as 423 would fit."""
    found = step(JOB, 64, FAST, "eager")
    assert (found.micro_batch, found.accumulation, found.launch_bound) == (128, 1, False)
    assert found.compute == pytest.approx(128 / 2546, rel=1e-3)
    # 2 * 63/64 * 320 MB at 80 % of 400 GB/s, and 8 times 2 * 6 hops of 5 us.
    assert found.reduction == pytest.approx(2 * 63 / 64 * 320e6 / 320e9 + 8 * 12 * 5e-6)
    assert found.exposed == found.reduction / 8
    assert found.gather == pytest.approx(63 / 64 * 320e6 / 320e9 + 2 * 63 * 5e-6)
    assert found.update == pytest.approx(32 * 80e6 / 64 / 4.8e12)
    statistics = 2 * 63 / 64 * 8000 / 320e9 + 12 * 5e-6
    norm = 2 * 63 / 64 * 4 / 320e9 + 12 * 5e-6
    assert found.total == pytest.approx(found.compute + found.exposed + found.gather + found.update + statistics + norm)
    assert days(JOB, found) == pytest.approx(90 * 14_197_122 / 8192 * found.total / 86400)


def test_bytes_are_those_that_a_step_sends() -> None:
    """What is left of a step on a slow network, with hops and buckets taken out, is traffic.py's bytes over that link."""
    for stage in (0, 1, 2):
        slow, slower = (step(JOB, 16, network, "fused", stage) for network in (1e6, 0.5e6))
        sent = {part.content: part.sent(16) for part in list_collectives(JOB.parameters, 1000, stage=stage, accumulation=slow.accumulation)}
        assert slower.reduction - slow.reduction == pytest.approx(sent["gradients"] / 0.8e6, rel=1e-6)
        assert slower.gather - slow.gather == pytest.approx(sent.get("weights", 0) / 0.8e6, rel=1e-6)
        assert slower.total - slow.total == pytest.approx(sum(sent.values()) / 0.8e6, rel=1e-6)  # none of it can be hidden


@pytest.mark.parametrize("cut", ["eager", "fused"])
def test_what_must_hold(cut: str) -> None:
    for network in (FAST, SLOW):
        steps = [step(JOB, gpus, network, cut) for gpus in GPUS]
        assert all(one.micro_batch * one.accumulation * one.gpus == 8192 for one in steps)
        assert all(one.exposed <= one.reduction for one in steps)
        hours = [days(JOB, one) * one.gpus for one in steps]
        assert hours == sorted(hours)  # more GPUs never cost fewer GPU-hours
        for gpus, one in zip(GPUS, steps, strict=True):
            none, two = (step(JOB, gpus, network, cut, stage) for stage in (0, 2))
            assert two.total >= one.total  # it reduces in every micro-step
            assert (none.exposed, none.gather) == (one.exposed, 0)
        assert step(JOB, 128, SLOW, cut).total > step(JOB, 128, FAST, cut).total
        assert step(JOB, NODE, SLOW, cut) == step(JOB, NODE, FAST, cut)
    few = step(JOB, 512, FAST, cut)
    assert few.launch_bound
    assert few.compute == JOB.launches[cut] * LAUNCH


def test_memory_bounds_the_micro_batch() -> None:
    assert largest_micro_batch(JOB, 8) == 256  # of 1024; 512 would take 154 GB
    assert largest_micro_batch(dataclasses.replace(JOB, sample=10**9), 8) == 64
    with pytest.raises(ValueError, match="does not fit"):
        largest_micro_batch(dataclasses.replace(JOB, sample=10**12), 8)


def test_launches_are_counted() -> None:
    """Of a single convolution with BatchNorm, and of VAN-B0: 13 blocks of 8 convolutions and 2 norms, 4 patch embeddings of one each."""
    with torch.device("meta"):
        small = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
        van = timm.create_model("van_b0", num_classes=10)
    assert launches(small)["fused"] == 3 + 2
    assert launches(van)["fused"] == 3 * (13 * 8 + 4) + 2 * (13 * 2 + 4)
    assert launches(van)["eager"] > 6 * (13 * 8 + 4)
