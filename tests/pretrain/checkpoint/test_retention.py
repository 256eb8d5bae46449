"""Checkpoints that a run keeps."""

import itertools
from pathlib import Path

import pytest

from pretrain.checkpoint.retention import Retention, Saved, get_score


def keep(retention: Retention, steps: tuple[int, ...], newest_whole: int, scores: dict[int, float] | None = None) -> list[int]:
    """Returns the steps of the checkpoints that stay."""
    saved = [Saved(Path(str(step)), step, (scores or {}).get(step)) for step in steps]
    expired = {int(path.name) for path in retention.select_expired(saved, newest_whole)}
    return [step for step in steps if step not in expired]


def test_the_newest_up_to_the_newest_whole_one_stay_and_later_ones_are_ignored() -> None:
    """For every set of checkpoints, of which the newest may be damaged, and every number to keep."""
    for count in range(1, 7):
        for present in itertools.combinations(range(1, 7), count):
            for whole in present:
                for last in range(1, 4):
                    until = [step for step in present if step <= whole]
                    assert keep(Retention(last), present, whole) == until[-last:] + [step for step in present if step > whole]


def test_checkpoints_at_multiples_stay() -> None:
    assert keep(Retention(2, every=10), (5, 10, 15, 20, 25, 30), 30) == [10, 20, 25, 30]


@pytest.mark.parametrize(("best", "stays"), [("top1", [2, 5]), ("loss", [3, 5]), ("none", [5])])
def test_the_best_checkpoint_stays(best: str, stays: list[int]) -> None:
    scores = {1: 0.5, 2: 0.9, 3: 0.1}
    assert keep(Retention(1, best=best), (1, 2, 3, 4, 5), 5, scores if best != "none" else None) == stays  # type: ignore[arg-type]


def test_a_score_is_of_the_checkpoints_own_weights() -> None:
    """The moving average's where there is one; a checkpoint that carries an earlier evaluation has none."""
    evaluation = {"step": 5, "weight": {"top1": 0.3, "loss": 2.0}, "ema": {"top1": 0.4, "loss": 1.5}}
    assert get_score({"step": 5, "evaluation": evaluation}, "top1") == 0.4
    assert get_score({"step": 5, "evaluation": {"step": 5, "weight": {"top1": 0.3}}}, "top1") == 0.3
    assert get_score({"step": 6, "evaluation": evaluation}, "top1") is None
    assert get_score({"step": 6, "evaluation": None}, "top1") is None
