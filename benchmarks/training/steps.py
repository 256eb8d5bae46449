"""Measures training steps: finds the best micro-batch of each case, then runs some steps of every case in each round."""

import gc
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import median_ratio, run_in_turns, synchronize, time_call
from benchmarks.training.step_cases import Case, Job, Step, new_model

WARM_UP_STEPS = {"cuda": 5, "cpu": 1}  # for cuDNN's and the compilers' choices
TIMED_STEPS = {"cuda": 10, "cpu": 1}  # of each case in a round


@dataclass
class Measurement:
    """The measurements of a case, incomplete after a `failure`."""

    case: Case
    batch: int = 0  # images per step
    first_loss: float = 0.0  # of the first step; cases of one model and batch agree up to rounding
    step_s: list[float] = field(default_factory=list)  # seconds per step, for each round
    memory_bytes: int = 0  # peak of its tensors on the GPU
    failure: str | None = None

    @property
    def images_per_s(self) -> list[float]:
        return [self.batch / duration for duration in self.step_s]

    def attempt(self, part: Callable[[], object]) -> None:
        """Runs a part of the measurement unless an earlier one failed; an exception becomes the failure.

        Compilers, kernels and the authors' code raise many types of exceptions, none of which may stop the other cases.
        """
        if self.failure is not None:
            return
        try:
            part()
        except Exception as error:
            self.failure = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0] or 'no message'}"
            print(f"{self.case.name:22} failed: {self.failure}", flush=True)


@dataclass
class Running:
    """A training step with its batch. `resting_bytes`: GPU memory of its weights, optimizer states and images."""

    step: Step
    images: Tensor
    labels: Tensor
    resting_bytes: int

    def __call__(self) -> Tensor:
        return self.step(self.images, self.labels)


def start(case: Case, job: Job, batch: int) -> Running:
    """Builds a case, with images and labels from a fixed seed."""
    before = _allocated(job.device)
    step = case.build(replace(job, batch=batch))
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(batch, 3, job.image_size, job.image_size, generator=generator)
    labels = torch.randint(job.classes, (batch,), generator=generator)
    layout = torch.channels_last if case.channels_last else torch.contiguous_format
    images, labels = images.to(job.device).to(memory_format=layout), labels.to(job.device)
    torch.manual_seed(2)  # for drop path
    return Running(step, images, labels, _allocated(job.device) - before)


def best_batch(images_per_s: Callable[[int], float], first: int) -> int:
    """Doubles the micro-batch from `first` until it no longer fits or is no faster; returns the last good one.

    If `first` does not fit, returns the first of its halves, quarters, … that does.

    Raises:
        torch.OutOfMemoryError: not even one image fits.
    """
    batch, fastest = first, 0.0
    while not fastest:
        try:
            fastest = images_per_s(batch)
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
            batch //= 2
    while batch >= first:
        try:
            rate = images_per_s(2 * batch)
        except torch.OutOfMemoryError:
            break
        if rate <= fastest:
            break
        batch, fastest = 2 * batch, rate
    return batch


def measure(job: Job, cases: Sequence[Case], *, batch: int | None, rounds: int, first: int = 32) -> list[Measurement]:
    """Measures all cases in `rounds` turns and prints their progress; a case that fails does not stop the others.

    `batch` is the images per step of all cases; None searches the best of each, starting at `first`.
    """
    measured = {case.name: Measurement(case) for case in cases}
    for one in measured.values():
        one.attempt(partial(_choose_batch, one, measured, job, batch, first))
    running: dict[str, Running] = {}
    _free_memory(job.device)
    for one in measured.values():
        one.attempt(partial(_warm_up, one, job, running))
    run_in_turns({name: partial(one.attempt, partial(_run_turn, one, running, job.device)) for name, one in measured.items()}, rounds)
    running.clear()
    _free_memory(job.device)
    return list(measured.values())


def _choose_batch(one: Measurement, measured: dict[str, Measurement], job: Job, batch: int | None, first: int) -> None:
    if batch is not None:
        one.batch = batch
    elif one.case.batch_of in measured:
        one.batch = measured[one.case.batch_of].batch or first
    else:
        # Reserves the memory that weights, gradients and moments of all other cases take during the rounds.
        parameters = sum(p.numel() for p in new_model(job).parameters())
        others = torch.empty(16 * parameters * (len(measured) - 1), dtype=torch.uint8, device=job.device)

        def images_per_s(size: int) -> float:
            _free_memory(job.device)
            running = start(one.case, job, size)
            _step_seconds(running, WARM_UP_STEPS[job.device.type], job.device)
            rate = size / _step_seconds(running, TIMED_STEPS[job.device.type], job.device)
            print(f"{one.case.name:22} micro-batch {size:4} {rate:9.1f} images/s", flush=True)
            return rate

        one.batch = best_batch(images_per_s, first)
        del others


def _warm_up(one: Measurement, job: Job, running: dict[str, Running]) -> None:
    before = _allocated(job.device)
    if one.case.holds_memory:
        torch.cuda.reset_peak_memory_stats(job.device)
    step = start(one.case, job, one.batch)
    one.first_loss = float(step())
    if one.case.holds_memory:
        one.memory_bytes = torch.cuda.max_memory_allocated(job.device) - before
    _step_seconds(step, WARM_UP_STEPS[job.device.type], job.device)
    running[one.case.name] = step
    print(f"{one.case.name:22} micro-batch {one.batch}, loss of the first step {one.first_loss:.4f}", flush=True)


def _run_turn(one: Measurement, running: dict[str, Running], device: torch.device) -> None:
    before, step = _allocated(device), running[one.case.name]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    one.step_s.append(_step_seconds(step, TIMED_STEPS[device.type], device))
    if device.type == "cuda":
        one.memory_bytes = max(one.memory_bytes, torch.cuda.max_memory_allocated(device) - before + step.resting_bytes)
    print(f"{one.case.name:22} {one.images_per_s[-1]:9.2f} images/s", flush=True)


def _step_seconds(running: Running, count: int, device: torch.device) -> float:
    """Returns the seconds per step over `count` steps, with the device synchronized only before and after all of them."""

    def run() -> None:
        for _ in itertools.repeat(None, count):
            running()
        synchronize(device)

    synchronize(device)
    return time_call(run) / count


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _free_memory(device: torch.device) -> None:
    """Frees unreferenced memory and compiled code."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def row(one: Measurement, measured: Sequence[Measurement]) -> dict[str, Any]:
    """Returns a row with the rates of all rounds, for our cases also the ratios to the authors'; or with the failure."""
    if one.failure is not None:
        return {"case": one.case.name, "failed": one.failure}
    result = {"case": one.case.name, "micro_batch": one.batch, "first_loss": one.first_loss, "images_per_s": one.images_per_s}
    if one.memory_bytes:
        result["memory_gb"] = one.memory_bytes / 1e9
    if not one.case.is_peer:
        peers = [other for other in measured if other.case.is_peer and other.failure is None]
        result |= {f"times_{peer.case.name}": median_ratio(one.images_per_s, peer.images_per_s) for peer in peers}
    return result
