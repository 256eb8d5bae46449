"""What a log line says of who waits for whom. (That a GPU runs dry is seen on one: tests/pretrain/test_on_gpu.py.)"""

from types import SimpleNamespace

import pytest
import torch

from tests.support.ranks import run_on_ranks

pytestmark = pytest.mark.slow


def share(graphs: bool) -> tuple[float, str]:
    """Of four steps, in one of which rank 0's GPU is starved, in one rank 1's, and in one both."""
    import torch.distributed as dist

    from pretrain.engine import distributed
    from pretrain.monitor.interval import Interval

    distributed.join()
    interval = Interval(torch.device("cpu"), most=4, accumulation=1, asks=True)
    for number in range(4):
        interval.end_step(number, SimpleNamespace(norm=1.0, found_inf=0.0))  # type: ignore[arg-type]
    interval.starved = [[True, False, True, False], [False, True, True, False]][dist.get_rank()]
    steps = interval.close(0)
    assert interval.close(0).starved is None  # of no steps
    distributed.stop()
    assert steps.starved is not None
    return steps.starved, steps.remark(graphs)


@pytest.mark.parametrize(
    ("graphs", "advice"), [(False, "model.graphs=true or a larger engine.micro_batch"), (True, "a larger engine.micro_batch")]
)
def test_a_gpu_of_any_rank_that_waits_for_its_host_is_told(graphs: bool, advice: str) -> None:
    assert run_on_ranks(2, share, graphs=graphs) == [(0.75, f"  GPUs wait for the host in 75% of steps, try {advice}")] * 2


def test_what_happens_now_and_then_is_no_remark() -> None:
    import numpy as np

    from pretrain.monitor.interval import Steps

    none = np.zeros((1, 4))
    for starved in (0.5, None):
        assert Steps([0, 1, 2, 3], none, none[0], none[0] > 0, starved, 1.0, 0.0, False).remark(False) == ""
