"""Worker processes: results in order, and none survives an error, a kill or its parent."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data.packing.workers import start_workers
from tests.support import REPOSITORY

ENVIRONMENT = os.environ | {"PYTHONPATH": str(REPOSITORY)}


def square(number: int) -> int:
    return number * number


def fail_at_three(number: int) -> int:
    if number == 3:
        raise OSError(28, "No space left on device", "somewhere")
    return number


def die_at_three(number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def sleep(seconds: float) -> None:
    time.sleep(seconds)


def list_children() -> set[str]:
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


def list_session(leader: int) -> list[int]:
    """Returns the running processes of a session."""
    processes = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, session = path.read_text().rpartition(")")[2].split()[:4]
        except OSError:  # the process has ended
            continue
        if int(session) == leader and state != "Z":
            processes.append(int(path.parent.name))
    return processes


@pytest.mark.parametrize("count", [1, 3])
def test_results_are_in_order(count: int) -> None:
    with start_workers(count) as run:
        assert list(run(square, range(20))) == [number * number for number in range(20)]
        assert list(run(square, [])) == []


@pytest.mark.parametrize(
    ("function", "error", "message"), [(fail_at_three, OSError, "No space left"), (die_at_three, ValueError, "killed")]
)
def test_error_or_killed_worker_ends_all(function: object, error: type[Exception], message: str) -> None:
    before = list_children()
    with pytest.raises(error, match=message) as raised, start_workers(2) as run:
        list(run(function, range(1000)))
    assert error is not OSError or raised.value.errno == 28  # type: ignore[attr-defined]
    assert len(list_children() - before) <= 2, "the resource tracker and the fork server stay"


PARENT = """
from data.packing.workers import start_workers
from tests.data.packing.test_workers import sleep
if __name__ == "__main__":
    with start_workers(2) as run:
        results = run(sleep, [0, 0, 60, 60])
        next(results), next(results)
        print("ready", flush=True)
        list(results)
"""


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_worker_outlives_its_parent(tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "parent.py").write_text(PARENT)
    parent = subprocess.Popen(
        [sys.executable, tmp_path / "parent.py"], env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
    )
    assert parent.stdout is not None
    parent.stdout.readline()
    assert len(list_session(parent.pid)) >= 3
    if number == signal.SIGINT:
        os.killpg(parent.pid, number)  # as a terminal sends Ctrl-C
    else:
        parent.send_signal(number)
    assert parent.wait(timeout=20) != 0
    deadline = time.monotonic() + 10
    while remaining := list_session(parent.pid):
        assert time.monotonic() < deadline, remaining
        time.sleep(0.05)
