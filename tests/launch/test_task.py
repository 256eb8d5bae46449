"""A task of a Slurm step: what it passes on of its rank, what it says when that fails, and what it ends with."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pretrain.run.attempts import heard
from pretrain.run.exit_codes import EXIT_AGAIN, EXIT_CONFIG, EXIT_ENDED
from tests.support import REPOSITORY

TASK = "import sys; from launch import task; task.LEAVE_S = task.HEARD_S = 0.2; sys.exit(task.run([sys.executable, '-c', sys.argv[1]]))"
RANK = """
import os, signal, sys, time
from pretrain.run.position import SharedPosition
"""


def start(code: str) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "RANK": "3", "SLURMD_NODENAME": "n1"}
    return subprocess.Popen([sys.executable, "-c", TASK, RANK + code], env=environment, stdout=subprocess.PIPE, text=True)


def run(code: str) -> tuple[int, list[str], dict[str, Any]]:
    """(exit code, lines of output, what it told)"""
    task = start(code)
    output, _ = task.communicate(timeout=30)
    lines = output.splitlines()
    told = [found for line in lines if (found := heard(line))]
    assert [kind for kind, _ in told] == ["rank"]
    return task.returncode, [line for line in lines if heard(line) is None], told[0][1]


def test_output_is_passed_on_as_it_comes() -> None:
    task = start("print('one', flush=True); sys.stderr.write('two\\n'); sys.stderr.flush(); time.sleep(60)")
    try:
        assert task.stdout is not None
        assert [task.stdout.readline() for _ in range(2)] == ["one\n", "two\n"]
        assert task.poll() is None
    finally:
        subprocess.run(["pkill", "-KILL", "-P", str(task.pid)], check=True)
        task.communicate(timeout=30)
        assert task.returncode == 128 + 9


@pytest.mark.parametrize("code", [0, EXIT_AGAIN, EXIT_ENDED])
def test_a_rank_that_ended_as_it_should_does_not_end_the_step(code: int) -> None:
    ended, lines, told = run(f"print('saved'); sys.exit({code})")
    assert (ended, lines) == (0, ["saved"])
    assert (told["rank"], told["host"], told["code"]) == (3, "n1", code)


def test_settings_that_cannot_work_are_told_by_the_rank_alone() -> None:
    ended, lines, told = run(f"print('error: no such key'); sys.exit({EXIT_CONFIG})")
    assert (ended, lines) == (EXIT_CONFIG, ["error: no such key"])
    assert (told["code"], told["said"]) == (EXIT_CONFIG, "error: no such key")


def test_a_killed_rank_is_named_with_its_step_and_last_lines() -> None:
    lines = "".join(f"print('line {number}');" for number in range(30))
    ended, output, told = run(f"{lines} sys.stdout.flush(); SharedPosition().set(12, 'backward', 1); os.kill(os.getpid(), signal.SIGKILL)")
    assert ended == 128 + 9
    assert output[30] == "rank 3 on n1 was killed by SIGKILL (out of the host's memory, perhaps) in step 12 (backward); its last lines:"
    assert output[31:] == [f"  rank 3 | line {number}" for number in range(10, 30)]
    assert (told["code"], told["step"], told["cause"]) == (-9, 12, True)


def test_an_error_is_told_with_its_last_line() -> None:
    ended, output, told = run("SharedPosition().set(7, 'data'); raise KeyError('n04399382')")
    assert ended == 1
    assert "rank 3 on n1 ended with exit code 1 in step 7 (data); its last lines:" in output
    assert (told["said"], told["step"], told["cause"]) == ("KeyError: 'n04399382'", 7, True)


def test_before_the_first_step_no_step_is_to_blame() -> None:
    _, output, told = run("raise ImportError('no module')")
    assert "rank 3 on n1 ended with exit code 1 in its start; its last lines:" in output
    assert told["step"] is None


def test_who_fails_of_another_rank_is_not_the_cause() -> None:
    _, output, told = run("raise RuntimeError('[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:41618')")
    assert not told["cause"]
    assert output[-1] == "rank 3 on n1 ended with exit code 1 in its start"
    _, output, told = run("os.kill(os.getpid(), signal.SIGTERM)")
    assert not told["cause"]


def test_a_signal_to_the_task_is_the_ranks_affair(tmp_path: Path) -> None:
    """Slurm sends it to both."""
    ready, stopped = tmp_path / "ready", tmp_path / "stopped"
    task = start(f"""
signal.signal(signal.SIGUSR1, lambda *_: (open({str(stopped)!r}, 'w').close(), sys.exit({EXIT_AGAIN})))
signal.pthread_sigmask(signal.SIG_UNBLOCK, {{signal.SIGUSR1}})
open({str(ready)!r}, 'w').close(); time.sleep(60)""")
    deadline = time.monotonic() + 30
    while not ready.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    task.send_signal(signal.SIGUSR1)
    task.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    assert task.poll() is None
    assert not stopped.exists()
    subprocess.run(["pkill", "-USR1", "-P", str(task.pid)], check=True)
    task.communicate(timeout=30)
    assert task.returncode == 0


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_the_rank_does_not_inherit_what_the_task_does_with_a_signal(number: signal.Signals) -> None:
    ended, output, _ = run(f"print(signal.getsignal({int(number)}) == signal.SIG_DFL)")
    assert (ended, output) == (0, ["True"])


def test_usr1_does_not_kill_a_rank_that_has_hardly_begun() -> None:
    ended, output, _ = run("os.kill(os.getpid(), signal.SIGUSR1); print(signal.sigpending() == {signal.SIGUSR1})")
    assert (ended, output) == (0, ["True"])
