"""Between a step's gradients and its update: their norm, clipping, fp16's loss scale, and no update by numbers that are not finite.

All of it stays on the device, and nobody waits for it: torch's fused AdamW takes the scale and the verdict as tensors. The host
looks at an interval's steps together (pretrain/monitor/interval.py) and may then decide to go back (pretrain/monitor/rollback.py).
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.engine import zero_state

# torch.amp.GradScaler's: the scale doubles after so many steps without an overflow and is halved by each.
FIRST_SCALE, GROWTH, BACKOFF, GROWTH_INTERVAL = 2.0**16, 2.0, 0.5, 2000


class Guard:
    """Of one engine. For each step: `scaled` the loss of each micro-batch, then `check`, the engine's step, `stats.finish(found_inf)`.

    Args:
        clip: the largest norm of all gradients together; 0: any.
        scales: whether losses are scaled, as fp16's small gradients need it.
    """

    def __init__(self, engine: Any, *, clip: float, scales: bool):
        self.engine, self.clip = engine, clip
        device = engine.device
        self.norm = torch.zeros((), device=device)  # of the step's gradients, before clipping
        self.found_inf = torch.zeros((), device=device)  # 1 where the step is skipped
        self.scale = torch.full((), FIRST_SCALE if scales else 1.0, device=device)
        self._growth = torch.zeros((), dtype=torch.int32, device=device) if scales else None
        self._not_a_number = torch.full((), torch.nan, device=device)

    def scaled(self, loss: Tensor) -> Tensor:
        """What the backward pass is to start from. A loss that is not finite makes all of this rank's gradients not a number, and so,
        summed, everybody's."""
        return loss * torch.where(torch.isfinite(loss.detach()), self.scale, self._not_a_number)

    def check(self) -> None:
        """After a step's last backward pass, before its update. Collective."""
        square = torch.nn.utils.get_total_norm(zero_state.gradients(self.engine)).to(self.scale.device) ** 2
        if self.engine.zero_optimization_stage() > 0:
            dist.all_reduce(square)
        self.norm = square.sqrt() / self.scale
        self.found_inf = (~torch.isfinite(self.norm)).float()
        optimizer, device = self.engine.basic_optimizer, zero_state.optimizer_device(self.engine)
        optimizer.found_inf = self.found_inf.to(device)
        if self.clip:
            optimizer.grad_scale = (self.scale * ((self.norm + 1e-6) / self.clip).clamp(min=1.0)).to(device)
        elif self._growth is not None:
            optimizer.grad_scale = self.scale.to(device, copy=True)  # of this step; the next one's follows
        if self._growth is not None:
            torch._amp_update_scale_(self.scale, self._growth, self.found_inf, GROWTH, BACKOFF, GROWTH_INTERVAL)

    def state(self) -> dict[str, float]:
        """For a checkpoint; waits for the device."""
        return {"scale": self.scale.item(), "growth": self._growth.item()} if self._growth is not None else {}

    def load(self, state: dict[str, float]) -> None:
        if self._growth is not None and state:
            self.scale.fill_(state["scale"])
            self._growth.fill_(int(state["growth"]))
