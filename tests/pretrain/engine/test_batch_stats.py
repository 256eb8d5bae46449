"""BatchNorm's statistics, averaged over the ranks."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.support.ranks import run_on_ranks

pytestmark = pytest.mark.slow  # several processes per test

STEPS, RANKS, DECAY = 4, 2, 0.8


def worker(averaging: str, ema_decay: float) -> dict[str, Any]:
    """Runs one rank: a small network sees other data on each rank; statistics are averaged after every step, after the last, or never."""
    from pretrain.engine.batch_stats import BatchStats

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 5, 1), nn.ReLU(), nn.BatchNorm2d(5))
    nn.init.normal_(model[0].running_mean)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    stats = BatchStats(model, ema_decay)
    kept = all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    start = stats.flat.tolist()
    seen, steps = [], []
    for step in range(STEPS):
        flat = stats.flat.clone()
        model(torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(10 * step + rank)) * (1 + rank) + rank)
        seen.append(not torch.equal(flat, stats.flat))  # a forward pass wrote to `flat` itself
        own = stats.flat.tolist()
        if averaging == "every step" or (averaging == "at the end" and step + 1 == STEPS):
            stats.start_averaging()
            stats.finish()
        steps.append((own, stats.flat.tolist()))
    dist.destroy_process_group()
    buffers = {name: buffer.tolist() for name, buffer in model.named_buffers() if "running" in name}
    return {
        "kept": kept, "seen": seen, "start": start, "steps": steps, "buffers": buffers,
        "flat": stats.flat.tolist(), "ema": stats.ema.tolist(),
        "averages": {name: average.tolist() for name, average in stats.averages.items()},
    }  # fmt: skip


def run(averaging: str, ema_decay: float = 0.0) -> list[dict[str, Any]]:
    return run_on_ranks(RANKS, worker, averaging=averaging, ema_decay=ema_decay)


@pytest.fixture(scope="module")
def every_step() -> list[dict[str, Any]]:
    return run("every step", DECAY)


def test_buffers_are_views_of_one_flat_tensor(every_step: list[dict[str, Any]]) -> None:
    for result in every_step:
        assert result["kept"]
        assert result["seen"] == [True] * STEPS
        assert list(result["buffers"]) == ["0.running_mean", "0.running_var", "3.running_mean", "3.running_var"]
        assert [value for buffer in result["buffers"].values() for value in buffer] == result["flat"]
        assert [value for average in result["averages"].values() for value in average] == result["ema"]
        assert list(result["averages"]) == list(result["buffers"])


def test_ranks_agree_on_the_mean_of_their_statistics(every_step: list[dict[str, Any]]) -> None:
    one, other = every_step
    for (mine, after), (theirs, after_there) in zip(one["steps"], other["steps"], strict=True):
        assert after == after_there
        torch.testing.assert_close(torch.tensor(after), (torch.tensor(mine) + torch.tensor(theirs)) / 2)
        assert mine != theirs


def test_the_average_follows_its_formula(every_step: list[dict[str, Any]]) -> None:
    one, other = every_step
    assert one["ema"] == other["ema"]
    expected = torch.tensor(one["start"]).double()
    for _, after in one["steps"]:
        expected = DECAY * expected + (1 - DECAY) * torch.tensor(after).double()
    torch.testing.assert_close(torch.tensor(one["ema"]).double(), expected, rtol=1e-5, atol=1e-6)


def test_averaging_every_step_is_averaging_once(every_step: list[dict[str, Any]]) -> None:
    once = run("at the end")
    torch.testing.assert_close(torch.tensor(once[0]["flat"]), torch.tensor(every_step[0]["flat"]))
    assert once[0]["flat"] == once[1]["flat"]
    assert once[0]["ema"] == once[0]["flat"]  # where no average is kept


def test_without_averaging_the_ranks_drift_apart() -> None:
    one, other = run("never")
    assert not torch.allclose(torch.tensor(one["flat"]), torch.tensor(other["flat"]), rtol=0.1)
