"""A job that is hit anywhere goes on from the last save and ends bit for bit as one that was left alone."""

import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from data.synthetic.synthesize import synthesize
from pretrain import checkpoint
from tests.faults import jobs
from tests.faults.disk import small_file_system
from tests.faults.points import Fault
from tests.faults.sweep import Case, cases, play
from tests.support.ranks import PATIENCE_S, join, kill

pytestmark = pytest.mark.slow

# Of `make test`, and of continuous integration: each signal, in and beside the save, in one ZeRO stage, where all are compared with the
# same. The whole sweep takes long.
ONE = "SIGKILL, before the manifest"
MORE = ("SIGTERM, optimizer's step", "SIGSTOP, before the pointer", "SIGKILL, pruning")


def mark(case: str) -> Any:
    return () if case.startswith(ONE) else pytest.mark.long if case.startswith(MORE) else pytest.mark.full


ALL = [pytest.param(case, id=str(case), marks=mark(str(case))) for case in cases()]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    synthesize(folder, classes=4, train=32, val=8)
    return folder


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Callable[[int], Path]:
    """The folder of a job that was left alone, by ZeRO stage."""

    @cache
    def of_stage(stage: int) -> Path:
        folder = tmp_path_factory.mktemp(f"undisturbed-{stage}")
        ended = jobs.run(folder, images, f"engine.zero_stage={stage}")
        assert ended.codes == [0, 0], jobs.log_of(folder)
        return folder

    return of_stage


@pytest.mark.parametrize("case", ALL)
def test_a_job_that_is_hit_ends_as_one_that_is_not(case: Case, tmp_path: Path, images: Path, undisturbed: Callable[[int], Path]) -> None:
    play(case, tmp_path, images, undisturbed(case.stage))


def not_restored(kind: str) -> None:
    """Leaves a part of the state out when a job resumes."""
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
def in_mid_course(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    """The folder of a job that was killed after step 4; to be copied."""
    folder = tmp_path_factory.mktemp("in-mid-course")
    fault = Fault("backward", signal.SIGKILL, folder / "run")
    assert jobs.run(folder, images, "engine.zero_stage=2", fault=fault).codes[1] == -signal.SIGKILL
    return folder


PARTS = ["buffer", *(pytest.param(kind, marks=pytest.mark.full) for kind in (*jobs.KINDS, "optimizer_steps") if kind != "buffer")]


@pytest.mark.parametrize("kind", PARTS)
def test_control_what_is_not_restored_shows(
    kind: str, tmp_path: Path, images: Path, in_mid_course: Path, undisturbed: Callable[[int], Path]
) -> None:
    folder = shutil.copytree(in_mid_course, tmp_path / "job")
    ended = jobs.run(folder, images, "engine.zero_stage=2", change=partial(not_restored, kind))
    assert ended.codes == [0, 0], jobs.log_of(folder)
    assert jobs.resumed_steps(folder) == [4]
    assert not jobs.same_end(folder, undisturbed(2))


@pytest.mark.long
def test_a_second_job_on_a_live_run_stops_and_after_a_kill_it_goes_on(
    tmp_path: Path, images: Path, undisturbed: Callable[[int], Path]
) -> None:
    """The first job is stopped in the middle of a step: it lives, and may go on."""
    option = "engine.zero_stage=2"
    first = jobs.start(tmp_path, images, option, fault=Fault("forward", signal.SIGSTOP, tmp_path / "run"), job="17")
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
        second = jobs.run(tmp_path, images, option)
        assert second.codes[0] == 2
        assert re.search(rf"error( on rank 1)?: {tmp_path / 'run'} is in use by job 17, process {first[0].pid} on ", jobs.log_of(tmp_path))
        assert files_of(tmp_path / "run") == before
    finally:
        kill(first)
    assert jobs.run(tmp_path, images, option).codes == [0, 0], jobs.log_of(tmp_path)[-3000:]
    assert "runs no more: taking over" in jobs.log_of(tmp_path)
    assert jobs.resumed_steps(tmp_path) == [4]
    assert jobs.same_end(tmp_path, undisturbed(2))


def files_of(run: Path) -> dict[Path, bytes]:
    """But for TensorBoard's, which a thread of the first job may still be writing."""
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and "tensorboard" not in path.parts}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system on which one checkpoint of the job has room, and not a second one."""
    with small_file_system(tmp_path / "small", "100m") as place:
        yield place


@pytest.mark.long
def test_a_job_on_a_full_disk_trains_on_and_says_at_its_end_what_is_not_saved(
    small_disk: Path, tmp_path: Path, images: Path, undisturbed: Callable[[int], Path]
) -> None:
    """From the first checkpoint on nothing more can be written to the run directory; with more space the job goes on from there."""
    option = "engine.zero_stage=2"
    folder, run = tmp_path / "job", small_disk / "run"
    folder.mkdir()
    run.mkdir()
    (folder / "run").symlink_to(run)
    processes = jobs.start(folder, images, option)
    checkpoints = run / "checkpoints"
    while not (checkpoints / "latest").exists():
        assert any(process.exitcode is None for process in processes), jobs.log_of(folder)
        time.sleep(0.01)
    with suppress(OSError), (small_disk / "filler").open("wb", buffering=0) as filler:
        while filler.write(bytes(4096)):
            pass
    ended = join(processes)
    assert all(code not in (0, 85) for code in ended.codes)
    for words in ("SAVING FAILED at step 4", "SAVING FAILED at step 7", "SaveFailed: the last state of this run is not saved: "):
        assert words in jobs.log_of(folder), words
    assert [path.name for path in checkpoint.list_checkpoints(checkpoints)] == ["step-000000002"]
    assert checkpoint.verify(checkpoints / "step-000000002") == []
    subprocess.run(["mount", "-o", "remount,size=400m", small_disk], check=True)
    (small_disk / "filler").unlink()
    assert jobs.run(folder, images, option).codes == [0, 0], jobs.log_of(folder)[-3000:]
    assert jobs.resumed_steps(folder) == [2]
    assert jobs.same_end(folder, undisturbed(2))
