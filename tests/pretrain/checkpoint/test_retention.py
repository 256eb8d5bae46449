"""Which checkpoints stay."""

import itertools
from pathlib import Path

import pytest

from pretrain.checkpoint.retention import Retention, Saved, get_score


def saved(*steps: int, scores: dict[int, float] | None = None) -> list[Saved]:
    return [Saved(Path(str(step)), step, (scores or {}).get(step)) for step in steps]


def kept(retention: Retention, entries: list[Saved], whole: int) -> list[int]:
    gone = {int(path.name) for path in retention.select_expired(entries, whole)}
    return [entry.step for entry in entries if entry.step not in gone]


def test_the_last_ones_stay() -> None:
    assert kept(Retention(3), saved(1, 2, 3, 4, 5), 5) == [3, 4, 5]
    assert kept(Retention(1), saved(1, 2, 3), 3) == [3]
    assert kept(Retention(9), saved(1, 2, 3), 3) == [1, 2, 3]


def test_multiples_stay_for_good() -> None:
    assert kept(Retention(2, every=10), saved(5, 10, 15, 20, 25, 30), 30) == [10, 20, 25, 30]


@pytest.mark.parametrize(("best", "stays"), [("top1", 2), ("loss", 3), ("none", None)])
def test_the_best_stays(best: str, stays: int | None) -> None:
    scores = {1: 0.5, 2: 0.9, 3: 0.1}
    entries = saved(1, 2, 3, 4, 5, scores=scores if best != "none" else None)
    assert kept(Retention(1, best=best), entries, 5) == sorted({5} | ({stays} if stays else set()))  # type: ignore[arg-type]


def test_of_equally_good_ones_the_newer_stays() -> None:
    assert kept(Retention(1, best="top1"), saved(1, 2, 3, scores={1: 0.5, 2: 0.5}), 3) == [2, 3]


def test_the_last_whole_one_always_stays_and_what_claims_to_be_newer_is_left_alone() -> None:
    """For every set of checkpoints, of which the newest may be damaged, and every number to keep."""
    steps = range(1, 7)
    for count in range(1, 7):
        for present in itertools.combinations(steps, count):
            for whole in present:
                for last in range(1, 4):
                    stays = kept(Retention(last), saved(*present), whole)
                    assert whole in stays
                    assert [step for step in present if step > whole] == [step for step in stays if step > whole]
                    assert len([step for step in stays if step <= whole]) == min(last, len([step for step in present if step <= whole]))


def test_control_by_names_alone_the_last_whole_one_would_go() -> None:
    """Steps 4 and 5 are damaged; to take the newest name for whole keeps just these."""
    assert kept(Retention(2), saved(1, 2, 3, 4, 5), whole=3) == [2, 3, 4, 5]
    assert 3 not in kept(Retention(2), saved(1, 2, 3, 4, 5), whole=5)


def test_a_score_is_of_the_checkpoint_s_own_weights() -> None:
    """The moving average's where there is one; a checkpoint that carries an earlier evaluation has none."""
    evaluation = {"step": 5, "weight": {"top1": 0.3, "loss": 2.0}, "ema": {"top1": 0.4, "loss": 1.5}}
    assert get_score({"step": 5, "evaluation": evaluation}, "top1") == 0.4
    assert get_score({"step": 5, "evaluation": {"step": 5, "weight": {"top1": 0.3}}}, "top1") == 0.3
    assert get_score({"step": 6, "evaluation": evaluation}, "top1") is None
    assert get_score({"step": 6, "evaluation": None}, "top1") is None
