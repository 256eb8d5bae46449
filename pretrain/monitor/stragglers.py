"""Which rank holds the others up.

    own = OwnTime(engine, config.engine.zero_stage, hosts)
    for each micro-step: own.begin(); batch = next(batches); loss = f(engine(images)); engine.backward(loss); …
    slowest = own.close()            # at a log line, after the device has been waited for

Ranks meet where gradients are reduced, and there the fast ones wait for the slow ones: a step takes all of them as long. What tells them
apart is the time before, from the beginning of a micro-step to the end of its forward pass, in which nobody waits for anybody.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from pretrain.engine.distributed import all_gather_tensors

MUCH = 0.15  # more time than the median's that is worth a remark
Moment = float | torch.cuda.Event


@dataclass(frozen=True)
class Slowest:
    """The rank with the most time of its own, and how much of it the ranks' (lower) median has, in seconds."""

    rank: int
    host: str
    seconds: float
    median: float

    def record(self) -> dict[str, Any]:
        return {"slowest_rank": self.rank, "slowest_host": self.host, "slowest_ratio": self.seconds / self.median}

    def remark(self) -> str:
        """For a log line: empty as long as the rank is not much slower than the others."""
        slower = self.seconds / self.median - 1
        return f"  slowest rank {self.rank} on {self.host}, +{slower:.0%}" if slower > MUCH else ""


class OwnTime:
    """Sums what this rank's micro-steps take by themselves: the wait for data, mixing and the forward pass. `hosts` are those of the ranks.

    On a GPU that is the device's time between two events on its stream, so waiting for data counts as far as it leaves the device idle,
    and nothing is waited for until `close`. On a CPU it is the host's. Of the backward pass nothing is measured: its reductions wait for
    others. ZeRO-3 gathers weights in the forward pass, so there the time ends before that, and only late data tells ranks apart.
    """

    def __init__(self, engine: Any, zero_stage: int, hosts: Sequence[str]):
        self._on_gpu = engine.device.type == "cuda"
        self._spans: list[tuple[Moment, Moment]] = []
        self._unused: list[torch.cuda.Event] = []
        self._began: Moment | None = None
        self._hosts = hosts
        if zero_stage == 3:
            engine.module.register_forward_pre_hook(lambda *_: self._end(), prepend=True)  # DeepSpeed's own hooks gather
        else:
            engine.module.register_forward_hook(lambda *_: self._end())

    def begin(self) -> None:
        """Call at the beginning of each micro-step."""
        self._began = self._now()

    def close(self) -> Slowest:
        """The slowest rank since the last `close`. Collective; the device must have been waited for."""
        return slowest(self._take(), self._hosts)

    def _end(self) -> None:
        if self._began is not None:
            self._spans.append((self._began, self._now()))
            self._began = None

    def _now(self) -> Moment:
        if not self._on_gpu:
            return time.perf_counter()
        event = self._unused.pop() if self._unused else torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _take(self) -> float:
        spans, self._spans = self._spans, []
        if not self._on_gpu:
            return sum(end - begin for begin, end in spans)  # type: ignore[operator,misc]
        self._unused += [event for span in spans for event in span]  # type: ignore[misc]
        return sum(begin.elapsed_time(end) for begin, end in spans) / 1000  # type: ignore[union-attr,arg-type]


def slowest(seconds: float, hosts: Sequence[str]) -> Slowest:
    """The rank that has the most of these seconds, of which each rank gives its own. Collective, and waits for the device."""
    device = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
    own = torch.tensor(seconds, dtype=torch.float32, device=device)
    times = all_gather_tensors(own).tolist()
    rank = max(range(len(times)), key=times.__getitem__)
    return Slowest(rank, hosts[rank], times[rank], statistics.median_low(times))
