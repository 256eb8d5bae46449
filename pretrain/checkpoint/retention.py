"""Which checkpoints a run keeps: the last ones, one every so many steps, the best.

retention = Retention(last=3, every=17330, best="top1")
for path in retention.let_go(saved_in(folder, "top1"), just_saved): remove(path)
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pretrain.run.directory import TRAINER, list_checkpoints, step_of

Best = Literal["none", "top1", "top5", "loss"]


@dataclass(frozen=True)
class Saved:
    """A checkpoint on disk, and how good its own weights were found; None where they were not evaluated."""

    path: Path
    step: int
    score: float | None


@dataclass(frozen=True)
class Retention:
    """Args:
    last: how many of the newest to keep, at least 1.
    every: keep those of steps that are a multiple of this; 0: none.
    best: keep the best by this result of an evaluation, of the moving average where there is one; "none": none.
    """

    last: int
    every: int = 0
    best: Best = "none"

    def let_go(self, saved: Sequence[Saved], whole: int) -> list[Path]:
        """Those that need not stay.

        Args:
            saved: all checkpoints.
            whole: the step of one that is known to be whole, the newest such. It stays. What claims to be newer was passed over
                when the run resumed, so it neither counts nor goes: the run writes it anew when it gets there.
        """
        until = [one for one in saved if one.step <= whole]
        keep = {one.step for one in sorted(until, key=lambda one: one.step)[-self.last :]} | {whole}
        if self.every:
            keep |= {one.step for one in until if one.step % self.every == 0}
        scored = [(-one.score if self.best == "loss" else one.score, one.step) for one in until if one.score is not None]
        if self.best != "none" and scored:
            keep.add(max(scored)[1])
        return [one.path for one in until if one.step not in keep]


def saved_in(folder: Path, best: Best) -> list[Saved]:
    """The checkpoints of a run, the oldest first, with their scores by `best`."""
    return [Saved(path, step_of(path), _score(path, best)) for path in list_checkpoints(folder)]


def score_of(trainer: dict[str, Any], best: Best) -> float | None:
    """The evaluation of a checkpoint's own weights; None where it carries that of an earlier step, or none."""
    evaluation = trainer["evaluation"]
    if best == "none" or evaluation is None or evaluation["step"] != trainer["step"]:
        return None
    return evaluation["ema" if "ema" in evaluation else "weight"][best]


def _score(path: Path, best: Best) -> float | None:
    if best == "none":
        return None
    try:
        return score_of(json.loads((path / TRAINER).read_bytes()), best)
    except (OSError, ValueError):  # damaged: it can't be the best, but is one of the last
        return None
