"""How long VAN-B3 to B6 would take to pretrain on 8 to 512 GPUs, by arithmetic: nothing here is measured.

    python -m benchmarks.scale          # tables for docs/performance.md, docs/scale.svg and benchmarks/results/scale.json

A step is its micro-steps, the reduction of gradients as far as the last micro-step's backward pass does not cover it, and what follows:
norm, update, gathering of weights. What a micro-step computes takes as long as its images do at RATES, but no less than the host needs to
launch its kernels. What ranks send is pretrain/monitor/traffic.py's; it goes over rings through all GPUs, of which the slowest link
counts, and each collective takes its algorithm's hops besides. Data loading, evaluations and saves are not counted.
"""

import argparse
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import pretrain.model.van  # noqa: F401  registers the models
from benchmarks.training import roofline
from data.common.results import record_result
from pretrain import config as settings
from pretrain.engine.engine import bucket_size
from pretrain.monitor.memory import activation_bytes, largest_that_fits
from pretrain.monitor.traffic import FP32, communication

ROOT = Path(__file__).parent.parent
RESULT, PLOT = ROOT / "benchmarks" / "results" / "scale.json", ROOT / "docs" / "scale.svg"
VARIANTS = ("van_b3", "van_b4", "van_b5", "van_b6")
GPUS = (8, 16, 32, 64, 128, 256, 512)
IMAGES = 14_197_122  # of ImageNet-22K
CUTS = ("eager", "fused")  # one kernel an operator, and all that could be fused is
H200 = roofline.DEVICES["NVIDIA H200"]
MEMORY = 141e9  # bytes of it (data sheet)
# What kernels are assumed to get out of it: 85 % of its memory's rate, 70 % of large matrix products', 30 % of its fp32 lanes'.
ATTAINED = roofline.Device(0.85 * H200.bytes_per_s, 0.7 * H200.tensor_flops, 0.3 * H200.core_flops)
# Images a second at 224 px in either cut.
RATES = {name: [roofline.attainable(name, 224, cut, ATTAINED) for cut in (roofline.EAGER, roofline.FUSED)] for name in VARIANTS}
NODE = 8  # GPUs
NVLINK = 450e9  # bytes/s of a GPU in each direction (data sheet: 900 GB/s in both)
NETWORKS = {"400 Gb/s a GPU": NODE * 50e9, "100 Gb/s a node": 12.5e9}  # bytes/s of a node in each direction
# Assumptions, from no measurement of ours: the share of a link that a collective gets, seconds for a hop, and to launch a kernel.
SHARE, HOP, LAUNCH = 0.8, 5e-6, 5e-6
BACKWARD = 2 / 3  # of a micro-step
UPDATE = 8 * FP32  # bytes that the norm and AdamW move for a weight: its gradient twice, weight and moments in and out


@dataclass(frozen=True)
class Job:
    """A variant's recipe. `launches`: kernels of a micro-step, by cut; `sample`: bytes that an image keeps for the backward pass."""

    name: str
    parameters: list[int]
    channels: int
    bucket: int
    launches: dict[str, int]
    sample: int
    global_batch: int
    epochs: float

    @property
    def size(self) -> int:
        return sum(self.parameters)


@dataclass(frozen=True)
class Step:
    """Of one optimizer step. Times in s: `compute` of all micro-steps, `reduction` of gradients, of which `exposed` is beside no
    computation, `gather` of weights, `update`."""

    gpus: int
    micro_batch: int
    accumulation: int
    compute: float
    reduction: float
    exposed: float
    gather: float
    update: float
    total: float
    launch_bound: bool


class _Operators(TorchDispatchMode):
    """Counts operators that compute something."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name.removeprefix("aten::")
        if not function.is_view and "::" not in name and "empty" not in name and name != "as_strided_":
            self.found[name] += 1
        return function(*args, **(kwargs or {}))


def launches(model: nn.Module) -> dict[str, int]:
    """Kernels of a micro-step, on the meta device.

    eager: an operator each; a convolution's gradients are three, and under autocast its weight and bias are cast, and their gradients back.
    fused: three for each convolution (forward, gradients of input and weight) and two for each norm.
    """
    with _Operators() as operators:
        logits = model(torch.empty(2, 3, 64, 64, device="meta"))
        F.cross_entropy(logits, torch.zeros(2, dtype=torch.long, device="meta")).backward()
    convolutions, norms = operators.found["convolution"], operators.found["native_batch_norm"]
    return {"eager": operators.found.total() + 6 * convolutions, "fused": 3 * convolutions + 2 * norms}


def job(name: str) -> Job:
    """By configs/NAME_in22k.yaml."""
    config = settings.load(ROOT / "configs" / f"{name}_in22k.yaml", unused=("data.train", "data.val"))
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=config.model.classes, drop_path_rate=config.model.drop_path)
    return Job(
        name,
        parameters=[parameter.numel() for parameter in model.parameters()],
        channels=sum(norm.num_features for norm in model.modules() if isinstance(norm, nn.BatchNorm2d)),
        bucket=bucket_size(model),
        launches=launches(model),
        sample=activation_bytes(model, config.data.image_size, "fp32", "cuda"),
        global_batch=config.global_batch,
        epochs=config.epochs,
    )


def largest_micro_batch(job: Job, gpus: int) -> int:
    """That divides the global batch over the GPUs and fits into their memory beside weights, moments and gradients, activations taken to be
    in fp32, which is more than they take under autocast.

    Raises:
        ValueError: there is none.
    """
    share = job.global_batch // gpus
    fits = largest_that_fits(4 * FP32 * job.size, job.sample, int(MEMORY), [size for size in range(1, share + 1) if share % size == 0])
    if fits is None:
        raise ValueError(f"{job.name} does not fit on {gpus} GPUs")
    return fits


def transfer(sent: float, hops: int, gpus: int, network: float) -> float:
    """Seconds for a collective in which each GPU sends so many bytes."""
    return sent / (SHARE * (NVLINK if gpus <= NODE else min(NVLINK, network))) + hops * HOP


def hops(kind: str, gpus: int) -> int:
    """From the first message to the last: up and down a tree for an all-reduce, around the ring for the others (NCCL's algorithms)."""
    return 2 * math.ceil(math.log2(gpus)) if kind == "all-reduce" else gpus - 1


def step(job: Job, gpus: int, network: float, cut: str, stage: int = 1) -> Step:
    """Of ZeRO stage 0, 1 or 2."""
    micro_batch = largest_micro_batch(job, gpus)
    accumulation = job.global_batch // gpus // micro_batch
    images, host = micro_batch / RATES[job.name][CUTS.index(cut)], job.launches[cut] * LAUNCH
    micro_step = max(images, host)
    parts = {part.what: part for part in communication(job.parameters, job.channels, stage=stage, accumulation=accumulation)}
    passes, buckets = (accumulation if stage == 2 else 1), math.ceil(job.size / job.bucket)
    calls = {"gradients": passes * buckets, "weights": 2}  # two groups of parameters
    times = {what: transfer(part.sent(gpus), calls.get(what, 1) * hops(part.kind, gpus), gpus, network) for what, part in parts.items()}
    reduction = times["gradients"]
    # The last bucket is full when the backward pass has ended.
    exposed = max(reduction / buckets, reduction - passes * BACKWARD * micro_step)
    update = UPDATE * job.size / (gpus if stage else 1) / H200.bytes_per_s
    gather = times.get("weights", 0.0)
    total = accumulation * micro_step + exposed + times.get("norm", 0.0) + times["statistics"] + update + gather
    return Step(gpus, micro_batch, accumulation, accumulation * micro_step, reduction, exposed, gather, update, total, host > images)


def days(job: Job, step: Step) -> float:
    """Of the whole recipe."""
    return job.epochs * IMAGES / job.global_batch * step.total / 86400


def row(job: Job, step: Step, base: Step) -> list[str]:
    efficiency, whole = base.total * base.gpus / (step.total * step.gpus), days(job, step)
    ms = f"{step.total * 1e3:.0f}{'*' if step.launch_bound else ''}"
    return [ms, f"{job.global_batch / step.total:,.0f}", f"{efficiency:.0%}", f"{whole:.2f}", f"{whole * 24 * step.gpus:,.0f}"]


def table(jobs: Sequence[Job], network: float) -> list[str]:
    """Markdown; both cuts beside each other."""
    heads = [f"{cut} {head}" if head == "ms" else head for cut in CUTS for head in ("ms", "images/s", "efficiency", "days", "GPU-hours")]
    lines = [f"| | GPUs | {' | '.join(heads)} |", "|---|" + "--:|" * (1 + len(heads))]
    for one in jobs:
        for gpus in GPUS:
            cells = [cell for cut in CUTS for cell in row(one, step(one, gpus, network, cut), step(one, NODE, network, cut))]
            lines.append(f"| {one.name.replace('van_b', 'B')} | {gpus} | {' | '.join(cells)} |")
    return lines


def plot(jobs: Sequence[Job]) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    for axis, (name, network) in zip(axes, NETWORKS.items(), strict=True):
        for one, colour in zip(jobs, ("C0", "C1", "C2", "C3"), strict=True):
            for cut, line in zip(CUTS, ("-", "--"), strict=True):
                times = [step(one, gpus, network, cut).total * 1e3 for gpus in GPUS]
                axis.loglog(GPUS, times, line, color=colour, label=f"VAN-{one.name[-2:].upper()}, {cut}", linewidth=1)
        axis.set(title=f"NVLink, {name}", xlabel="GPUs", xticks=GPUS, xticklabels=GPUS)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("ms a step, on paper")
    axes[1].legend(fontsize=7, loc="upper right", ncols=2)
    figure.tight_layout()
    figure.savefig(PLOT, metadata={"Date": None})


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    jobs = [job(name) for name in VARIANTS]
    for one in jobs:
        print(f"{one.name}: {one.size / 1e6:.1f} M parameters, launches {one.launches}, {one.sample / 1e9:.2f} GB an image at most")
    rows = []
    for name, network in NETWORKS.items():
        print(f"\n{name}\n")
        print("\n".join(table(jobs, network)))
        for one in jobs:
            for cut in CUTS:
                for stage in (0, 1, 2):
                    found = [step(one, gpus, network, cut, stage) for gpus in GPUS]
                    rows += [
                        {"model": one.name, "network": name, "cut": cut, "stage": stage, **asdict(s), "days": days(one, s)} for s in found
                    ]
    about = [{"model": j.name, "parameters": j.size, "channels": j.channels, "launches": j.launches, "sample": j.sample} for j in jobs]
    record_result(RESULT, "python -m benchmarks.scale", ["torch", "timm"], jobs=about, steps=rows)
    plot(jobs)


if __name__ == "__main__":
    main()
