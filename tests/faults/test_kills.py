"""A job that is hit anywhere resumes from the last save and ends bit for bit as an undisturbed one."""

import itertools
import re
import shutil
import signal
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.faults import jobs
from tests.faults.points import POINTS, Fault
from tests.support.ranks import PATIENCE_S, kill

pytestmark = pytest.mark.slow

SIGNALS, STAGES = (signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP), itertools.cycle((1, 2, 3, 0))
# Each signal at each point; the ZeRO stages take turns, so that each point and each signal meets several.
CASES = [(number, point, next(STAGES)) for point in POINTS for number in SIGNALS]
ONE = "SIGKILL, before the manifest"
MORE = ("SIGTERM, optimizer's step", "SIGSTOP, before the pointer", "SIGKILL, pruning")


def as_parameters(number: signal.Signals, point: str, stage: int) -> Any:
    """Returns a case with its name and marks: one is quick enough for `make test`, three for continuous integration."""
    name = f"{number.name}, {point}, ZeRO-{stage}"
    marks = () if name.startswith(ONE) else pytest.mark.long if name.startswith(MORE) else pytest.mark.full
    return pytest.param(number, point, stage, id=name, marks=marks)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, four_classes: Path) -> Callable[[int], Path]:
    """Returns the folder of an undisturbed job of a ZeRO stage."""

    @cache
    def of_stage(stage: int) -> Path:
        folder = tmp_path_factory.mktemp(f"undisturbed-{stage}")
        ended = jobs.run(folder, four_classes, f"engine.zero_stage={stage}")
        assert ended.codes == [0, 0], jobs.log_of(folder)
        return folder

    return of_stage


@pytest.mark.parametrize(("number", "point", "stage"), [as_parameters(*case) for case in CASES])
def test_a_job_that_is_hit_ends_as_an_undisturbed_one(
    number: signal.Signals, point: str, stage: int, tmp_path: Path, four_classes: Path, undisturbed: Callable[[int], Path]
) -> None:
    option = f"engine.zero_stage={stage}"
    ended = jobs.run(tmp_path, four_classes, option, fault=Fault(point, number, tmp_path / "run"))
    assert (tmp_path / "run" / "hit").exists(), f"the point was not reached:\n{jobs.log_of(tmp_path)[-3000:]}"
    reached = jobs.reached(tmp_path)
    if number == signal.SIGKILL:
        victim = POINTS[point].rank
        assert ended.codes[victim] == -signal.SIGKILL
        assert ended.codes[1 - victim] not in (0, 85)
    elif number == signal.SIGSTOP:
        assert ended.stopped  # the others wait; killed from outside
    else:
        assert ended.codes in ([0, 0], [85, 85]), f"{ended.codes}\n{jobs.log_of(tmp_path)[-3000:]}"
    assert jobs.run(tmp_path, four_classes, option).codes == [0, 0], jobs.log_of(tmp_path)[-3000:]
    resumed = jobs.resumed_steps(tmp_path)[-1]
    if number != signal.SIGTERM:
        assert resumed == POINTS[point].resumes, jobs.log_of(tmp_path)[-3000:]
    elif ended.codes == [85, 85]:
        assert resumed == reached  # no step is lost
    assert jobs.same_end(tmp_path, undisturbed(stage)), jobs.log_of(tmp_path)[-3000:]


def not_restored(kind: str) -> None:
    """Makes a resumed job skip a part of the state."""
    import torch.distributed.checkpoint as dcp

    from pretrain.engine import zero_state

    if kind == "optimizer_steps":
        zero_state.set_optimizer_steps = lambda engine, steps: None
        return
    original = dcp.load

    def load(state: dict[str, Any], **kwargs: Any) -> None:
        original({name: tensor for name, tensor in state.items() if not name.startswith(f"{kind}/")}, **kwargs)

    dcp.load = load


@pytest.fixture(scope="module")
def in_mid_course(tmp_path_factory: pytest.TempPathFactory, four_classes: Path) -> Path:
    """Returns the folder of a job that was killed after step 4; tests must copy it."""
    folder = tmp_path_factory.mktemp("in-mid-course")
    fault = Fault("backward", signal.SIGKILL, folder / "run")
    assert jobs.run(folder, four_classes, "engine.zero_stage=2", fault=fault).codes[1] == -signal.SIGKILL
    return folder


PARTS = ["buffer", *(pytest.param(kind, marks=pytest.mark.full) for kind in (*jobs.KINDS, "optimizer_steps") if kind != "buffer")]


@pytest.mark.parametrize("kind", PARTS)
def test_control_a_part_that_is_not_restored_changes_the_end(
    kind: str, tmp_path: Path, four_classes: Path, in_mid_course: Path, undisturbed: Callable[[int], Path]
) -> None:
    folder = shutil.copytree(in_mid_course, tmp_path / "job")
    ended = jobs.run(folder, four_classes, "engine.zero_stage=2", change=partial(not_restored, kind))
    assert ended.codes == [0, 0], jobs.log_of(folder)
    assert jobs.resumed_steps(folder) == [4]
    assert not jobs.same_end(folder, undisturbed(2))


@pytest.mark.long
def test_a_second_job_on_a_live_run_is_refused_and_resumes_it_after_a_kill(
    tmp_path: Path, four_classes: Path, undisturbed: Callable[[int], Path]
) -> None:
    """The first job is stopped in the middle of a step: it lives, and may continue."""
    option = "engine.zero_stage=2"
    first = jobs.start(tmp_path, four_classes, option, fault=Fault("forward", signal.SIGSTOP, tmp_path / "run"), job="17")
    try:
        deadline = time.monotonic() + PATIENCE_S
        checkpoints = tmp_path / "run" / "checkpoints"

        def at_rest() -> bool:  # the other rank may still be removing the older checkpoint
            assert all(process.exitcode is None for process in first), jobs.log_of(tmp_path)
            if psutil.Process(first[1].pid).status() != psutil.STATUS_STOPPED:
                return False
            names = {path.name for path in checkpoints.iterdir()}
            time.sleep(2)
            return names == {path.name for path in checkpoints.iterdir()}

        while not at_rest():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        before = files_of(tmp_path / "run")
        second = jobs.run(tmp_path, four_classes, option)
        assert second.codes[0] == 2
        assert re.search(rf"error( on rank 1)?: {tmp_path / 'run'} is in use by job 17, process {first[0].pid} on ", jobs.log_of(tmp_path))
        assert files_of(tmp_path / "run") == before
    finally:
        kill(first)
    assert jobs.run(tmp_path, four_classes, option).codes == [0, 0], jobs.log_of(tmp_path)[-3000:]
    assert "runs no more: taking over" in jobs.log_of(tmp_path)
    assert jobs.resumed_steps(tmp_path) == [4]
    assert jobs.same_end(tmp_path, undisturbed(2))


def files_of(run: Path) -> dict[Path, bytes]:
    """Returns the content of a run's files except TensorBoard's, which a thread of the first job may still be writing."""
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and "tensorboard" not in path.parts}
