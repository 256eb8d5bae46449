"""Reports an interval of training steps as a log line and as a record of metrics.jsonl."""

import math
from dataclasses import dataclass

import torch

from data.common.text import format_duration
from pretrain.engine import distributed
from pretrain.monitor.flops import mfu
from pretrain.monitor.interval import Steps
from pretrain.monitor.stragglers import SlowestRank
from pretrain.run.log import RunLog


@dataclass(frozen=True)
class Reporter:
    """Computes the figures of an interval and writes them."""

    log: RunLog
    total: int  # steps of the whole training
    steps_per_epoch: int
    global_batch: int
    ranks: int
    device: torch.device
    image_flops: float | None  # FLOPs of one image in training (monitor/flops.py); None if unknown
    peak_flops: float | None  # peak FLOP/s of one GPU; None if unknown: no MFU is reported
    has_graphs: bool  # whether the job runs CUDA graphs; decides the advice on launch-bound steps

    def report(self, step: int, steps: Steps, slowest: SlowestRank, *, lr: float, bad_images: int, is_evaluated: bool) -> None:
        """Writes the line and the record of an interval.

        Args:
            step: number of steps done.
            steps: of the interval, at least one.
            slowest: slowest rank of the interval.
            lr: learning rate of the last step.
            bad_images: of the whole run so far.
            is_evaluated: whether an evaluation follows.
        """
        images_per_s = len(steps.numbers) * self.global_batch / steps.seconds
        steps_per_s = images_per_s / self.global_batch
        values: dict[str, float] = steps.means() | {
            "images_per_s": images_per_s,
            "data_wait": steps.data_seconds / steps.seconds,
            "memory_gb": distributed.get_peak_memory_gb(self.device),
            "left_s": (self.total - step) / steps_per_s,
        }
        if self.image_flops is not None and self.peak_flops is not None:
            values["mfu"] = mfu(images_per_s / self.ranks, self.image_flops, self.peak_flops)
        if steps.launch_bound is not None:
            values["launch_bound"] = steps.launch_bound
        counts = {name: count for name, count in (("skipped", int(steps.skipped.sum())), ("bad_images", bad_images)) if count}
        epoch = step / self.steps_per_epoch
        self.log.line(self._line(step, epoch, lr, values, counts) + steps.launch_bound_advice(self.has_graphs) + slowest.remark())
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        plan = {"total": self.total, "evaluates": is_evaluated}
        self.log.record("train", step=step, epoch=epoch, lr=lr, **finite, **counts, **plan, **slowest.record())

    def _line(self, step: int, epoch: float, lr: float, values: dict[str, float], counts: dict[str, int]) -> str:
        parts = [
            f"step {step}/{self.total}",
            f"epoch {epoch:.2f}",
            f"loss {values['loss']:.4f}",
            f"lr {lr:.2e}",
            f"gradient norm {values['grad_norm']:.2f}",
            f"{values['images_per_s']:.0f} images/s, {values['images_per_s'] / self.ranks:.0f} per rank",
            f"waiting for data {values['data_wait']:.0%}",
            f"{values['memory_gb']:.1f} GB",
            f"MFU {values['mfu']:.0%}" if "mfu" in values else "",
            f"{format_duration(values['left_s'])} left",
            *(f"{name.replace('_', ' ')} {count}" for name, count in counts.items()),
        ]
        return "  ".join(filter(None, parts))
