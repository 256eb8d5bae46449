"""Decides which checkpoints a run keeps: the newest, those at regular intervals, and the best.

retention = Retention(last=3, every=17330, best="top1")
for path in retention.select_expired(list_saved(folder, "top1"), step_of_the_newest_whole_one): remove(path)
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
    """Describes a checkpoint on disk; `score` is the evaluation of its weights, or None if they were not evaluated."""

    path: Path
    step: int
    score: float | None


@dataclass(frozen=True)
class Retention:
    """Selects the checkpoints to keep."""

    last: int  # number of the newest to keep, at least 1
    every: int = 0  # keep the checkpoints at multiples of this many steps; 0: none
    best: Best = "none"  # keep the best by this evaluation result, of the moving average if there is one

    def select_expired(self, saved: Sequence[Saved], newest_whole: int) -> list[Path]:
        """Returns the checkpoints that can be removed; `newest_whole` is the step of the newest whole one, which stays.

        Checkpoints of later steps are damaged: the run skipped them when it resumed. They do not count and are not removed; the run
        overwrites them when it reaches their steps.
        """
        candidates = sorted((each for each in saved if each.step <= newest_whole), key=lambda each: each.step)
        keep = {each.step for each in candidates[-self.last :]} | {newest_whole}
        if self.every:
            keep |= {each.step for each in candidates if each.step % self.every == 0}
        scored = [(-each.score if self.best == "loss" else each.score, each.step) for each in candidates if each.score is not None]
        if self.best != "none" and scored:
            keep.add(max(scored)[1])
        return [each.path for each in candidates if each.step not in keep]


def list_saved(folder: Path, best: Best) -> list[Saved]:
    """Returns the checkpoints of a run, oldest first, with their scores by `best`."""
    saved = []
    for path in list_checkpoints(folder):
        try:
            score = None if best == "none" else get_score(json.loads((path / TRAINER).read_bytes()), best)
        except (OSError, ValueError):  # a damaged checkpoint can't be the best, but can be one of the newest
            score = None
        saved.append(Saved(path, step_of(path), score))
    return saved


def get_score(trainer: dict[str, Any], best: Best) -> float | None:
    """Returns the result `best` of a checkpoint's weights; None if the evaluation in `trainer` is missing or of an earlier step."""
    evaluation = trainer["evaluation"]
    if best == "none" or evaluation is None or evaluation["step"] != trainer["step"]:
        return None
    return evaluation["ema" if "ema" in evaluation else "weight"][best]
