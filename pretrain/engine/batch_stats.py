"""Keeps BatchNorm's running statistics equal on all ranks, and optionally normalizes by the batch of all ranks.

ZeRO ignores buffers: each rank would keep statistics of its own, a checkpoint would hold rank 0's, and a resumed run would differ. Here the
running statistics of the whole model are one flat fp32 buffer, averaged over the ranks in every step: an all-reduce of 8 bytes a channel.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

KINDS = ("running_mean", "running_var")


class BatchStats:
    """Holds the running means and variances of a model, end to end in `flat`; the modules' buffers become views of `flat`.

    `model` must have the BatchNorms that it will train with. `ema_decay` is that of the moving average; 0 keeps none.
    """

    def __init__(self, model: nn.Module, ema_decay: float):
        norms = {name: m for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d | nn.SyncBatchNorm)}
        self.flat = torch.cat([getattr(norm, kind) for norm in norms.values() for kind in KINDS])
        self.ema_decay = ema_decay
        self.ema = self.flat.clone() if ema_decay else self.flat
        self.averages: dict[str, Tensor] = {}  # views of `ema` by the buffer's name
        offset = 0
        for name, norm in norms.items():
            for kind in KINDS:
                # .data: views of one tensor share a version counter. Compiled code saves a norm's statistics for its backward pass, and
                # would mistake an update of another norm's statistics for a change of the saved ones.
                setattr(norm, kind, self.flat.narrow(0, offset, norm.num_features).data)
                self.averages[f"{name}.{kind}"] = self.ema.narrow(0, offset, norm.num_features)
                offset += norm.num_features
        self._snapshot = self.flat.clone()  # from before the step
        self._averaging: dist.Work | None = None

    def start_averaging(self) -> None:
        """Starts the average over the ranks, after a step's last forward pass; `finish` must follow before the next one. Collective."""
        self.flat.div_(dist.get_world_size())
        self._averaging = dist.all_reduce(self.flat, async_op=True)

    def finish(self, skipped: Tensor | None = None) -> None:
        """Completes the step's average, or restores the statistics of before the step where `skipped`, a scalar on the device, is 1."""
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
        """Makes the present statistics those that a skipped step restores; to be called after values were loaded into `flat`."""
        self._snapshot.copy_(self.flat)


class SyncBatchNorm(nn.SyncBatchNorm):
    """Extends torch's SyncBatchNorm, which only GPUs have, to CPUs. Ranks must have batches of one size."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalizes (N, C, H, W) to (N, C, H, W)."""
        if input.is_cuda or not self.training:
            return super().forward(input)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.momentum is not None
        assert self.num_batches_tracked is not None
        ranks, axes = dist.get_world_size(), (0, 2, 3)
        x = input.float()
        mean = all_reduce(x.mean(axes)) / ranks
        centered = x - mean[:, None, None]
        variance = all_reduce(centered.square().mean(axes)) / ranks
        with torch.no_grad():
            count = ranks * input.numel() / input.shape[1]
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        return (centered * scale[:, None, None] + self.bias[:, None, None]).to(input.dtype)


def synchronize_batch_norms(model: nn.Module) -> None:
    """Replaces each BatchNorm2d by a SyncBatchNorm of the same name and state."""
    for module in list(model.modules()):
        for name, norm in module.named_children():
            if isinstance(norm, nn.BatchNorm2d):
                synced = SyncBatchNorm(norm.num_features, norm.eps, norm.momentum)
                synced.load_state_dict(norm.state_dict())
                setattr(module, name, synced)
