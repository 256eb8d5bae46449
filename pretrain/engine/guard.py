"""Checks a step's gradients before the update: measures their norm, clips, unscales fp16, and skips a step that is not finite.

Everything stays on the device, and the host does not wait: torch's fused AdamW takes the scale and the decision to skip as tensors.
The host reads the results of a whole interval at once (pretrain/monitor/interval.py) and may then roll back (pretrain/monitor/rollback.py).
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.engine import deepspeed_compat

# As in torch.amp.GradScaler: the scale doubles after this many steps without an overflow, and each overflow halves it.
FIRST_SCALE, GROWTH, BACKOFF, GROWTH_INTERVAL = 2.0**16, 2.0, 0.5, 2000


class Guard:
    """Guards the updates of an engine.

    In each step call `scale_loss` on the loss of each micro-batch, `check` after the last backward pass, then the engine's step and
    `BatchStats.finish(found_inf)`. `clip` is the maximum norm of all gradients together, 0 for none. `should_scale` scales losses, so that
    small gradients do not underflow in fp16.
    """

    def __init__(self, engine: Any, *, clip: float, should_scale: bool):
        self.engine, self.clip = engine, clip
        device = engine.device
        self.norm = torch.zeros((), device=device)  # of the step's gradients, before clipping
        self.found_inf = torch.zeros((), device=device)  # 1 where the step is skipped
        self.scale = torch.full((), FIRST_SCALE if should_scale else 1.0, device=device)
        self._growth = torch.zeros((), dtype=torch.int32, device=device) if should_scale else None
        self._not_a_number = torch.full((), torch.nan, device=device)

    def scale_loss(self, loss: Tensor) -> Tensor:
        """Returns the loss times the scale, for the backward pass.

        A loss that is not finite turns all gradients of this rank into NaN, and thereby the reduced gradients of every rank.
        """
        return loss * torch.where(torch.isfinite(loss.detach()), self.scale, self._not_a_number)

    def check(self) -> None:
        """Measures the gradients; sets the optimizer's `grad_scale`, and `found_inf` to skip the step. Collective."""
        square = torch.nn.utils.get_total_norm(deepspeed_compat.list_gradients(self.engine)) ** 2
        if self.engine.zero_optimization_stage() > 0:
            dist.all_reduce(square)
        self.norm = square.sqrt() / self.scale
        self.found_inf = (~torch.isfinite(self.norm)).float()
        optimizer = self.engine.basic_optimizer
        optimizer.found_inf = self.found_inf
        if self.clip:
            optimizer.grad_scale = self.scale * ((self.norm + 1e-6) / self.clip).clamp(min=1.0)
        elif self._growth is not None:
            optimizer.grad_scale = self.scale.clone()  # `scale` itself becomes that of the next step
        if self._growth is not None:
            torch._amp_update_scale_(self.scale, self._growth, self.found_inf, GROWTH, BACKOFF, GROWTH_INTERVAL)

    def state_dict(self) -> dict[str, float]:
        """Returns the loss scale's state for a checkpoint; waits for the device."""
        return {"scale": self.scale.item(), "growth": self._growth.item()} if self._growth is not None else {}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Sets the loss scale's state; does nothing where this job or the checkpoint has no loss scale."""
        if self._growth is not None and state:
            self.scale.fill_(state["scale"])
            self._growth.fill_(int(state["growth"]))
