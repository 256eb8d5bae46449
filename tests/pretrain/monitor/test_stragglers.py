"""The slowest rank of a job is named, although the steps of all ranks take the same time. On CPU ranks with DeepSpeed's engine."""

import time
from typing import Any

import pytest
import torch
from torch import nn

from pretrain.monitor.stragglers import SlowestRank
from tests.support.configs import make_config
from tests.support.ranks import run_on_ranks

pytestmark = pytest.mark.slow

SLOW = 0.6  # seconds more for one rank in every micro-step


def session(zero_stage: int, slow_rank: int, where: str) -> tuple[SlowestRank, list[float]]:
    """Runs intervals of one step and of two steps, of two micro-steps each; returns the slowest rank of the second and its steps' times."""
    import torch.distributed as dist

    from pretrain.engine import distributed
    from pretrain.engine.engine import build_engine
    from pretrain.model.build import build_model
    from pretrain.monitor.stragglers import RankTimer

    torch.set_num_threads(1)
    config = make_config(12, classes=7, engine={"micro_batch": 2, "zero_stage": zero_stage})
    distributed.start(config.engine)
    model = build_model(config)
    slow = dist.get_rank() == slow_rank
    model.stages[1].register_forward_pre_hook(lambda *_: time.sleep(SLOW if slow and where == "forward" else 0))  # type: ignore[index,union-attr]
    engine = build_engine(config, model, 2)
    timer = RankTimer(engine, zero_stage, distributed.gather_hosts())
    for steps in (1, 2):
        times = []
        for _ in range(steps):
            began = time.perf_counter()
            for _ in range(2):
                timer.begin()
                time.sleep(SLOW if slow and where == "data" else 0)
                loss = nn.functional.cross_entropy(engine(torch.randn(2, 3, 32, 32)), torch.arange(2))
                engine.backward(loss)
                engine.step()
            times.append(time.perf_counter() - began)
        slowest = timer.close()
    distributed.stop()
    return slowest, times


@pytest.mark.parametrize(("zero_stage", "slow_rank", "where"), [(1, 1, "forward"), pytest.param(3, 2, "data", marks=pytest.mark.long)])
def test_the_slow_rank_is_named(zero_stage: int, slow_rank: int, where: str) -> None:
    results: list[Any] = run_on_ranks(3, session, zero_stage=zero_stage, slow_rank=slow_rank, where=where)
    slowest = results[0][0]
    assert all(other == slowest for other, _ in results)
    assert slowest.rank == slow_rank
    assert slowest.seconds > 4 * SLOW
    assert slowest.seconds - slowest.median > 2 * SLOW
    # The control: the steps of all ranks take the same time.
    whole = [sum(times) for _, times in results]
    assert min(whole) > 4 * SLOW
    assert max(whole) - min(whole) < SLOW
