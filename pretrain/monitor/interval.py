"""Collects loss, gradient norm, speed and data-waiting time of the steps since the last log line.

    interval = Interval(device, capacity=50, accumulation=2, detects_launch_bound=True)
    for each step: interval.add(loss) for each micro-batch; interval.end_step(step, guard)
    steps = interval.close(bad_images=0)

Only `close` reads from the device, so the steps in between do not wait for the device.

A step is launch-bound if the GPU has finished all backward passes by the time the host has launched the whole step. The host can check
this without waiting. In ZeRO-2 and 3 it can't be measured, because there the host waits for the GPU within a step.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pretrain.engine import distributed
from pretrain.engine.guard import Guard

COLUMNS = LOSS, GRAD_NORM, SKIPPED, LAUNCH_BOUND = range(4)  # of what is measured in a step
LAUNCH_BOUND_SHARE = 0.5  # of the steps; the log line gives advice above this share


@dataclass(frozen=True, eq=False)
class Steps:
    """Holds the measurements of an interval's steps. All but `seconds` and `data_seconds` are the same on all ranks."""

    numbers: list[int]  # of the steps, counted from 0
    losses: np.ndarray  # (ranks, steps), the mean loss of each rank's samples
    grad_norms: np.ndarray  # (steps,), before clipping
    skipped: np.ndarray  # (steps,), whether the step changed nothing because its numbers were not finite
    launch_bound: float | None  # share of steps, 0 to 1, that were launch-bound on any rank; None if not measured
    seconds: float  # of training
    data_seconds: float  # part of `seconds` in which this rank waited for data
    has_bad_images: bool  # whether some rank has bad images to report

    @property
    def mean_losses(self) -> np.ndarray:
        """Returns the mean loss of each step, (steps,), over all ranks; summed in fp32, as each rank's losses are."""
        return self.losses.sum(0, dtype=np.float32) / len(self.losses)

    def means(self) -> dict[str, float]:
        """Returns the mean loss and gradient norm of the steps that were not skipped; NaN if all were."""
        taken = {"loss": self.mean_losses[~self.skipped], "grad_norm": self.grad_norms[~self.skipped]}
        return {name: float(values.mean(dtype=np.float64)) if values.size else float("nan") for name, values in taken.items()}

    def launch_bound_advice(self, has_graphs: bool) -> str:
        """Returns advice for the log line; empty unless many steps were launch-bound."""
        if self.launch_bound is None or self.launch_bound <= LAUNCH_BOUND_SHARE:
            return ""
        remedy = "a larger engine.micro_batch" if has_graphs else "model.graphs=true or a larger engine.micro_batch"
        return f"  launch-bound in {self.launch_bound:.0%} of steps, try {remedy}"


class Interval:
    """Collects the measurements of at most `capacity` steps, of `accumulation` micro-batches each, on the device."""

    def __init__(self, device: torch.device, capacity: int, accumulation: int, *, detects_launch_bound: bool):
        self._accumulation = accumulation
        self._rows = torch.zeros(capacity + 1, len(COLUMNS), device=device)  # one per step; the last row: bad images
        self._backward_done = torch.cuda.Event() if detects_launch_bound else None
        self._begin()

    def _begin(self) -> None:
        self._rows.zero_()
        self._numbers: list[int] = []
        self.launch_bound: list[bool] = []  # by step
        self._data_seconds, self._began = 0.0, time.monotonic()

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Counts the time inside as waiting for data."""
        began = time.monotonic()
        yield
        self._data_seconds += time.monotonic() - began

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes the time inside, such as that of an evaluation or a save, from the training time."""
        began = time.monotonic()
        yield
        self._began += time.monotonic() - began

    def add(self, loss: Tensor) -> None:
        """Adds the loss of a micro-batch. Call after its backward pass."""
        self._rows[len(self._numbers), LOSS] += loss.detach()
        if self._backward_done is not None:
            self._backward_done.record()

    def end_step(self, number: int, guard: Guard) -> None:
        """Ends step `number`. Call when the host has launched the whole step."""
        self.launch_bound.append(self._backward_done is not None and self._backward_done.query())
        row = self._rows[len(self._numbers)]
        row[GRAD_NORM], row[SKIPPED] = guard.norm, guard.found_inf
        self._numbers.append(number)

    def close(self, bad_images: int) -> Steps:
        """Returns the steps since the last call; `bad_images`: how many this rank has to report. Collective; waits for the device."""
        self._rows[-1] = bad_images
        self._rows[: len(self.launch_bound), LAUNCH_BOUND] = torch.tensor(self.launch_bound, dtype=torch.float32)
        rows = distributed.all_gather_tensors(self._rows).cpu().numpy()
        seconds, data_seconds, numbers = time.monotonic() - self._began, self._data_seconds, self._numbers
        self._begin()
        steps = rows[:, : len(numbers)]
        is_measured = self._backward_done is not None and len(numbers) > 0
        return Steps(
            numbers=numbers,
            losses=steps[:, :, LOSS] / self._accumulation,
            grad_norms=steps[0, :, GRAD_NORM],
            skipped=steps[0, :, SKIPPED] > 0,
            launch_bound=float((steps[:, :, LAUNCH_BOUND] > 0).any(0).mean()) if is_measured else None,
            seconds=seconds,
            data_seconds=data_seconds,
            has_bad_images=bool(rows[:, -1].any()),
        )
