"""The steps since the last log line: loss, gradient norm, speed and waiting. The device is read when an interval ends, not before.

Who waits for whom, the host for the GPU or the GPU for the host, can be asked without waiting: when the host has launched all of a step, a
GPU that has its backward passes already behind it had nothing else to do. Where the host waits for the GPU within a step, as in ZeRO-3 and
with offload, that says nothing, and it is not asked.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pretrain.engine.distributed import all_gather_tensors
from pretrain.engine.guard import Guard

MUCH = 0.5  # of the steps, in which a GPU runs dry, that is worth a remark


@dataclass(frozen=True, eq=False)
class Steps:
    """What an interval's steps were; the same on all ranks.

    Args:
        numbers: of the steps, counted from 0.
        losses: (ranks, steps), of each rank's own samples.
        norms: (steps,) of the gradients, before clipping.
        skipped: (steps,) whether the step changed nothing, as its numbers were not finite.
        starved: share of the steps in which a rank's GPU waited for what its host launches; None if that was not asked.
        seconds, waited: of training, and of these waiting for data on this rank.
        news: whether any rank has news of bad images.
    """

    numbers: list[int]
    losses: np.ndarray
    norms: np.ndarray
    skipped: np.ndarray
    starved: float | None
    seconds: float
    waited: float
    news: bool

    @property
    def loss(self) -> np.ndarray:
        """(steps,) over all ranks; fp32 sums, as the ranks' own are."""
        return self.losses.sum(0, dtype=np.float32) / len(self.losses)

    def means(self) -> dict[str, float]:
        """Loss and gradient norm of the steps that were not skipped; not a number where all were."""
        taken = ~self.skipped
        if not taken.any():
            return {"loss": float("nan"), "grad_norm": float("nan")}
        return {"loss": float(self.loss[taken].mean(dtype=np.float64)), "grad_norm": float(self.norms[taken].mean(dtype=np.float64))}

    def remark(self, graphs: bool) -> str:
        """For a log line, of a job with or without CUDA graphs: empty as long as the GPUs have enough to do."""
        if self.starved is None or self.starved <= MUCH:
            return ""
        advice = "a larger engine.micro_batch" if graphs else "model.graphs=true or a larger engine.micro_batch"
        return f"  GPUs wait for the host in {self.starved:.0%} of steps, try {advice}"


class Interval:
    """Args:
    most: steps that it may have.
    accumulation: micro-batches of a step.
    asks: whether GPUs wait for the host.
    """

    def __init__(self, device: torch.device, most: int, accumulation: int, *, asks: bool):
        self.accumulation, self._asks = accumulation, asks
        # A step's loss, norm, whether it was skipped, and whether the GPU was starved; the last row: news.
        self._rows = torch.zeros(most + 1, 4, device=device)
        self._computed = torch.cuda.Event() if asks else None  # all passes so far
        self._begin()

    def _begin(self) -> None:
        self._rows.zero_()
        self._numbers: list[int] = []
        self.starved: list[bool] = []  # whether the GPU was, in each step
        self._waited, self._began = 0.0, time.monotonic()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """What runs inside is waiting for data."""
        began = time.monotonic()
        yield
        self._waited += time.monotonic() - began

    @contextmanager
    def pausing(self) -> Iterator[None]:
        """What runs inside, evaluation or saving, is no time of training."""
        began = time.monotonic()
        yield
        self._began += time.monotonic() - began

    def add(self, loss: Tensor) -> None:
        """A micro-batch's loss, behind its backward pass."""
        self._rows[len(self._numbers), 0] += loss.detach()
        if self._computed is not None:
            self._computed.record()

    def end_step(self, number: int, guard: Guard) -> None:
        """To be called when the whole step has been launched."""
        self.starved.append(self._computed is not None and self._computed.query())
        row = self._rows[len(self._numbers)]
        row[1], row[2] = guard.norm, guard.found_inf
        self._numbers.append(number)

    def close(self, news: int) -> Steps:
        """The steps so far; the next interval begins. Collective, and waits for the device.

        Args:
            news: of bad images, how many this rank has.
        """
        self._rows[-1] = news
        self._rows[: len(self.starved), 3] = torch.tensor(self.starved, dtype=torch.float32)
        rows = all_gather_tensors(self._rows).cpu().numpy()
        seconds, waited, numbers = time.monotonic() - self._began, self._waited, self._numbers
        self._begin()
        own = rows[:, : len(numbers)]
        losses, norms, skipped = own[:, :, 0] / self.accumulation, own[0, :, 1], own[0, :, 2] > 0
        starved = float((own[:, :, 3] > 0).any(0).mean()) if self._asks and numbers else None
        return Steps(numbers, losses, norms, skipped, starved, seconds, waited, bool(rows[:, -1].any()))
