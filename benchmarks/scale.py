"""Estimates the pretraining time of VAN-B3 to B6 on 8 to 512 GPUs: arithmetic only, nothing is measured.

    python -m benchmarks.scale [--stage 1]

A step takes the sum of its micro-steps, the gradient reduction that computation does not hide, the gradient norm, the update and the
all-gather of the weights. A micro-step takes as long as its images at RATES, but at least as long as the host needs to launch its kernels.
Bytes (pretrain/monitor/traffic.py) travel over rings through all GPUs, so the slowest link counts, and each collective also takes the hops
of its algorithm. Data loading, evaluation and checkpoints are not counted.
"""

import argparse
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import pretrain.model.van  # noqa: F401  registers the models
from benchmarks.harness import format_rows
from benchmarks.training import roofline
from pretrain import config as settings
from pretrain.engine.engine import choose_bucket_size
from pretrain.monitor.memory import activation_bytes, largest_that_fits
from pretrain.monitor.traffic import FP32, list_collectives

CONFIGS = Path(__file__).parents[1] / "configs"
VARIANTS = ("van_b3", "van_b4", "van_b5", "van_b6")
GPUS = (8, 16, 32, 64, 128, 256, 512)
IMAGES = 14_197_122  # in ImageNet-22K
CUTS = ("eager", "fused")  # one kernel per operator; as few kernels as possible
H200 = roofline.DEVICES["NVIDIA H200"]
MEMORY = 141e9  # bytes of an H200 (data sheet)
# Assumed of kernels: 85 % of the memory bandwidth, 70 % of the rate of large matrix products, 30 % of the fp32 peak.
ATTAINED = roofline.Device(0.85 * H200.bytes_per_s, 0.7 * H200.tensor_flops, 0.3 * H200.core_flops)
# Images per second at 224 px, for each of CUTS.
RATES = {name: [roofline.attainable(name, 224, cut, ATTAINED) for cut in (roofline.EAGER, roofline.FUSED)] for name in VARIANTS}
NODE = 8  # GPUs per node
NVLINK = 450e9  # bytes/s per GPU and direction (data sheet: 900 GB/s in both)
NETWORKS = {"400 Gb/s a GPU": NODE * 50e9, "100 Gb/s a node": 12.5e9}  # bytes/s per node and direction
# Assumed: a collective's share of the link bandwidth, seconds per hop, seconds per kernel launch.
SHARE, HOP, LAUNCH = 0.8, 5e-6, 5e-6
BACKWARD = 2 / 3  # the backward pass's share of a micro-step
UPDATE = 8 * FP32  # bytes per weight that the gradient norm and AdamW move: gradient twice, weight and moments in and out


@dataclass(frozen=True)
class Job:
    """A pretraining job: model, recipe and the numbers that determine its time."""

    name: str
    parameters: list[int]  # size of each
    channels: int  # of all BatchNorms
    bucket: int  # weights whose gradients are reduced at once
    launches: dict[str, int]  # kernels per micro-step, by cut
    sample: int  # bytes of an image's activations
    global_batch: int
    epochs: float

    @property
    def size(self) -> int:
        return sum(self.parameters)


@dataclass(frozen=True)
class Step:
    """An optimizer step, with its times in seconds."""

    gpus: int
    micro_batch: int
    accumulation: int
    compute: float  # all micro-steps
    reduction: float  # of gradients
    exposed: float  # part of the reduction that computation does not hide
    gather: float  # of weights
    update: float
    total: float
    launch_bound: bool


class _Operators(TorchDispatchMode):
    """Counts the operators that launch a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name.removeprefix("aten::")
        if not function.is_view and "::" not in name and "empty" not in name and name != "as_strided_":
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))


def launches(model: nn.Module) -> dict[str, int]:
    """Returns the kernels of a micro-step, counted on the meta device.

    eager: one per operator. A convolution has three gradients; autocast casts its weight and bias, and casts their gradients back.
    fused: three per convolution (forward, input gradient, weight gradient) and two per normalization.
    """
    with _Operators() as operators:
        logits = model(torch.empty(2, 3, 64, 64, device="meta"))
        F.cross_entropy(logits, torch.zeros(2, dtype=torch.long, device="meta")).backward()
    convolutions, norms = operators.counts["convolution"], operators.counts["native_batch_norm"]
    return {"eager": operators.counts.total() + 6 * convolutions, "fused": 3 * convolutions + 2 * norms}


def job(name: str) -> Job:
    """Returns the job of configs/NAME_in22k.yaml."""
    config = settings.load(CONFIGS / f"{name}_in22k.yaml", unchecked=("data.train", "data.val"))
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=config.model.classes, drop_path_rate=config.model.drop_path)
    return Job(
        name,
        parameters=[parameter.numel() for parameter in model.parameters()],
        channels=sum(norm.num_features for norm in model.modules() if isinstance(norm, nn.BatchNorm2d)),
        bucket=choose_bucket_size(model),
        launches=launches(model),
        sample=activation_bytes(model, config.data.image_size, "fp32", "cuda"),
        global_batch=config.global_batch,
        epochs=config.epochs,
    )


def largest_micro_batch(job: Job, gpus: int) -> int:
    """Returns the largest micro-batch that divides a GPU's share of the global batch and fits beside weights, moments and gradients.

    Activations count as fp32, which is more than they take under autocast. Raises ValueError if one image does not fit.
    """
    share = job.global_batch // gpus
    fits = largest_that_fits(4 * FP32 * job.size, job.sample, int(MEMORY), [size for size in range(1, share + 1) if share % size == 0])
    if fits is None:
        raise ValueError(f"{job.name} does not fit on {gpus} GPUs")
    return fits


def transfer(sent: float, hops: int, gpus: int, network: float) -> float:
    """Returns the seconds of a collective in which each GPU sends `sent` bytes; `network` is the bytes/s per node and direction."""
    return sent / (SHARE * (NVLINK if gpus <= NODE else min(NVLINK, network))) + hops * HOP


def hops(kind: str, gpus: int) -> int:
    """Returns the hops of NCCL's algorithm: up and down a tree for an all-reduce, around a ring for other collectives."""
    return 2 * math.ceil(math.log2(gpus)) if kind == "all-reduce" else gpus - 1


def step(job: Job, gpus: int, network: float, cut: str, stage: int = 1) -> Step:
    """Returns the times of a step in ZeRO stage 0, 1 or 2; `network` is the bytes/s per node and direction."""
    micro_batch = largest_micro_batch(job, gpus)
    accumulation = job.global_batch // gpus // micro_batch
    images, host = micro_batch / RATES[job.name][CUTS.index(cut)], job.launches[cut] * LAUNCH
    micro_step = max(images, host)
    parts = {part.content: part for part in list_collectives(job.parameters, job.channels, stage=stage, accumulation=accumulation)}
    passes, buckets = (accumulation if stage == 2 else 1), math.ceil(job.size / job.bucket)
    calls = {"gradients": passes * buckets, "weights": 2}  # two groups of parameters
    times = {name: transfer(part.sent(gpus), calls.get(name, 1) * hops(part.kind, gpus), gpus, network) for name, part in parts.items()}
    reduction = times["gradients"]
    # The last bucket is full only when the backward pass ends.
    exposed = max(reduction / buckets, reduction - passes * BACKWARD * micro_step)
    update = UPDATE * job.size / (gpus if stage else 1) / H200.bytes_per_s
    gather = times.get("weights", 0.0)
    total = accumulation * micro_step + exposed + times.get("norm", 0.0) + times["statistics"] + update + gather
    return Step(gpus, micro_batch, accumulation, accumulation * micro_step, reduction, exposed, gather, update, total, host > images)


def days(job: Job, step: Step) -> float:
    """Returns the days of the whole recipe."""
    return job.epochs * IMAGES / job.global_batch * step.total / 86400


def row(job: Job, gpus: int, network: float, cut: str, stage: int) -> dict[str, Any]:
    """Returns a row of the table; efficiency is relative to one node, `*` marks launch-bound steps."""
    estimate, base = step(job, gpus, network, cut, stage), step(job, NODE, network, cut, stage)
    total_days = days(job, estimate)
    return {
        "model": job.name.replace("van_b", "B"),
        "GPUs": gpus,
        "cut": cut,
        "ms": f"{estimate.total * 1e3:.0f}{'*' if estimate.launch_bound else ''}",
        "images/s": f"{job.global_batch / estimate.total:,.0f}",
        "efficiency": f"{base.total * base.gpus / (estimate.total * gpus):.0%}",
        "days": f"{total_days:.2f}",
        "GPU-hours": f"{total_days * 24 * gpus:,.0f}",
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--stage", type=int, choices=(0, 1, 2), default=1, help="of ZeRO (%(default)s)")
    stage = options.parse_args().stage
    jobs = [job(name) for name in VARIANTS]
    for one in jobs:
        print(f"{one.name}: {one.size / 1e6:.1f} M parameters, launches {one.launches}, at most {one.sample / 1e9:.2f} GB per image")
    for name, network in NETWORKS.items():
        print(f"\n{name}\n")
        print(format_rows([row(one, gpus, network, cut, stage) for one in jobs for cut in CUTS for gpus in GPUS]))


if __name__ == "__main__":
    main()
