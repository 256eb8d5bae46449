"""The ways to train that are compared: whole training steps of our model and of the authors', from the same weights.

A step is all that an optimizer step takes on one GPU or CPU: forward under autocast, cross-entropy with label smoothing, backward,
the update by AdamW. Images and labels lie on the device already.

| way | model | arithmetic, layout | else |
|---|---|---|---|
| `peer_fp32` | the authors' | fp32, contiguous: PyTorch's defaults | their train.py's optimizer, timm's create_optimizer_v2 |
| `peer_bf16` | the authors' | bf16 autocast, channels-last | the same |
| `peer_fp16` | the authors' | their --amp: fp16 autocast, loss scaled; contiguous | waits for the GPU, as their loop does |
| `peer_fp16_nhwc` | the authors' | the same with their --channels-last | the same |
| `peer_compiled` | the authors' | as `peer_fp16_nhwc` | torch.compile of the whole model |
| `own_…` | ours, channels-last | fp32, or bf16 as a job has it | our fused AdamW; PyTorch's operators or Triton's, compiled or not |
| `engine` | ours | bf16 | what a job runs: DeepSpeed ZeRO-1 on one rank, the guard, BatchNorm's statistics |
| `engine_graphs` | ours | the same | with `model.graphs`; taken where it is named |

A compiled way takes the micro-batch that is best for the same way uncompiled, as each other size would be compiled for minutes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any, cast

import timm
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from benchmarks.training import peer
from pretrain import config as settings
from pretrain.engine import distributed
from pretrain.engine.engine import build_engine
from pretrain.engine.optim import AdamW, parameter_groups
from pretrain.engine.precision import DTYPES, autocast, usable_precision
from pretrain.model.fast.cuda_graphs import use_graphs
from pretrain.model.fast.kernel_choice import compile_blocks, use_kernels
from pretrain.model.formats import to_format
from pretrain.model.van import VAN

LR, WEIGHT_DECAY, SMOOTHING = 1e-3, 0.05, 0.1  # the authors' train.sh and train.py

Step = Callable[[Tensor, Tensor], Tensor]  # one training step on images (N, 3, H, W) and labels (N,); returns its loss


@dataclass(frozen=True)
class Job:
    """What all ways train."""

    model: str
    image_size: int
    device: torch.device
    classes: int = 1000
    drop_path: float = 0.1
    batch: int = 1  # images of a step


@dataclass(frozen=True)
class Way:
    """A way to train, and in which layout it takes its images. `batch_of` names the way whose micro-batch it takes over. One that
    `holds` its memory between steps leaves less to the others, and is taken only where it is named."""

    name: str
    build: Callable[[Job], Step]
    channels_last: bool = True
    batch_of: str | None = None
    holds: bool = False


def ways(device: torch.device, authors: ModuleType | None) -> list[Way]:
    """All that are compared on such a device; the authors' where their module is at hand."""
    found = []
    if device.type == "cpu":
        if authors is not None:
            found += [
                Way("peer_fp32", partial(_peer, authors, "fp32", channels_last=False), channels_last=False),
                Way("peer_bf16", partial(_peer, authors, "bf16", channels_last=True)),
            ]
        found += [
            Way("own_fp32", partial(_own, "fp32", "torch")),
            Way("own_bf16", partial(_own, "bf16", "torch")),
            Way("engine", partial(_engine, "torch")),
        ]
        return found
    if authors is not None:
        found += [
            Way("peer_fp16", partial(_peer, authors, "fp16", channels_last=False), channels_last=False),
            Way("peer_fp16_nhwc", partial(_peer, authors, "fp16", channels_last=True)),
            Way("peer_compiled", partial(_peer, authors, "fp16", channels_last=True, compiled=True), batch_of="peer_fp16_nhwc"),
        ]
    for name, kernels in (("own", "torch"), ("own_kernels", "triton")):
        found += [
            Way(name, partial(_own, "bf16", kernels)),
            Way(f"{name}_compiled", partial(_own, "bf16", kernels, compiled=True), batch_of=name),
        ]
    engine = Way("engine", partial(_engine, "triton"), batch_of="own_kernels")
    return [*found, engine, Way("engine_graphs", partial(_engine, "triton", graphs=True), batch_of="own_kernels", holds=True)]


def new_model(job: Job) -> VAN:
    """Ours, with weights that follow from a seed."""
    torch.manual_seed(0)
    with job.device:
        return cast(VAN, timm.create_model(job.model, num_classes=job.classes, drop_path_rate=job.drop_path).train())


def _own(precision: str, kernels: str, job: Job, *, compiled: bool = False) -> Step:
    model = new_model(job)
    use_kernels(model, kernels, job.device, job.image_size, DTYPES[usable_precision(job.device, precision)])
    if compiled:
        compile_blocks(model)
    optimizer = AdamW(parameter_groups(model, WEIGHT_DECAY), lr=LR, ema_decay=0.0)

    def step(images: Tensor, labels: Tensor) -> Tensor:
        with autocast(job.device, precision):
            logits = model(images)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=SMOOTHING)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def _peer(authors: ModuleType, precision: str, job: Job, *, channels_last: bool, compiled: bool = False) -> Step:
    model = peer.build(authors, job.model, job.classes, job.drop_path).to(job.device).train()
    model.load_state_dict(to_format(new_model(job).state_dict(), "official"))
    if channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = create_optimizer_v2(model, opt="adamw", lr=LR, weight_decay=WEIGHT_DECAY)
    scaler = torch.amp.GradScaler(job.device.type, enabled=precision == "fp16")
    if compiled:
        model.compile()

    as_theirs = torch.autocast(job.device.type, DTYPES[precision], enabled=precision != "fp32")

    def step(images: Tensor, labels: Tensor) -> Tensor:
        with as_theirs:
            loss = F.cross_entropy(model(images), labels, label_smoothing=SMOOTHING)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if job.device.type == "cuda":
            torch.cuda.synchronize()
        return loss.detach()

    return step


def _engine(kernels: str, job: Job, *, graphs: bool = False) -> Step:
    step = engine_step(engine_config(job, {"kernels": kernels, "graphs": graphs}), new_model(job))
    return lambda images, labels: step(images, labels[:, None], None)


def engine_config(job: Job, model: dict[str, Any], engine: dict[str, Any] | None = None) -> settings.Config:
    """Settings of a job that trains this, with more of `model` and `engine`."""
    return settings.from_dict(
        {
            "name": "bench", "global_batch": job.batch, "epochs": 1.0,
            "model": {"name": job.model, "classes": job.classes, "drop_path": job.drop_path} | model,
            "data": {"train": "none", "image_size": job.image_size}, "optim": {"lr": LR, "weight_decay": WEIGHT_DECAY},
            "engine": {"micro_batch": job.batch, "device": job.device.type} | (engine or {}),
        }
    )  # fmt: skip


def engine_step(config: settings.Config, model: nn.Module) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """An optimizer step of one micro-batch as `pretrain/train.py` has it, in a process group of this process alone; takes what
    `mix_pairs` gives."""
    from pretrain.engine.batch_stats import BatchStats
    from pretrain.engine.guard import Guard
    from pretrain.train import mixed_cross_entropy

    device = distributed.start(config.engine)
    engine: Any = build_engine(config, model, 1)
    dtype = DTYPES[usable_precision(device, config.engine.precision)]
    use_kernels(model, config.model.kernels, device, config.data.image_size, dtype, config.engine.zero_stage)
    stats = BatchStats(model, config.engine.ema_decay)
    guard = Guard(engine, clip=config.optim.clip_grad, scales=config.engine.precision == "fp16")
    engine.train()
    if config.model.graphs:
        use_graphs(engine, config)

    def step(images: Tensor, targets: Tensor, share: Tensor | None) -> Tensor:
        loss = mixed_cross_entropy(engine(images), targets, share, config.optim.label_smoothing)
        engine.backward(guard.scaled(loss))
        stats.start_averaging()
        guard.check()
        engine.step()
        stats.finish(guard.found_inf)
        return loss.detach()

    return step
