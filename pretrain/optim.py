"""What updates the weights: parameter groups, AdamW that can also keep their moving average, the learning rate of a step.

The recipe is the authors' (VAN-Classification, main.py and train.sh, which are timm's): AdamW, no weight decay on biases and other
1-D parameters, a linear warm-up by whole epochs' worth of steps and a cosine down to the lowest rate.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.config import OptimConfig


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: matrices and kernels with weight decay, 1-D parameters (biases, norms, layer scale) without."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]


class AdamW(torch.optim.AdamW):
    """torch's fused AdamW, with an exponential moving average of the weights as one more state beside its two moments.

    As a state of the optimizer the average is cut into pieces and placed by ZeRO exactly as the moments are, so it costs each rank
    the same share of memory, and whatever saves or reshards the moments saves and reshards it too.

    Args:
        ema_decay: of the average, a step; 0 keeps none.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], *, ema_decay: float, **kwargs: Any):
        super().__init__(groups, fused=True, **kwargs)
        self.ema_decay = ema_decay

    @property
    def state_keys(self) -> tuple[str, ...]:
        """Names of the states that have an element for each element of a weight."""
        return ("exp_avg", "exp_avg_sq", "ema") if self.ema_decay else ("exp_avg", "exp_avg_sq")

    def start_states(self, weights: Iterable[Tensor]) -> None:
        """Creates the states that these tensors have before the first update, the average starting at the weights."""
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
            torch._foreach_lerp_([self.state[p]["ema"] for p in weights], weights, 1 - self.ema_decay)


def learning_rate(step: int, total: int, steps_per_epoch: int, optim: OptimConfig) -> float:
    """The learning rate of an optimizer step, counted from 0: linear warm-up, then half a cosine from `lr` to `min_lr`.

    As timm's CosineLRScheduler with warmup_prefix off, stepped by update: the cosine runs over the whole of training and the warm-up
    covers its beginning.
    """
    warmup = round(optim.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return optim.warmup_lr + (optim.lr - optim.warmup_lr) * step / warmup
    return optim.min_lr + 0.5 * (optim.lr - optim.min_lr) * (1 + math.cos(math.pi * step / total))
