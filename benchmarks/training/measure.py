"""Measures ways to train that take turns: each one's best micro-batch, then rounds in which every way has a stretch of steps.

What else the machine does, and how warm it is, meets all ways alike then, so that their ratios can be trusted further than their times.
"""

import gc
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.training.layers import deciles
from benchmarks.training.ways import Job, Step, Way, new_model

WARM_UP = {"cuda": 5, "cpu": 1}  # steps; cuDNN and compilers choose in them
STRETCH = {"cuda": 10, "cpu": 1}  # steps that a round times of each way


@dataclass
class Measured:
    """A way, and what was found of it; with a `reason` it could not be measured (any further)."""

    way: Way
    batch: int = 0
    loss: float = 0.0  # of the first step; ways of one model and batch agree but for rounding
    step_s: list[float] = field(default_factory=list)  # of each round, a step
    memory_bytes: int = 0  # the most that its tensors took on the GPU
    reason: str | None = None

    @property
    def images_per_s(self) -> list[float]:
        return [self.batch / seconds for seconds in self.step_s]


@dataclass
class Running:
    """A way at work on one batch, over and over."""

    step: Step
    images: Tensor
    labels: Tensor
    at_rest: int  # bytes of its weights, states and images on the GPU

    def __call__(self) -> Tensor:
        return self.step(self.images, self.labels)


def start(way: Way, job: Job, batch: int) -> Running:
    """Builds it, with images and labels that follow from a seed."""
    before = _allocated(job.device)
    step = way.build(replace(job, batch=batch))
    numbers = torch.Generator().manual_seed(1)
    images = torch.randn(batch, 3, job.image_size, job.image_size, generator=numbers)
    labels = torch.randint(job.classes, (batch,), generator=numbers)
    layout = torch.channels_last if way.channels_last else torch.contiguous_format
    running = Running(step, images.to(job.device).to(memory_format=layout), labels.to(job.device), 0)
    torch.manual_seed(2)  # for drop path
    running.at_rest = _allocated(job.device) - before
    return running


def best_batch(images_per_s: Callable[[int], float], first: int) -> int:
    """The micro-batch from which doubling no longer helps: it has no room, or is no faster. Where `first` itself has no room, the largest
    half of it that has.

    Raises:
        torch.OutOfMemoryError: one image has no room.
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


def measure(job: Job, ways: Sequence[Way], *, batch: int | None, rounds: int, first: int = 32) -> list[Measured]:
    """All ways. With a `batch` all take that one; without, each its best, sought from `first` on. Prints what it is about.

    A way that fails is told with its reason, and the others go on.
    """
    found = {way.name: Measured(way) for way in ways}
    for one in found.values():
        _try(one, lambda one=one: _choose_batch(one, found, job, batch, first))  # type: ignore[misc]
    running: dict[str, Running] = {}
    _forget(job.device)
    for one in found.values():
        _try(one, lambda one=one: running.update({one.way.name: _warm(one, job)}))  # type: ignore[misc]
        if one.reason is None:
            print(f"{one.way.name:22} micro-batch {one.batch}, loss of the first step {one.loss:.4f}", flush=True)
    for number in range(rounds):
        for one in list(found.values()) if number % 2 == 0 else reversed(found.values()):
            _try(one, lambda one=one: _turn(one, running[one.way.name], job.device))  # type: ignore[misc]
            if one.reason is None:
                print(f"round {number + 1} of {rounds}  {one.way.name:22} {one.images_per_s[-1]:9.2f} images/s", flush=True)
    running.clear()
    _forget(job.device)
    return list(found.values())


def _try(one: Measured, attempt: Callable[[], object]) -> None:
    """Compilers, kernels and the authors' code fail in ways of their own: whatever it is, it is this way's, and told."""
    if one.reason is not None:
        return
    try:
        attempt()
    except Exception as error:
        one.reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
    if one.reason is not None:
        print(f"{one.way.name:22} failed: {one.reason}", flush=True)


def _choose_batch(one: Measured, found: dict[str, Measured], job: Job, batch: int | None, first: int) -> None:
    if batch is not None:
        one.batch = batch
    elif one.way.batch_of in found:
        one.batch = found[one.way.batch_of].batch or first
    else:
        # In the rounds weights, gradients and moments of all the others stand beside it.
        parameters = sum(p.numel() for p in new_model(job).parameters())
        room = torch.empty(16 * parameters * (len(found) - 1), dtype=torch.uint8, device=job.device)

        def images_per_s(size: int) -> float:
            _forget(job.device)
            running = start(one.way, job, size)
            _steps(running, WARM_UP[job.device.type], job.device)
            rate = size / _steps(running, STRETCH[job.device.type], job.device)
            print(f"{one.way.name:22} micro-batch {size:4} {rate:9.1f} images/s", flush=True)
            return rate

        one.batch = best_batch(images_per_s, first)
        del room


def _warm(one: Measured, job: Job) -> Running:
    before = _allocated(job.device)
    if one.way.holds:
        torch.cuda.reset_peak_memory_stats(job.device)
    running = start(one.way, job, one.batch)
    one.loss = float(running())
    if one.way.holds:
        one.memory_bytes = torch.cuda.max_memory_allocated(job.device) - before
    _steps(running, WARM_UP[job.device.type], job.device)
    return running


def _turn(one: Measured, running: Running, device: torch.device) -> None:
    before = _allocated(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    one.step_s.append(_steps(running, STRETCH[device.type], device))
    if device.type == "cuda":
        one.memory_bytes = max(one.memory_bytes, torch.cuda.max_memory_allocated(device) - before + running.at_rest)


def _steps(running: Running, count: int, device: torch.device) -> float:
    """Seconds a step of so many; the device is waited for before them and behind them, not in between."""
    wait_for(device)
    began = time.perf_counter()
    for _ in itertools.repeat(None, count):
        running()
    wait_for(device)
    return (time.perf_counter() - began) / count


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _forget(device: torch.device) -> None:
    """Gives back the memory of what nobody holds any more, and what was compiled for it."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def ratios(one: Measured, others: Sequence[Measured]) -> dict[str, float]:
    """How many times as many images a second as each other way: the median of the rounds' ratios."""
    return {
        other.way.name: statistics.median(a / b for a, b in zip(one.images_per_s, other.images_per_s, strict=True))
        for other in others
        if other.reason is None
    }


def row(one: Measured, all_found: Sequence[Measured]) -> dict[str, Any]:
    """What is kept of a way: rates, and for ours their ratios to the authors'; or why there are none."""
    if one.reason is not None:
        return {"way": one.way.name, "failed": one.reason}
    peers = [other for other in all_found if other.way.name.startswith("peer")]
    return {
        "way": one.way.name, "micro_batch": one.batch, "first_loss": one.loss, "images_per_s": deciles(one.images_per_s),
        "step_ms": deciles([1000 * seconds for seconds in one.step_s]), "rounds": one.images_per_s,
        **({"memory_gb": one.memory_bytes / 1e9} if one.memory_bytes else {}),
        **({"times_the": ratios(one, peers)} if peers and one not in peers else {}),
    }  # fmt: skip
