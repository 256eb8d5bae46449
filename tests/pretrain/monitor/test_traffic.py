"""The bytes that a step sends, against the tensors that ranks hand to collectives."""

import os
from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pretrain.monitor.traffic import Collective, list_collectives
from tests.support.configs import make_config
from tests.support.ranks import run_on_ranks

KINDS = {"c10d::allreduce_": "all-reduce", "c10d::_allgather_base_": "all-gather", "c10d::_reduce_scatter_base_": "reduce-scatter"}
ACCUMULATION = 2


class Handed(TorchDispatchMode):
    """While entered, counts the bytes of the whole tensors that collectives of a kind work on."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            self.bytes[KINDS.get(function._schema.name, function._schema.name)] += max(
                one.nbytes for one in tree_leaves(args) if isinstance(one, Tensor)
            )
        return function(*args, **(kwargs or {}))


def measure_step() -> tuple[list[int], int, dict[int, dict[str, int]]]:
    """Returns a model's parameters and channels, and the bytes by collective for each ZeRO stage."""
    import timm

    from pretrain import config as settings
    from pretrain.engine import distributed
    from pretrain.engine.batch_stats import BatchStats
    from pretrain.engine.engine import build_engine
    from pretrain.engine.guard import Guard

    ranks, found = int(os.environ["WORLD_SIZE"]), {}
    for stage in range(4):
        config = make_config(2 * ACCUMULATION * ranks, classes=1000, engine={"micro_batch": 2, "zero_stage": stage})
        if not dist.is_initialized():
            distributed.start(config.engine)
        model = timm.create_model("van_b0", num_classes=1000)
        sizes = [parameter.numel() for parameter in model.parameters()]
        channels = sum(norm.num_features for norm in model.modules() if isinstance(norm, nn.BatchNorm2d))
        engine = build_engine(config, model, settings.accumulation(config, ranks))
        stats, guard = BatchStats(model, 0.0), Guard(engine, clip=1.0, should_scale=False)
        for _ in range(3 if stage == 3 else 1):  # ZeRO-3 learns in its first steps what to gather when, and ranks agree on it
            with Handed() as handed:
                for micro_step in range(ACCUMULATION):
                    logits = engine(torch.randn(2, 3, 32, 32))
                    engine.backward(guard.scale_loss(nn.functional.cross_entropy(logits, torch.zeros(2, dtype=torch.long))))
                    if micro_step + 1 == ACCUMULATION:
                        stats.start_averaging()
                        guard.check()
                    engine.step()
                stats.finish(guard.found_inf)
        found[stage] = dict(handed.bytes)
    return sizes, channels, found


@pytest.mark.full
@pytest.mark.slow
def test_bytes_equal_those_of_a_real_step() -> None:
    for sizes, channels, found in run_on_ranks(2, measure_step):
        for stage, handed in found.items():
            expected: Counter[str] = Counter()
            for one in list_collectives(sizes, channels, stage=stage, accumulation=ACCUMULATION):
                expected[one.kind] += one.bytes
            assert handed == pytest.approx(expected, rel=1e-3), stage  # padding


def test_bytes_equal_a_count_by_hand() -> None:
    collectives = list_collectives([300_000, 100_000, 5], 10, stage=1, accumulation=4)
    assert collectives == [
        Collective("gradients", "all-reduce", 1_600_020),
        Collective("weights", "all-gather", 1_600_020),
        Collective("norm", "all-reduce", 4),
        Collective("statistics", "all-reduce", 80),
    ]
    assert [one.sent(4) for one in collectives] == [2_400_030, 1_200_015, 6, 120]
    assert list_collectives([300_000, 100_000, 5], 10, stage=2, accumulation=4)[0].bytes == 4 * 1_600_020
    assert list_collectives([300_000, 100_000, 5], 10, stage=3, accumulation=4)[1].bytes == 4 * 1_600_020
