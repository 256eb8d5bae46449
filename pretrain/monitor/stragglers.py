"""Finds the rank that slows the others down.

Ranks wait for each other when they reduce gradients, so a step takes the same time on all of them. They differ in the time before that:
from the beginning of a micro-step to the end of its forward pass, no rank waits for another.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pretrain.engine import distributed

REMARK_ABOVE = 0.15  # excess of the slowest rank's time over the median, as a share of the median
Moment = float | torch.cuda.Event


@dataclass(frozen=True)
class SlowestRank:
    """Holds the seconds that the slowest rank took without waiting for others, and the (lower) median of all ranks."""

    rank: int
    host: str
    seconds: float
    median: float

    def record(self) -> dict[str, Any]:
        """Returns the values for metrics.jsonl."""
        return {"slowest_rank": self.rank, "slowest_host": self.host, "slowest_ratio": self.seconds / self.median}

    def remark(self) -> str:
        """Returns a remark for the log line, empty unless the rank is much slower than the median."""
        excess = self.seconds / self.median - 1
        return f"  slowest rank {self.rank} on {self.host}, +{excess:.0%}" if excess > REMARK_ABOVE else ""


class RankTimer:
    """Sums the time in which this rank waits for no other rank: data, mixing and the forward pass of each micro-step.

    On a GPU the time is that between two events on the device's stream: waiting for data counts only while the device is idle, and only
    `close` waits for the device. On a CPU it is the host's time. ZeRO-3 gathers weights in the forward pass, so the time ends before the
    forward pass, and ranks differ only by late data.
    """

    def __init__(self, engine: Any, zero_stage: int, hosts: Sequence[str]):
        self._device, self._hosts = engine.device, hosts
        self._spans: list[tuple[Moment, Moment]] = []
        self._unused: list[torch.cuda.Event] = []
        self._began: Moment | None = None
        if zero_stage == 3:
            engine.module.register_forward_pre_hook(lambda *_: self._end(), prepend=True)  # before DeepSpeed's hooks, which gather weights
        else:
            engine.module.register_forward_hook(lambda *_: self._end())

    def begin(self) -> None:
        """Starts the time of a micro-step."""
        self._began = self._now()

    def close(self) -> SlowestRank:
        """Returns the slowest rank since the last `close`; wait for the device before the call. Collective."""
        times = distributed.all_gather_tensors(torch.tensor([self._take()], dtype=torch.float32, device=self._device)).flatten().tolist()
        rank = max(range(len(times)), key=times.__getitem__)
        return SlowestRank(rank, self._hosts[rank], times[rank], statistics.median_low(times))

    def _end(self) -> None:
        if self._began is not None:
            self._spans.append((self._began, self._now()))
            self._began = None

    def _now(self) -> Moment:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = self._unused.pop() if self._unused else torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _take(self) -> float:
        spans, self._spans = self._spans, []
        if self._device.type != "cuda":
            return sum(end - begin for begin, end in spans)  # type: ignore[operator,misc]
        self._unused += [event for span in spans for event in span]  # type: ignore[misc]
        return sum(begin.elapsed_time(end) for begin, end in spans) / 1000  # type: ignore[union-attr,arg-type]
