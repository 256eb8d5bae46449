"""Requests to stop: whichever rank has one, all stop at the same step, with the same exit code."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from pretrain.monitor.faults import SIGNALS
from pretrain.run.exit_codes import EXIT_AGAIN, EXIT_ENDED
from tests.support.ranks import run_on_ranks


def worker(numbers: list[int], at_step: int, file: str) -> dict[str, Any]:
    """Six steps of a job; before one of them, rank 1 alone gets signals. `file`, if there is one, has been seen by then."""
    from pretrain.monitor import faults

    dist.init_process_group("gloo")
    faults.LOOK_S = 0.01
    before = [signal.getsignal(number) for number in SIGNALS]
    with faults.StopRequests(Path(file)) as stop:
        if dist.get_rank() == 0 and Path(file).exists():
            while not stop.received:
                time.sleep(0.01)
        dist.barrier()
        answers = []
        for step in range(1, 7):
            if step == at_step and dist.get_rank() == 1:
                for number in numbers:
                    os.kill(os.getpid(), number)
            answers.append(stop.agreed())
    after = [signal.getsignal(number) for number in SIGNALS]
    dist.destroy_process_group()
    return {"answers": answers, "restored": after == before, "ignored": after == [signal.SIG_IGN] * len(SIGNALS)}


@pytest.mark.parametrize("numbers", [[signal.SIGUSR1], [signal.SIGTERM, signal.SIGINT]])
def test_all_ranks_stop_at_the_same_step(numbers: list[int], tmp_path: Path) -> None:
    results = run_on_ranks(2, worker, numbers=[int(n) for n in numbers], at_step=3, file=str(tmp_path / "STOP"))
    for result in results:
        # Asked at step 3, answered at step 4; it stays so.
        assert result["answers"] == [0, 0, 0, EXIT_AGAIN, EXIT_AGAIN, EXIT_AGAIN]
    assert results[0]["restored"]
    assert results[1]["ignored"]  # one that comes late must not change the exit code


def test_without_a_request_nobody_stops(tmp_path: Path) -> None:
    for result in run_on_ranks(2, worker, numbers=[], at_step=3, file=str(tmp_path / "STOP")):
        assert result["answers"] == [0] * 6
        assert result["restored"]


def test_a_file_asks_all_ranks_to_end_and_outweighs_a_signal(tmp_path: Path) -> None:
    (tmp_path / "STOP").touch()
    for result in run_on_ranks(2, worker, numbers=[int(signal.SIGUSR1)], at_step=2, file=str(tmp_path / "STOP")):
        assert result["answers"] == [0] + [EXIT_ENDED] * 5
