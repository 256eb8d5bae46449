"""When training goes back, what is kept of bad steps, and that the batches that led there are left out."""

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
from data.synthetic.synthesize import synthesize
from pretrain.config import GuardConfig
from pretrain.monitor.interval import Steps
from pretrain.monitor.rollback import Bad, Rollbacks, Watch, bad_steps, evidence, recorded
from tests.faults import jobs


def steps(losses: list[float], first: int = 0, ranks: int = 2) -> Steps:
    """Of these losses on all ranks; those that are not finite were skipped."""
    own = np.tile(np.array(losses, np.float32), (ranks, 1))
    skipped = ~np.isfinite(own[0])
    return Steps(list(range(first, first + len(losses))), own, np.where(skipped, np.nan, 1.0), skipped, 0.0, 1.0, 0.0, False)


# ---------------------------------------------------------------- when

NAN = math.nan


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([2.0] * 150, None),
        ([2.0] * 120 + [NAN, NAN] + [2.0] + [NAN, NAN] + [2.0], None),
        ([2.0] * 5 + [NAN] * 3, Bad(5, 7, "3 steps in a row were not finite")),
        ([2.0] * 100 + [3.9, 2.0], None),
        ([2.0] * 100 + [2.0, 4.1, 9.0], Bad(101, 101, "a loss of 4.1000, where those before it are 2.0000 on average")),
        ([2.0] * 99 + [4.1], None),  # too early to know what is usual
        ([6.0 - 0.01 * step for step in range(400)] + [4.8], Bad(400, 400, "")),  # the average follows a loss that falls
    ],
)  # fmt: skip
@pytest.mark.parametrize("interval", [1, 7, 1000])
def test_when_training_goes_back(losses: list[float], expected: Bad | None, interval: int) -> None:
    """The same however often the device is read."""
    spike = 2.0 if len(losses) < 300 else 1.5
    watch = Watch(GuardConfig(spike=spike, skipped=3))
    found = None
    for first in range(0, len(losses), interval):
        found = found or watch.judge(steps(losses[first : first + interval], first))
    assert (found is None) == (expected is None)
    if found is not None and expected is not None:
        assert (found.first, found.last) == (expected.first, expected.last)
        assert found.reason.startswith(expected.reason)


def test_without_a_factor_no_loss_is_too_high() -> None:
    assert Watch(GuardConfig()).judge(steps([2.0] * 200 + [1e6])) is None


def test_what_was_seen_goes_through_a_checkpoint() -> None:
    losses = [2.0 + 0.01 * (step % 7) for step in range(130)]
    whole, first, second = (Watch(GuardConfig(spike=2.0)) for _ in range(3))
    whole.judge(steps([*losses, NAN]))
    first.judge(steps(losses[:77]))
    second.load(json.loads(json.dumps(first.state())))
    second.judge(steps([*losses[77:], NAN], 77))
    assert second.state() == whole.state()
    assert whole.state()["run"] == 1


def test_rollbacks_are_kept_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "rollbacks.json"
    assert recorded(file) == []
    rollbacks = Rollbacks(file, [])
    assert rollbacks.add(Bad(5, 7, "so"), 10, 4)["first"] == 0
    rollbacks.add(Bad(50, 50, "so"), 3, 40)
    rollbacks.write()
    again = Rollbacks(file, recorded(file))
    assert [step for step in range(60) if again.is_skipped(step)] == [*range(8), 47, 48, 49, 50]


# ---------------------------------------------------------------- evidence


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drawn")
    synthesize(folder, classes=4, train=32, val=8)
    return folder


def test_what_is_kept_of_a_bad_step(drawn: Path) -> None:
    index = open_index(drawn / "train", None)
    order = make_sample_order(index, DataConfig(lanes=4, window=16), seed=1, global_batch=8)
    losses = np.array([[2.0, NAN, 2.0, 2.0], [2.0, 2.0, math.inf, 9.0]], np.float32)
    found = Steps([2, 3, 4, 6], losses, np.array([1, NAN, NAN, 5.0]), np.array([False, True, True, False]), 0.0, 1.0, 0.0, False)
    assert bad_steps(found, None, scales=False) == [1, 2]
    assert bad_steps(found, Bad(6, 6, "high"), scales=False) == [1, 2, 3]
    kept = [evidence(found, position, order, index, ["one", "two"]) for position in (1, 2, 3)]
    assert [[about["host"] for about in one["ranks"]] for one in kept] == [["one"], ["two"], ["one", "two"]]
    assert [one["loss"] for one in kept] == ["nan", "inf", 5.5]
    samples = order.batch(*order.locate(3))[:4].tolist()
    assert kept[0]["ranks"][0]["samples"] == samples
    assert kept[0]["ranks"][0]["keys"] == [f"{key}" for key in kept[0]["ranks"][0]["keys"]]
    assert kept[2]["epoch"] == 1
    json.loads(json.dumps(kept, allow_nan=False))


def test_an_overflow_that_only_moves_the_loss_scale_is_nothing_to_keep() -> None:
    losses = np.array([[2.0, 2.0], [2.0, NAN]], np.float32)
    found = Steps([0, 1], losses, np.array([math.inf, NAN]), np.array([True, True]), 0.0, 1.0, 0.0, False)
    assert bad_steps(found, None, scales=True) == [1]
    assert bad_steps(found, None, scales=False) == [0, 1]


# ---------------------------------------------------------------- whole jobs


def poison(bad: set[int]) -> None:
    """In rank 1's process: the loss of these steps is not a number."""
    import torch.distributed as dist

    from pretrain import train

    rate, loss, now = train.learning_rate, train.mixed_cross_entropy, SimpleNamespace(step=-1)

    def learning_rate(step: int, *args: Any) -> float:
        now.step = step
        return rate(step, *args)

    def mixed_cross_entropy(*args: Any) -> torch.Tensor:
        return loss(*args) * (NAN if now.step in bad and dist.get_rank() == 1 else 1.0)

    train.learning_rate, train.mixed_cross_entropy = learning_rate, mixed_cross_entropy


def play(folder: Path, drawn: Path, *overrides: str, change: Callable[[], None] | None = None) -> list[int | None]:
    return jobs.run(folder, drawn, "guard.skipped=2", "guard.pass_over=1", "run.log_every=3", "run.keep=3", *overrides, change=change).codes


@pytest.mark.slow
def test_a_job_goes_back_and_passes_over_what_led_there(drawn: Path, tmp_path: Path) -> None:
    assert play(tmp_path / "one", drawn, change=partial(poison, {4, 5})) == [0, 0]
    run = tmp_path / "one" / "run"
    assert [(entry["first"], entry["last"], entry["to_step"]) for entry in recorded(run / "rollbacks.json")] == [(3, 5, 4)]
    kept = [json.loads(line) for line in (run / "bad_steps.jsonl").read_text().splitlines()]
    assert [(one["step"], one["skipped"], [about["rank"] for about in one["ranks"]]) for one in kept] == [(4, True, [1]), (5, True, [1])]
    log = jobs.log_of(tmp_path / "one")
    assert "steps 4 to 5 went wrong: 2 steps in a row were not finite" in log
    assert "Going back to step 4; the batches of steps 3 to 5 are left out" in log
    # As a job that has left out these batches from the start, and had no bad numbers.
    (tmp_path / "other" / "run").mkdir(parents=True)
    (tmp_path / "other" / "run" / "rollbacks.json").write_text(json.dumps([{"first": 4, "last": 5}]))
    assert play(tmp_path / "other", drawn) == [0, 0]
    one, other = jobs.final_state(tmp_path / "one"), jobs.final_state(tmp_path / "other")
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    # The control: a job that leaves out nothing ends elsewhere.
    assert play(tmp_path / "plain", drawn) == [0, 0]
    assert not torch.equal(jobs.final_state(tmp_path / "plain")["weight/head.weight"], one["weight/head.weight"])


@pytest.mark.slow
def test_a_job_that_goes_wrong_again_and_again_ends_with_the_evidence(drawn: Path, tmp_path: Path) -> None:
    assert play(tmp_path / "one", drawn, "guard.rollbacks=1", "guard.pass_over=0", change=partial(poison, {3, 4, 5, 6})) == [2, 2]
    log = jobs.log_of(tmp_path / "one")
    assert "Training has gone back 1 times (guard.rollbacks), and ends here" in log
    assert "Traceback" not in log
    assert (tmp_path / "one" / "run" / "bad_steps.jsonl").exists()
    # Where there is no checkpoint to go back to.
    assert play(tmp_path / "two", drawn, change=partial(poison, {0, 1})) == [2, 2]
    assert "has no checkpoint of step 0 or before" in jobs.log_of(tmp_path / "two")
