"""The launch-bound share of an interval's steps. (That a GPU is launch-bound is seen on one: tests/pretrain/test_on_gpu.py.)"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pretrain.monitor.interval import Steps
from tests.support.ranks import run_on_ranks

pytestmark = pytest.mark.slow


def share() -> float | None:
    """Returns the share of four steps, of which one is launch-bound on rank 0, one on rank 1, and one on both."""
    import torch.distributed as dist

    from pretrain.engine import distributed
    from pretrain.monitor.interval import Interval

    distributed.join()
    interval = Interval(torch.device("cpu"), capacity=4, accumulation=1, detects_launch_bound=True)
    for number in range(4):
        interval.end_step(number, SimpleNamespace(norm=1.0, found_inf=0.0))  # type: ignore[arg-type]
    interval.launch_bound = [[True, False, True, False], [False, True, True, False]][dist.get_rank()]
    steps = interval.close(0)
    assert interval.close(0).launch_bound is None  # of no steps
    distributed.stop()
    return steps.launch_bound


def test_a_step_is_launch_bound_if_it_is_on_any_rank() -> None:
    assert run_on_ranks(2, share) == [0.75] * 2


@pytest.mark.parametrize(
    ("share", "has_graphs", "advice"),
    [
        (0.75, False, "  launch-bound in 75% of steps, try model.graphs=true or a larger engine.micro_batch"),
        (0.75, True, "  launch-bound in 75% of steps, try a larger engine.micro_batch"),
        (0.5, False, ""),
        (None, False, ""),
    ],
)
def test_advice_where_most_steps_are_launch_bound(share: float | None, has_graphs: bool, advice: str) -> None:
    none = np.zeros((1, 4))
    steps = Steps([0, 1, 2, 3], none, none[0], none[0] > 0, share, seconds=1.0, data_seconds=0.0, has_bad_images=False)
    assert steps.launch_bound_advice(has_graphs) == advice
