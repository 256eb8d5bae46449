"""Stop and save requests: whichever rank has one, all ranks get the same answer at the same step."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from pretrain.monitor.requests import SIGNALS
from pretrain.run.exit_codes import EXIT_REQUEUE, EXIT_STOP_FILE
from tests.support.ranks import run_on_ranks

pytestmark = pytest.mark.slow  # several processes per test


def steps(file: str, numbers: list[int], at_step: int, save_seconds: float | None) -> dict[str, Any]:
    """Makes six steps on one rank. During one of them rank 1 alone gets signals; each takes 10 s by rank 0's clock, no time by rank 1's."""
    from pretrain.monitor import requests as module

    dist.init_process_group("gloo")
    rank, now = dist.get_rank(), 0.0
    module.FILE_POLL_S = 0.01
    before = [signal.getsignal(number) for number in SIGNALS]
    with module.Requests(Path(file), save_seconds, clock=lambda: now) as requests:
        while rank == 0 and Path(file).exists() and not requests.exit_code:
            time.sleep(0.01)
        dist.barrier()
        answers = []
        for step in range(1, 7):
            requests.ask()
            if step == at_step and rank == 1:
                for number in numbers:
                    os.kill(os.getpid(), number)
            now += 10 if rank == 0 else 0
            answers.append(requests.answer())
            if answers[-1].save:
                requests.restart_clock()
    after = [signal.getsignal(number) for number in SIGNALS]
    dist.destroy_process_group()
    return {
        "codes": [answer.exit_code for answer in answers],
        "saves": [step for step, answer in enumerate(answers, 1) if answer.save],
        "handlers": "restored" if after == before else "ignored" if after == [signal.SIG_IGN] * len(SIGNALS) else after,
    }


def run(file: Path, numbers: tuple[signal.Signals, ...] = (), at_step: int = 0, save_seconds: float | None = None) -> list[dict[str, Any]]:
    return run_on_ranks(2, steps, file=str(file), numbers=[int(n) for n in numbers], at_step=at_step, save_seconds=save_seconds)


@pytest.mark.parametrize("numbers", [(signal.SIGUSR1,), (signal.SIGTERM, signal.SIGINT)])
def test_all_ranks_stop_at_the_same_step(numbers: tuple[signal.Signals, ...], tmp_path: Path) -> None:
    results = run(tmp_path / "STOP", numbers, at_step=2)
    for result in results:
        assert result["codes"] == [0, 0] + [EXIT_REQUEUE] * 4
    # Rank 1 ignores later signals, which must not change the exit code.
    assert [result["handlers"] for result in results] == ["restored", "ignored"]


def test_the_stop_file_takes_precedence_over_a_signal(tmp_path: Path) -> None:
    (tmp_path / "STOP").touch()
    for result in run(tmp_path / "STOP", (signal.SIGUSR1,), at_step=1):
        assert result["codes"] == [EXIT_STOP_FILE] * 6


@pytest.mark.parametrize(("save_seconds", "saves"), [(20, [3, 6]), (1, [2, 4, 6]), (60, []), (None, [])])
def test_all_ranks_save_at_the_same_step_by_the_clock_of_rank_0(save_seconds: float | None, saves: list[int], tmp_path: Path) -> None:
    for result in run(tmp_path / "STOP", save_seconds=save_seconds):
        assert result["saves"] == saves
        assert result["codes"] == [0] * 6
        assert result["handlers"] == "restored"
