"""Stop signals: whichever rank has one, all stop at the same step."""

import os
import signal
from typing import Any

import pytest
import torch.distributed as dist

from pretrain.faults import SIGNALS
from tests.ranks import run_on_ranks


def worker(numbers: list[int], at_step: int) -> dict[str, Any]:
    """Six steps of a job; before one of them, rank 1 alone gets signals."""
    from pretrain.faults import StopSignals

    dist.init_process_group("gloo")
    before = [signal.getsignal(number) for number in SIGNALS]
    with StopSignals() as stop:
        answers = []
        for step in range(1, 7):
            if step == at_step and dist.get_rank() == 1:
                for number in numbers:
                    os.kill(os.getpid(), number)
            answers.append(stop.agreed())
    dist.destroy_process_group()
    return {"answers": answers, "restored": [signal.getsignal(number) for number in SIGNALS] == before}


@pytest.mark.parametrize("numbers", [[signal.SIGUSR1], [signal.SIGTERM, signal.SIGINT]])
def test_all_ranks_stop_at_the_same_step(numbers: list[int]) -> None:
    for result in run_on_ranks(2, worker, numbers=[int(n) for n in numbers], at_step=3):
        # Asked at step 3, answered at step 4; it stays so.
        assert result == {"answers": [False, False, False, True, True, True], "restored": True}


def test_without_a_signal_nobody_stops() -> None:
    for result in run_on_ranks(2, worker, numbers=[], at_step=3):
        assert not any(result["answers"])
