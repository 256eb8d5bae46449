"""Hangs: every rank writes its stacks, the hung one is named, and all end; a long evaluation or save is allowed."""

import ctypes
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pretrain.monitor.watchdog import find_hung_rank
from pretrain.run.exit_codes import EXIT_HUNG
from pretrain.run.position import PAGE, PHASES, Position, SharedPosition, create_page
from tests.support import REPOSITORY, jobs
from tests.support.events import read_events
from tests.support.ranks import join, kill, start_training

pytestmark = pytest.mark.slow


ALONE = """
import ctypes, time
import torch.distributed as dist
from pretrain.monitor import watchdog
from pretrain.run.position import SharedPosition
watchdog.POLL_S, watchdog.ANSWER_S = 0.1, 0.3
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
position = SharedPosition()
dog = watchdog.Watchdog(position, ["n0"], 0.5, 1.5)
"""


def at(step: int, phase: str, micro_step: int = 0) -> Position:
    return Position(step, micro_step, PHASES.index(phase))  # type: ignore[arg-type]


def alone(code: str) -> tuple[int, str, str]:
    """Runs a job of one rank with limits of 0.5 s for a step and 1.5 s for the first; returns exit code, stdout and stderr."""
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}
    done = subprocess.run([sys.executable, "-c", ALONE + code], cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, done.stderr


def test_the_hung_rank_is_silent_or_has_the_least_progress() -> None:
    hosts = ["n0", "n0", "n1", "n1"]
    waiting = at(7, "backward", 1)
    assert find_hung_rank({0: waiting, 1: waiting, 2: at(7, "data", 1), 3: waiting}, hosts)[0] == 2
    assert find_hung_rank({0: at(7, "forward"), 1: at(7, "backward"), 2: at(6, "save", 2), 3: at(7, "data")}, hosts)[0] == 2
    rank, reason = find_hung_rank({0: waiting, 1: at(7, "data"), 3: waiting}, hosts)
    assert (rank, reason) == (2, "rank 2 on n1 gives no answer, while others wait in step 7 (backward)")
    assert "no rank has less progress" in find_hung_rank(dict.fromkeys(range(4), waiting), hosts)[1]


def test_a_position_outlives_its_process() -> None:
    page = create_page()
    code = "import os; from pretrain.run.position import SharedPosition; SharedPosition().set(12, 'optimizer', 3); os.abort()"
    ended = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, env=os.environ | {PAGE: str(page)}, pass_fds=[page], timeout=60)
    assert ended.returncode < 0
    assert Position.read(page) == at(12, "optimizer", 3)
    os.close(page)
    position = SharedPosition()  # without a launcher
    position.set(3, "data")
    assert (position.get(), str(position.get()), position.get().computed_step) == (at(3, "data"), "step 3 (data)", 3)


def hang_in_data(rank: int) -> None:
    """Makes rank 1 hang at the beginning of step 5. For a rank's process."""
    from pretrain import train
    from pretrain.monitor import watchdog

    watchdog.ANSWER_S = 3.0
    rate = train.learning_rate

    def learning_rate(step: int, *args: object) -> float:
        if rank == 1 and step == 5:
            time.sleep(1000)
        return rate(step, *args)  # type: ignore[arg-type]

    train.learning_rate = learning_rate  # type: ignore[assignment]


def test_a_rank_that_hangs_is_named_and_all_end(tmp_path: Path, drawn: Path) -> None:
    config = tmp_path / "small.yaml"
    config.write_text(jobs.SMALL)
    places = [f"data.train={drawn / 'train'}", f"data.val={drawn / 'val'}", f"run.dir={tmp_path / 'run'}"]
    processes = start_training(2, tmp_path / "log", [str(config), *places, "guard.step_limit=8"], prepare=hang_in_data)
    try:
        codes = join(processes).codes
        assert codes[1] == EXIT_HUNG
        assert codes[0] in (EXIT_HUNG, 1)  # it stays a moment longer, in which it may notice that the other has gone
    finally:
        kill(processes)
    log = (tmp_path / "log").read_text()
    (event,) = read_events(log)
    assert (event.kind, event.values["rank"], event.values["step"]) == ("hang", 1, 5)
    assert re.search(
        r"HANG: rank 1 on \S+ has the least progress: it is in step 5 \(data\), while others wait in step 5 \((backward|log)\)", log
    )
    for rank in range(2):
        assert re.search(rf"rank {rank} on \S+ has not finished a step for 8 s; it is in step 5", log)
    assert "in learning_rate" in log  # where rank 1 sleeps


@pytest.mark.long
def test_a_long_start_evaluation_or_save_is_no_hang() -> None:
    code, output, _ = alone("""
time.sleep(1)  # the start
for step in range(8):
    position.set(step, "data"); time.sleep(1 if step == 0 else 0.3)
position.set(7, "save"); time.sleep(1)
position.set(8, "evaluation"); time.sleep(1)
dog.close(); time.sleep(2)
print("done")""")
    assert (code, output) == (0, "done\n")


@pytest.mark.parametrize("phase", ["data", "save"])
def test_a_step_over_its_limit_ends(phase: str) -> None:
    began = time.monotonic()
    code, output, errors = alone(f'position.set(0, "data"); position.set(1, "{phase}"); time.sleep(100)')
    assert code == EXIT_HUNG
    assert f"in step 1 ({phase})" in output
    assert "most recent call first" in errors
    assert time.monotonic() - began < 30


def test_a_process_that_never_releases_the_interpreters_lock_ends_too() -> None:
    assert ctypes.PyDLL(None).sleep  # calls without giving the lock up
    code, output, errors = alone('position.set(0, "data"); time.sleep(0.3); ctypes.PyDLL(None).sleep(100)')
    assert (code, output) == (1, "")
    assert "Timeout" in errors
    assert "most recent call first" in errors
