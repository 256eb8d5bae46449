"""Keeps BatchNorm's running statistics equal on all ranks, and optionally normalizes by the batch of all ranks.

ZeRO ignores buffers: each rank would keep its own statistics, a checkpoint would hold rank 0's, and a resumed run would differ. Here the
model's running statistics are one flat fp32 buffer, averaged over the ranks in every step: an all-reduce of 8 bytes per channel.
"""

import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.modules.batchnorm import _BatchNorm

KINDS = ("running_mean", "running_var")


class BatchStats:
    """Holds the running means and variances of a model, end to end in `flat`; the modules' buffers become views of `flat`.

    `model` must already have the BatchNorms that it trains with. `ema_decay` is the decay of the moving average; 0: no average.
    """

    def __init__(self, model: nn.Module, ema_decay: float):
        norms = {name: m for name, m in model.named_modules() if isinstance(m, _BatchNorm) and m.running_mean is not None}
        none = torch.empty(0, device=next(model.parameters()).device)
        self.flat = torch.cat([none, *(getattr(norm, kind) for norm in norms.values() for kind in KINDS)])
        self.ema_decay = ema_decay
        self.ema = self.flat.clone() if ema_decay else self.flat
        self.averages: dict[str, Tensor] = {}  # views of `ema` by the buffer's name
        offset = 0
        for name, norm in norms.items():
            for kind in KINDS:
                # .data, because views of one tensor share a version counter. Compiled code saves the statistics of a BatchNorm for its
                # backward pass, and would mistake an update of another BatchNorm's statistics for a change of the saved ones.
                setattr(norm, kind, self.flat.narrow(0, offset, norm.num_features).data)
                self.averages[f"{name}.{kind}"] = self.ema.narrow(0, offset, norm.num_features)
                offset += norm.num_features
        self._snapshot = self.flat.clone()  # from before the step
        self._averaging: dist.Work | None = None

    def start_averaging(self) -> None:
        """Starts averaging over the ranks, after a step's last forward pass; call `finish` before the next one. Collective."""
        self.flat.div_(dist.get_world_size())
        self._averaging = dist.all_reduce(self.flat, async_op=True)

    def finish(self, skipped: Tensor | None = None) -> None:
        """Completes the averaging, or restores the statistics from before the step if `skipped`, a scalar on the device, is 1."""
        assert self._averaging is not None
        self._averaging.wait()
        share: float | Tensor = 1 - self.ema_decay
        if skipped is not None:
            self.flat.copy_(torch.where(skipped > 0, self._snapshot, self.flat))
            share = share * (1 - skipped)
        self.take_snapshot()
        if self.ema_decay:
            self.ema.lerp_(self.flat, share)

    def take_snapshot(self) -> None:
        """Sets the statistics that a skipped step restores to the current ones; call it after loading values into `flat`."""
        self._snapshot.copy_(self.flat)


class SyncBatchNorm(nn.SyncBatchNorm):
    """Extends torch's SyncBatchNorm, which supports only GPUs, to CPUs. All ranks must have the same batch size."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalizes (N, C, …) to the same shape."""
        if input.is_cuda or not self.training:
            return super().forward(input)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.momentum is not None
        assert self.num_batches_tracked is not None
        ranks, axes = dist.get_world_size(), (0, *range(2, input.ndim))
        by_channel = (-1, *(1 for _ in axes[1:]))
        x = input.float()
        mean = all_reduce(x.mean(axes)) / ranks
        centered = x - mean.view(by_channel)
        variance = all_reduce(centered.square().mean(axes)) / ranks
        with torch.no_grad():
            count = ranks * input.numel() / input.shape[1]
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        return (centered * scale.view(by_channel) + self.bias.view(by_channel)).to(input.dtype)


class SyncBatchNormAct(SyncBatchNorm):
    """Synchronizes timm's BatchNormAct2d, which applies dropout and an activation after the normalization."""

    def forward(self, input: Tensor) -> Tensor:
        """Maps (N, C, H, W) to the same shape."""
        return self.act(self.drop(super().forward(input)))  # type: ignore[operator]


def synchronize_batch_norms(model: nn.Module) -> None:
    """Replaces each BatchNorm by a SyncBatchNorm of the same name and state.

    Raises:
        ValueError: the model has a BatchNorm of an unsupported kind.
    """
    for module in list(model.modules()):
        for name, norm in module.named_children():
            if not isinstance(norm, _BatchNorm):
                continue
            is_known = type(norm) in (nn.BatchNorm1d, nn.BatchNorm2d, BatchNormAct2d)
            if not is_known or not norm.affine or not norm.track_running_stats or norm.momentum is None:
                raise ValueError(f"engine.sync_bn: a {type(norm).__name__} of the model can't be synchronized; set engine.sync_bn=false")
            kind = SyncBatchNormAct if isinstance(norm, BatchNormAct2d) else SyncBatchNorm
            synced = kind(norm.num_features, norm.eps, norm.momentum)
            synced.load_state_dict(norm.state_dict())
            if isinstance(norm, BatchNormAct2d):
                synced.act, synced.drop = norm.act, norm.drop
            setattr(module, name, synced.train(norm.training))
