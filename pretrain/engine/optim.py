"""Defines the optimizer: parameter groups, AdamW with a moving average of the weights, and the learning rate of each step.

The recipe is the authors' (VAN-Classification, main.py and train.sh, which follow timm): AdamW without weight decay on biases and other
1-D parameters, linear warm-up, and cosine decay to the minimum rate. Fine-tuning can also lower the rate from layer to layer towards
the input.
"""

import math
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

from pretrain.config import OptimConfig


def group_parameters(model: nn.Module, weight_decay: float, layer_decay: float = 1.0) -> list[dict[str, Any]]:
    """Returns two parameter groups: matrices and kernels with weight decay, 1-D parameters (biases, norms, layer scales) without.

    Parameters named by the model's `no_weight_decay`, such as position embeddings, have no weight decay either.

    With `layer_decay` below 1, each layer has two such groups, whose `lr_scale` is layer_decay ** (number of later layers); the last
    layer, the head, has scale 1 (BEiT, arXiv 2106.08254; timm's param_groups_layer_decay). The model's group_matcher defines the layers.
    """
    no_decay = set(cast(Any, model).no_weight_decay()) if hasattr(model, "no_weight_decay") else set()
    if layer_decay < 1:
        return [
            {key: group[key] for key in ("params", "weight_decay", "lr_scale")}
            for group in param_groups_layer_decay(model, weight_decay, no_decay, layer_decay=layer_decay)
        ]
    decayed: list[Tensor] = []
    undecayed: list[Tensor] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_decayed = parameter.ndim > 1 and not any(fnmatchcase(name, pattern) for pattern in no_decay)
            (decayed if is_decayed else undecayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": undecayed, "weight_decay": 0.0}]


class AdamW(torch.optim.AdamW):
    """Extends torch's fused AdamW by an exponential moving average of the weights, one more state beside the two moments.

    ZeRO partitions the average, and checkpoints save and reshard it, exactly as the moments. `ema_decay` is per step; 0: no average.

    `found_inf` and `grad_scale` are scalars on the device. Their names are those that torch's fused optimizers read and
    torch.amp.GradScaler sets: a step with `found_inf` 1 changes nothing, and gradients are divided by `grad_scale`. None disables either.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], *, ema_decay: float, **kwargs: Any):
        super().__init__(groups, fused=True, **kwargs)
        self.ema_decay = ema_decay
        self.found_inf: Tensor | None = None
        self.grad_scale: Tensor | None = None

    @property
    def state_keys(self) -> tuple[str, ...]:
        """Returns the names of the states that have the shape of the weight."""
        return ("exp_avg", "exp_avg_sq", "ema") if self.ema_decay else ("exp_avg", "exp_avg_sq")

    def start_states(self, weights: Iterable[Tensor]) -> None:
        """Creates the states of these tensors before the first update; the average starts at the weights."""
        for weight in weights:
            state = self.state[weight]
            state["step"] = torch.zeros((), dtype=torch.float32, device=weight.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weight), torch.zeros_like(weight)
            if self.ema_decay:
                state["ema"] = weight.detach().clone()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)
        weights = [p for group in self.param_groups for p in group["params"] if self.ema_decay and p.grad is not None]
        if weights:
            share = 1 - self.ema_decay if self.found_inf is None else [(1 - self.ema_decay) * (1 - self.found_inf)] * len(weights)
            torch._foreach_lerp_([self.state[p]["ema"] for p in weights], weights, share)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets each group's rate to `lr` times the group's `lr_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def learning_rate(step: int, total: int, warmup: int, optim: OptimConfig) -> float:
    """Returns the learning rate of an optimizer step, counted from 0: linear warm-up, then cosine decay from `lr` to `min_lr`.

    Equals timm's CosineLRScheduler without warmup_prefix, updated per step: the cosine spans all `total` steps, and the warm-up replaces
    its first `warmup` steps.
    """
    if step < warmup:
        return optim.warmup_lr + (optim.lr - optim.warmup_lr) * step / warmup
    return optim.min_lr + 0.5 * (optim.lr - optim.min_lr) * (1 + math.cos(math.pi * step / total))
