"""A task of a Slurm step: the output and signals of its rank, its report and its exit code."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from pretrain.run.exit_codes import EXIT_CONFIG, EXIT_REQUEUE, EXIT_STOP_FILE
from tests.support import REPOSITORY
from tests.support.events import read_events, without_events
from tests.support.waiting import wait_until

TASK = "import sys; from launch import task; task.LEAVE_S = task.FLUSH_S = 0.2; sys.exit(task.run([sys.executable, '-c', sys.argv[1]]))"
RANK = """
import os, signal, sys, time
from pretrain.run.position import SharedPosition
"""


def start(code: str) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "RANK": "3", "SLURMD_NODENAME": "n1"}
    return subprocess.Popen([sys.executable, "-c", TASK, RANK + code], env=environment, stdout=subprocess.PIPE, text=True)


def run(code: str) -> tuple[int, list[str], dict[str, Any]]:
    """Returns the task's exit code, its lines of output and its report."""
    task = start(code)
    output, _ = task.communicate(timeout=60)
    (event,) = read_events(output)
    assert event.kind == "rank"
    return task.returncode, without_events(output), event.values


def signal_rank(task: subprocess.Popen, number: int) -> None:
    (rank,) = psutil.Process(task.pid).children()
    rank.send_signal(number)


@pytest.mark.parametrize(("code", "task_code"), [(0, 0), (EXIT_REQUEUE, 0), (EXIT_STOP_FILE, 0), (EXIT_CONFIG, EXIT_CONFIG)])
def test_only_a_failed_rank_ends_the_step(code: int, task_code: int) -> None:
    ended, lines, report = run(f"print('its line'); sys.exit({code})")
    assert (ended, lines) == (task_code, ["its line"])
    assert (report["rank"], report["host"], report["code"], report["step"], report["last_line"]) == (3, "n1", code, None, "its line")


def test_a_killed_rank_is_named_with_its_step_and_last_lines() -> None:
    lines = "".join(f"print('line {number}');" for number in range(30))
    ended, output, report = run(
        f"{lines} sys.stdout.flush(); SharedPosition().set(12, 'backward', 1); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert ended == 128 + signal.SIGKILL
    assert output[30] == "rank 3 on n1 was killed by SIGKILL (possibly out of host memory) in step 12 (backward); its last lines:"
    assert output[31:] == [f"  rank 3 | line {number}" for number in range(10, 30)]
    assert (report["code"], report["step"], report["cause"]) == (-signal.SIGKILL, 12, True)


def test_an_error_is_reported_with_its_last_line() -> None:
    ended, output, report = run("SharedPosition().set(7, 'data'); raise KeyError('n04399382')")
    assert ended == 1
    assert "rank 3 on n1 ended with exit code 1 in step 7 (data); its last lines:" in output
    assert (report["last_line"], report["step"], report["cause"]) == ("KeyError: 'n04399382'", 7, True)


def test_a_rank_that_fails_by_another_rank_is_not_the_cause() -> None:
    _, output, report = run("raise RuntimeError('[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:41618')")
    assert not report["cause"]
    assert output[-1] == "rank 3 on n1 ended with exit code 1 in its start"
    _, output, report = run("os.kill(os.getpid(), signal.SIGTERM)")
    assert not report["cause"]


def test_a_signal_to_the_task_does_not_reach_the_rank(tmp_path: Path) -> None:
    """Slurm signals the rank itself."""
    ready, stopped = tmp_path / "ready", tmp_path / "stopped"
    task = start(f"""
signal.signal(signal.SIGUSR1, lambda *_: (open({str(stopped)!r}, 'w').close(), sys.exit({EXIT_REQUEUE})))
signal.pthread_sigmask(signal.SIG_UNBLOCK, {{signal.SIGUSR1}})
open({str(ready)!r}, 'w').close(); time.sleep(60)""")
    wait_until(ready.exists)
    task.send_signal(signal.SIGUSR1)
    task.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    assert task.poll() is None
    assert not stopped.exists()
    signal_rank(task, signal.SIGUSR1)
    task.communicate(timeout=60)
    assert task.returncode == 0


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_the_rank_does_not_inherit_signal_handling(number: signal.Signals) -> None:
    ended, output, _ = run(f"print(signal.getsignal({int(number)}) == signal.SIG_DFL)")
    assert (ended, output) == (0, ["True"])


def test_usr1_does_not_kill_a_rank_that_is_starting() -> None:
    ended, output, _ = run("os.kill(os.getpid(), signal.SIGUSR1); print(signal.sigpending() == {signal.SIGUSR1})")
    assert (ended, output) == (0, ["True"])
