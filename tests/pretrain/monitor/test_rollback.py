"""Rollbacks: which steps are bad, the evidence of them, and that the batches that led there are skipped."""

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from data.dataset.index import open_index
from data.loader.order import make_sample_order
from data.settings import DataConfig
from pretrain.config import GuardConfig
from pretrain.monitor.interval import Steps
from pretrain.monitor.rollback import BadSteps, DivergenceWatch, Evidence, Rollbacks, read_rollbacks
from pretrain.run.log import RunLog
from tests.faults import jobs

NAN = math.nan


def steps(losses: list[list[float]], numbers: list[int], grad_norms: list[float] | None = None) -> Steps:
    """Returns steps of these losses by rank; a step is skipped if a loss is not finite."""
    array = np.array(losses, np.float32)
    skipped = ~np.isfinite(array).all(0)
    norms = np.array(grad_norms) if grad_norms else np.where(skipped, np.nan, 1.0)
    return Steps(numbers, array, norms, skipped, None, seconds=1.0, data_seconds=0.0, has_bad_images=False)


def alike(losses: list[float], first: int = 0) -> Steps:
    """Returns steps in a row whose losses are the same on both ranks."""
    return steps([losses, losses], list(range(first, first + len(losses))))


# ---------------------------------------------------------------- detection


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([2.0] * 150, None),
        ([2.0] * 120 + [NAN, NAN] + [2.0] + [NAN, NAN] + [2.0], None),
        ([2.0] * 5 + [NAN] * 3, BadSteps(5, 7, "3 steps in a row were not finite")),
        ([2.0] * 100 + [2.0, 4.1, 9.0], BadSteps(101, 101, "a loss of 4.1000 after an average of 2.0000")),
        ([2.0] * 99 + [4.1], None),  # too early to know the usual loss
        ([6.0 - 0.01 * step for step in range(400)] + [4.8], BadSteps(400, 400, "")),  # the average follows a falling loss
    ],
)  # fmt: skip
@pytest.mark.parametrize("interval", [1, 7, 1000])
def test_bad_steps_are_the_same_however_often_the_device_is_read(losses: list[float], expected: BadSteps | None, interval: int) -> None:
    watch, bad = DivergenceWatch(GuardConfig(spike=2.0 if len(losses) < 300 else 1.5, skipped=3)), None
    for first in range(0, len(losses), interval):
        bad = bad or watch.find_bad(alike(losses[first : first + interval], first))
    assert (bad is None) == (expected is None)
    if bad is not None and expected is not None:
        assert (bad.first, bad.last) == (expected.first, expected.last)
        assert bad.reason.startswith(expected.reason)


def test_a_resumed_watch_equals_an_uninterrupted_one() -> None:
    losses = [2.0 + 0.01 * (step % 7) for step in range(130)] + [NAN]
    whole, first, second = (DivergenceWatch(GuardConfig(spike=2.0)) for _ in range(3))
    whole.find_bad(alike(losses))
    first.find_bad(alike(losses[:77]))
    second.load(json.loads(json.dumps(first.state())))
    second.find_bad(alike(losses[77:], 77))
    assert second.state() == whole.state()
    assert whole.state()["run"] == 1


def test_skipped_batches_are_kept_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "rollbacks.json"
    assert read_rollbacks(file) == []
    rollbacks = Rollbacks(file, [])
    assert rollbacks.add(BadSteps(5, 7, "so"), skipped_before=10, to_step=4)["first"] == 0
    rollbacks.add(BadSteps(50, 50, "so"), skipped_before=3, to_step=40)
    rollbacks.write()
    again = Rollbacks(file, read_rollbacks(file))
    assert [step for step in range(60) if again.is_skipped(step)] == [*range(8), 47, 48, 49, 50]


# ---------------------------------------------------------------- evidence


def make_evidence(four_classes: Path, run: Path, *, has_loss_scale: bool = False) -> Evidence:
    index = open_index(four_classes / "train", None)
    order = make_sample_order(index, DataConfig(lanes=4, window=16), seed=1, global_batch=8)
    return Evidence(run / "bad_steps.jsonl", RunLog(run / "metrics.jsonl"), order, index, ["one", "two"], has_loss_scale)


def test_evidence_names_ranks_and_samples(four_classes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = steps([[2.0, NAN, 2.0, 2.0], [2.0, 2.0, math.inf, 9.0]], [2, 3, 4, 6], grad_norms=[1, NAN, NAN, 5.0])
    evidence = make_evidence(four_classes, tmp_path)
    assert evidence.find(found, None) == [1, 2]
    evidence.keep(found, BadSteps(6, 6, "high"))
    kept = [json.loads(line) for line in evidence.file.read_text().splitlines()]
    assert [(one["step"], one["loss"], one["skipped"], one["epoch"]) for one in kept] == [
        (3, "nan", True, 0), (4, "inf", True, 1), (6, 5.5, False, 1),
    ]  # fmt: skip
    assert [[part["host"] for part in one["ranks"]] for one in kept] == [["one"], ["two"], ["one", "two"]]
    part = kept[0]["ranks"][0]
    assert part["samples"] == evidence.order.batch(*evidence.order.locate(3))[:4].tolist()
    assert len(part["keys"]) == 4
    line = f"bad step 3 skipped: loss nan, gradient norm nan; rank 0 on one; the samples are in {evidence.file}\n"
    assert line in capsys.readouterr().out


def test_an_overflow_that_only_moves_the_loss_scale_is_not_kept(four_classes: Path, tmp_path: Path) -> None:
    losses, skipped = np.array([[2.0, 2.0], [2.0, NAN]], np.float32), np.array([True, True])
    found = Steps([0, 1], losses, np.array([math.inf, NAN]), skipped, None, seconds=1.0, data_seconds=0.0, has_bad_images=False)
    assert make_evidence(four_classes, tmp_path, has_loss_scale=True).find(found, None) == [1]
    assert make_evidence(four_classes, tmp_path).find(found, None) == [0, 1]


# ---------------------------------------------------------------- whole jobs


def poison(bad: set[int]) -> None:
    """Makes the loss of these steps NaN on rank 1. For a rank's process."""
    import torch.distributed as dist

    from pretrain import train

    rate, loss, now = train.learning_rate, train.mixed_cross_entropy, SimpleNamespace(step=-1)

    def learning_rate(step: int, *args: Any) -> float:
        now.step = step
        return rate(step, *args)

    def mixed_cross_entropy(*args: Any) -> torch.Tensor:
        return loss(*args) * (NAN if now.step in bad and dist.get_rank() == 1 else 1.0)

    train.learning_rate, train.mixed_cross_entropy = learning_rate, mixed_cross_entropy


def run(folder: Path, four_classes: Path, *overrides: str, change: Callable[[], None] | None = None) -> list[int | None]:
    return jobs.run(
        folder, four_classes, "guard.skipped=2", "guard.skip_before=1", "run.log_every=3", "run.keep=3", *overrides, change=change
    ).codes


@pytest.mark.slow
def test_a_job_rolls_back_and_skips_the_batches_that_led_there(four_classes: Path, tmp_path: Path) -> None:
    assert run(tmp_path / "one", four_classes, change=partial(poison, {4, 5})) == [0, 0]
    folder = tmp_path / "one" / "run"
    assert [(entry["first"], entry["last"], entry["to_step"]) for entry in read_rollbacks(folder / "rollbacks.json")] == [(3, 5, 4)]
    kept = [json.loads(line) for line in (folder / "bad_steps.jsonl").read_text().splitlines()]
    assert [(one["step"], one["skipped"], [part["rank"] for part in one["ranks"]]) for one in kept] == [(4, True, [1]), (5, True, [1])]
    log = jobs.log_of(tmp_path / "one")
    assert "steps 4 to 5 are bad: 2 steps in a row were not finite" in log
    assert "Rolled back to step 4; the batches of steps 3 to 5 are skipped" in log
    # The same as a job that has skipped these batches from the start, and had no bad numbers.
    (tmp_path / "other" / "run").mkdir(parents=True)
    (tmp_path / "other" / "run" / "rollbacks.json").write_text(json.dumps([{"first": 4, "last": 5}]))
    assert run(tmp_path / "other", four_classes) == [0, 0]
    one, other = jobs.final_state(tmp_path / "one", 7), jobs.final_state(tmp_path / "other", 7)
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    # The control: a job that skips nothing ends with other weights.
    assert run(tmp_path / "plain", four_classes) == [0, 0]
    assert not torch.equal(jobs.final_state(tmp_path / "plain", 7)["weight/head.weight"], one["weight/head.weight"])


@pytest.mark.slow
def test_a_job_that_can_not_roll_back_ends_with_the_evidence(four_classes: Path, tmp_path: Path) -> None:
    assert run(tmp_path / "one", four_classes, "guard.rollbacks=1", "guard.skip_before=0", change=partial(poison, {3, 4, 5, 6})) == [2, 2]
    log = jobs.log_of(tmp_path / "one")
    assert "Training was rolled back 1 times (guard.rollbacks), and ends here" in log
    assert "Traceback" not in log
    assert (tmp_path / "one" / "run" / "bad_steps.jsonl").exists()
    # Without a checkpoint from before the bad steps.
    assert run(tmp_path / "two", four_classes, change=partial(poison, {0, 1})) == [2, 2]
    assert "has no checkpoint of step 0 or before" in jobs.log_of(tmp_path / "two")
