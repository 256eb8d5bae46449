"""Training steps to compare: ours and the authors', from the same weights.

A step is one optimizer step on one GPU or CPU: forward pass under autocast, cross-entropy with label smoothing, backward pass, AdamW
update. Images and labels are on the device.

docs/performance.md lists the cases: peer_… are the authors', ours_… our model alone, engine… a job's step.

A compiled case uses the best micro-batch of the same case without compilation, as compiling for another size takes minutes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from benchmarks.training import peer
from pretrain import config as settings
from pretrain.engine import distributed
from pretrain.engine.engine import build_engine
from pretrain.engine.fast_paths import use_fast_paths, use_graphs
from pretrain.engine.optim import AdamW, group_parameters
from pretrain.engine.precision import DTYPES, autocast
from pretrain.model.build import build_model
from pretrain.model.formats import to_format

LR, WEIGHT_DECAY, SMOOTHING = 1e-3, 0.05, 0.1  # the authors' train.sh and train.py

Step = Callable[[Tensor, Tensor], Tensor]  # a training step on images (N, 3, H, W) and labels (N,); returns its loss


@dataclass(frozen=True)
class Job:
    """The model that all cases train, and its data."""

    model: str
    image_size: int
    device: torch.device
    classes: int = 1000
    drop_path: float = 0.1
    batch: int = 1  # images per step


@dataclass(frozen=True)
class Case:
    """A training step to compare."""

    name: str
    build: Callable[[Job], Step]
    channels_last: bool = True  # memory layout of the images
    batch_of: str | None = None  # name of the case whose best micro-batch it uses
    holds_memory: bool = False  # keeps memory between steps, which other cases lack; such a case runs only if --cases names it

    @property
    def is_peer(self) -> bool:
        return self.name.startswith("peer")


def all_cases(device: torch.device, authors: ModuleType | None) -> list[Case]:
    """Returns the cases for a device; `authors` is the module of the authors' code, if it is available."""
    peers: list[Case] = []
    if device.type == "cpu":
        if authors is not None:
            peers = [
                Case("peer_fp32", partial(_peer_step, authors, "fp32", channels_last=False), channels_last=False),
                Case("peer_bf16", partial(_peer_step, authors, "bf16", channels_last=True)),
            ]
        return [
            *peers,
            Case("ours_fp32", partial(_our_step, "fp32", "torch")),
            Case("ours_bf16", partial(_our_step, "bf16", "torch")),
            Case("engine", partial(_engine_step, "torch")),
        ]
    if authors is not None:
        peers = [
            Case("peer_fp16", partial(_peer_step, authors, "fp16", channels_last=False), channels_last=False),
            Case("peer_fp16_nhwc", partial(_peer_step, authors, "fp16", channels_last=True)),
            Case("peer_compiled", partial(_peer_step, authors, "fp16", channels_last=True, compiled=True), batch_of="peer_fp16_nhwc"),
        ]
    return [
        *peers,
        Case("ours", partial(_our_step, "bf16", "torch")),
        Case("ours_compiled", partial(_our_step, "bf16", "torch", compiled=True), batch_of="ours"),
        Case("ours_kernels", partial(_our_step, "bf16", "triton")),
        Case("ours_kernels_compiled", partial(_our_step, "bf16", "triton", compiled=True), batch_of="ours_kernels"),
        Case("engine", partial(_engine_step, "triton"), batch_of="ours_kernels"),
        Case("engine_graphs", partial(_engine_step, "triton", graphs=True), batch_of="ours_kernels", holds_memory=True),
    ]


def select_cases(cases: Sequence[Case], names: Sequence[str] | None) -> list[Case]:
    """Returns the named cases in the order of `cases`; without names, all that hold no memory.

    Raises:
        ValueError: there is no such case for this device.
    """
    unknown = set(names or ()) - {case.name for case in cases}
    if unknown:
        raise ValueError(f"--cases: no {', '.join(sorted(unknown))} on this device; there are {', '.join(case.name for case in cases)}")
    return [case for case in cases if (case.name in names if names else not case.holds_memory)]


def new_model(job: Job, config: settings.Config | None = None) -> nn.Module:
    """Returns our model in training mode, initialized from a fixed seed."""
    torch.manual_seed(0)
    return build_model(config or engine_config(job)).to(job.device).train()


def _our_step(precision: str, kernels: str, job: Job, *, compiled: bool = False) -> Step:
    config = engine_config(job, {"kernels": kernels, "compile": compiled}, {"precision": precision})
    model = new_model(job, config)
    use_fast_paths(model, config, job.device)
    optimizer = AdamW(group_parameters(model, WEIGHT_DECAY), lr=LR, ema_decay=0.0)

    def step(images: Tensor, labels: Tensor) -> Tensor:
        with autocast(job.device, precision):
            logits = model(images)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=SMOOTHING)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def _peer_step(authors: ModuleType, precision: str, job: Job, *, channels_last: bool, compiled: bool = False) -> Step:
    model = peer.build(authors, job.model, job.classes, job.drop_path).to(job.device).train()
    model.load_state_dict(to_format(new_model(job).state_dict(), "official"))
    if channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = create_optimizer_v2(model, opt="adamw", lr=LR, weight_decay=WEIGHT_DECAY)
    scaler = torch.amp.GradScaler(job.device.type, enabled=precision == "fp16")
    if compiled:
        model.compile()

    their_autocast = torch.autocast(job.device.type, DTYPES[precision], enabled=precision != "fp32")

    def step(images: Tensor, labels: Tensor) -> Tensor:
        with their_autocast:
            loss = F.cross_entropy(model(images), labels, label_smoothing=SMOOTHING)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if job.device.type == "cuda":
            torch.cuda.synchronize()
        return loss.detach()

    return step


def _engine_step(kernels: str, job: Job, *, graphs: bool = False) -> Step:
    config = engine_config(job, {"kernels": kernels, "graphs": graphs})
    step = engine_step(config, new_model(job, config))
    return lambda images, labels: step(images, labels[:, None], None)


def engine_config(job: Job, model: dict[str, Any] | None = None, engine: dict[str, Any] | None = None) -> settings.Config:
    """Returns the settings of a job, extended by those of `model` and `engine`."""
    return settings.from_dict(
        {
            "name": "bench", "global_batch": job.batch, "epochs": 1.0,
            "model": {"name": job.model, "classes": job.classes, "drop_path": job.drop_path} | (model or {}),
            "data": {"train": "none", "image_size": job.image_size}, "optim": {"lr": LR, "weight_decay": WEIGHT_DECAY},
            "engine": {"micro_batch": job.batch, "device": job.device.type} | (engine or {}),
        }
    )  # fmt: skip


def engine_step(config: settings.Config, model: nn.Module) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """Returns the optimizer step of `pretrain/train.py` with one micro-batch, in a process group of only this process.

    The step takes images (N, 3, H, W) and the targets and weights that `mix_pairs` returns; the weights are None for plain labels.
    """
    from pretrain.engine.batch_stats import BatchStats
    from pretrain.engine.guard import Guard
    from pretrain.loss import mixed_cross_entropy

    device = distributed.select_device(config.engine) if dist.is_initialized() else distributed.start(config.engine)
    use_fast_paths(model, config, device)
    engine: Any = build_engine(config, model, 1)
    stats = BatchStats(model, config.engine.ema_decay)
    guard = Guard(engine, clip=config.optim.clip_grad, should_scale=config.engine.precision == "fp16")
    engine.train()
    if config.model.graphs:
        use_graphs(engine, config)

    def step(images: Tensor, targets: Tensor, share: Tensor | None) -> Tensor:
        loss = mixed_cross_entropy(engine(images), targets, share, config.optim.label_smoothing)
        engine.backward(guard.scale_loss(loss))
        stats.start_averaging()
        guard.check()
        engine.step()
        stats.finish(guard.found_inf)
        return loss.detach()

    return step
