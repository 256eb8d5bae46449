"""Checkpoints on a failing, full, slow or dying disk: every call of a save is tried.

Each test of a promise has a control, which switches off the code that keeps the promise: the same check must then fail.
"""

import errno
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pretrain import checkpoint
from pretrain.checkpoint import files, staging
from tests.faults.disk import Dies, FailsOnce, Slow, Watched, disk, small_file_system
from tests.faults.session import KINDS, Session, different, everywhere, hidden
from tests.support.ranks import run_on_ranks

pytestmark = pytest.mark.slow


# ---------------------------------------------------------------- every call of a save fails, on either rank


def every_call_fails(folder: str, victim: int, code: int) -> int:
    files._BLOCK_BYTES = 1000  # many writes a file
    session = Session(folder)
    session.save()
    session.kinds()
    call = 0
    while True:
        fault = FailsOnce(call, code)
        assert session.save(disk(fault) if session.rank == victim else None) is None, "a failing disk must not end training"
        if not everywhere(fault.hit, victim):
            break
        if session.rank == 0:
            newest, kinds = session.on_disk(), session.kinds()
            # Dropped with a complaint; or saved, and only the tidying up failed; or named, and making the name durable failed.
            assert (newest, kinds) in [
                (session.step - 1, ["save_failed"]), (session.step, ["checkpoint"]), (session.step, ["save_failed"]),
            ], (call, session.step, newest, kinds)  # fmt: skip
            if kinds == ["save_failed"]:
                assert f"SAVING FAILED at step {session.step}" in session.log.lines[-1]
                assert os.strerror(code) in session.log.lines[-1]
        assert session.save() is None
        if session.rank == 0:
            assert session.on_disk() == session.step
            session.kinds()
        call += 1
    session.start()
    if session.rank == 0:
        assert hidden(session.folder) == []
    session.end()
    return call


@pytest.mark.parametrize(("ranks", "victim", "code"), [(2, 1, errno.ENOSPC), (2, 0, errno.EIO)])
def test_any_failing_call_costs_at_most_that_save(tmp_path: Path, ranks: int, victim: int, code: int) -> None:
    calls = run_on_ranks(ranks, every_call_fails, folder=str(tmp_path), victim=victim, code=code)[0]
    assert calls > 5


# ---------------------------------------------------------------- killed at every call of a save


def killed_at_every_call(folder: str, unprotected: bool) -> int:
    if unprotected:  # files are written under their final name, and every checkpoint counts as whole
        files.make_temporary_path = lambda folder, purpose, name: folder / (name if purpose == "partial" else f".{purpose}-{name}")
        files.verify = lambda path: []
    files._BLOCK_BYTES = 1000
    session = Session(folder)
    session.save()
    call = 0
    while True:
        before = session.step
        fault = Dies(call)
        raised = session.save(disk(fault))
        if not fault.hit:
            break
        assert raised is not None
        newest = session.on_disk()
        assert newest in (before, session.step)
        assert session.start() == newest  # as a job does that is started again
        assert hidden(session.folder) == []
        assert (session.folder / "latest").read_text() == f"step-{newest:09d}"
        session.train()
        session.save()
        call += 1
    session.end()
    return call


def test_killed_at_any_call_a_run_resumes_from_a_whole_checkpoint(tmp_path: Path) -> None:
    assert run_on_ranks(1, killed_at_every_call, folder=str(tmp_path), unprotected=False)[0] > 40


def test_control_without_temporary_names_and_checks_it_fails(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        run_on_ranks(1, killed_at_every_call, folder=str(tmp_path), unprotected=True)


# ---------------------------------------------------------------- power is lost


def unsafe_moments(folder: str, unprotected: str | None) -> list[str]:
    if unprotected == "files":

        def write(path: Path, content: Any) -> files.Entry:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.write(descriptor, content)
            os.close(descriptor)
            return {"bytes": memoryview(content).nbytes, "xxh3_128": ""}

        files.write = write
    elif unprotected == "folders":
        files.sync = lambda path: None
    session = Session(folder, keep=1)
    watched = Watched()
    for _ in range(3):
        session.save(disk(watched))
    session.end()
    return watched.unsafe


def test_a_loss_of_power_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    assert run_on_ranks(1, unsafe_moments, folder=str(tmp_path), unprotected=None)[0] == []


@pytest.mark.parametrize("unprotected", ["files", "folders"])
def test_control_without_syncing_it_does_not(tmp_path: Path, unprotected: str) -> None:
    assert run_on_ranks(1, unsafe_moments, folder=str(tmp_path), unprotected=unprotected)[0] != []


# ---------------------------------------------------------------- a slow disk, beside training


def saves_on_a_slow_disk(folder: str, unprotected: str | None) -> dict[str, Any]:
    if unprotected == "staging":  # the writing thread copies when it gets to it, beside training
        copied = staging.Staging.__init__

        def shared(self: staging.Staging, updated: Any, running: Any, device: Any) -> None:
            copied(self, updated, running, device)
            self._copies, later = [], self._copies
            self.wait = lambda: (time.sleep(0.5), [host.copy_(live) for live, host in later])  # type: ignore[method-assign,assignment]

        staging.Staging.__init__ = shared  # type: ignore[method-assign]
    elif unprotected == "back-pressure":
        checkpoint.Checkpoints.wait = lambda self: None  # type: ignore[method-assign]
    session = Session(folder, keep=10)
    most, blocked = 0, []
    with disk(Slow(0.01)):
        for _ in range(4):
            session.train()
            session.states[session.step] = session.state()
            began = time.monotonic()
            session.begin_save()
            blocked.append(time.monotonic() - began)
            session.train()  # while that save is being written
            most = max(most, sum(path.name.startswith(".partial") for path in session.folder.iterdir()))
        session.checkpoints.wait()
        if session.checkpoints._writer is not None:
            session.checkpoints._writer.join()
        for path in checkpoint.list_checkpoints(session.folder):
            assert different(checkpoint.read_tensors(path, KINDS), session.states[int(path.name.removeprefix("step-"))]) == [], path
    records = [record for record in session.log.records if record["kind"] == "checkpoint"]
    session.end()
    return {"most": most, "blocked": blocked, "records": records}


def check_slow_disk(folder: Path, unprotected: str | None) -> None:
    found = run_on_ranks(1, saves_on_a_slow_disk, folder=str(folder), unprotected=unprotected)[0]
    assert found["most"] <= 1
    assert len(found["records"]) == 4
    assert found["blocked"][0] < found["records"][0]["total_s"] / 2  # the first waits for its copy alone
    for record, blocked in zip(found["records"], found["blocked"], strict=True):
        assert record["bytes"] > 5000
        assert record["mb_per_s"] == pytest.approx(record["bytes"] / 1e6 / record["total_s"], rel=0.5)
        assert record["blocked_s"] <= blocked
    assert max(record["blocked_s"] for record in found["records"][1:]) > 0.05  # the others for the one before


def test_saves_on_a_slow_disk_are_right_one_at_a_time_and_reported(tmp_path: Path) -> None:
    check_slow_disk(tmp_path, None)


@pytest.mark.parametrize("unprotected", ["staging", "back-pressure"])
def test_control_without_copies_or_waiting_they_are_not(tmp_path: Path, unprotected: str) -> None:
    with pytest.raises(AssertionError):
        check_slow_disk(tmp_path, unprotected)


# ---------------------------------------------------------------- a full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Returns a file system of 1.5 MB."""
    with small_file_system(tmp_path / "small", "1536k") as place:
        yield place


def fills_the_disk(folder: str, checked: bool) -> dict[str, Any]:
    """Saves a state of 0.65 MB on a disk of 1.5 MB, of which another file takes 0.6 MB for a while."""
    session = Session(folder, keep=1, width=300)
    if not checked:
        session.checkpoints.bytes = 0
    other = Path(folder, "something else")
    session.save()
    other.write_bytes(bytes(600_000))
    assert session.save() is None
    partial_seen = any("rank 0" in line for line in session.log.lines)  # it was a rank's write that failed
    kept, kinds, complaint = session.on_disk(), session.kinds(), session.log.lines[-1]
    with pytest.raises(checkpoint.SaveFailed, match=r"No space left|are needed"):
        session.checkpoints.close()
    other.unlink()
    session.save()
    session.checkpoints.close()
    found = {"kept": kept, "kinds": kinds, "complaint": complaint, "in_a_write": partial_seen, "at_last": session.on_disk()}
    session.end()
    return found


@pytest.mark.parametrize("checked", [True, False])
def test_a_full_disk_keeps_the_last_checkpoint_and_training_going(small_disk: Path, checked: bool) -> None:
    """The control is the same without looking at the free space first: only then is it a write that fails."""
    found = run_on_ranks(1, fills_the_disk, folder=str(small_disk / "run"), checked=checked)[0]
    assert found["kept"] == 1
    assert found["kinds"] == ["checkpoint", "save_failed"]
    assert "SAVING FAILED at step 2" in found["complaint"]
    assert "would resume from step-000000001" in found["complaint"]
    assert ("GB are needed and" in found["complaint"]) == checked
    assert found["in_a_write"] != checked
    assert found["at_last"] == 3


def starts(folder: str, keep: int) -> str:
    """Returns the error of a start on a disk of 1.5 MB, with a state of 0.65 MB."""
    session = Session(folder, keep=keep, width=300)
    error = ""
    try:
        session.checkpoints.check_disk()
    except ValueError as caught:
        error = str(caught)
    session.end()
    return error


def test_a_disk_without_room_for_the_kept_checkpoints_is_an_error_at_the_start(small_disk: Path) -> None:
    """One checkpoint and its successor fit; three and theirs do not."""
    assert run_on_ranks(2, starts, folder=str(small_disk / "one"), keep=1) == ["", ""]
    errors = run_on_ranks(2, starts, folder=str(small_disk / "three"), keep=3)
    assert all("GB free, and 4 more checkpoints need" in error for error in errors)


# ---------------------------------------------------------------- damage


def resumes(folder: str, checked: bool) -> dict[str, Any]:
    """Loads the newest checkpoint into another state."""
    if not checked:
        files.verify = lambda path: []
    session = Session(folder)
    loaded = plain(session.state())
    lines = session.log.lines
    session.end()
    return {"step": session.step, "state": loaded, "lines": lines}


def plain(state: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Returns a state as arrays, which outlive the process that made them."""
    return {name: tensor.numpy() for name, tensor in state.items()}


def three_saves(folder: str) -> dict[int, Any]:
    session = Session(folder, keep=3)
    for _ in range(3):
        session.save()
    session.end()
    return {step: plain(state) for step, state in session.states.items()}


def flip_bit(path: Path, at: float = 0.5) -> None:
    content = bytearray(path.read_bytes())
    content[int(len(content) * at)] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "a shard cut short": lambda path: os.truncate(path / "__1_0.distcp", 100),
    "an empty directory": lambda path: [file.unlink() for file in path.iterdir()],
}
POINTERS = {
    "missing": lambda path: path.unlink(),
    "garbage": lambda path: path.write_bytes(b"\xff\x00\xfe step"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, Any]]:
    """Returns a run of two ranks with the checkpoints of steps 1 to 3, and the states at these steps; tests must copy it."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    return folder, run_on_ranks(2, three_saves, folder=str(folder))[0]


def same(found: dict[str, Any], states: dict[int, Any]) -> bool:
    one, other = found["state"], states[found["step"]]
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def test_two_ranks_skip_damaged_checkpoints_together(tmp_path: Path, saved: tuple[Path, dict[int, Any]]) -> None:
    before, states = saved
    for number, (name, damage) in enumerate(DAMAGES.items()):
        run = shutil.copytree(before, tmp_path / str(number))
        damage(run / "checkpoints" / "step-000000003")
        if number == 0:
            damage(run / "checkpoints" / "step-000000002")
        for found in (first := run_on_ranks(2, resumes, folder=str(run), checked=True)):
            assert found["step"] == (1 if number == 0 else 2), name
            assert same(found, states), name
        assert any("skipping checkpoint" in line and "step-000000003" in line for line in first[0]["lines"]), name
        assert (run / "checkpoints" / "latest").read_text() == f"step-{first[0]['step']:09d}", name


def test_control_unchecked_damage_is_loaded(tmp_path: Path, saved: tuple[Path, dict[int, Any]]) -> None:
    before, states = saved
    run = shutil.copytree(before, tmp_path / "run")
    flip_bit(run / "checkpoints" / "step-000000003" / "__0_0.distcp")
    found = run_on_ranks(1, resumes, folder=str(run), checked=False)[0]
    assert found["step"] == 3
    assert not same(found, states)


def test_a_damaged_pointer_is_replaced(tmp_path: Path, saved: tuple[Path, dict[int, Any]]) -> None:
    before, states = saved
    for number, (name, damage) in enumerate(POINTERS.items()):
        run = shutil.copytree(before, tmp_path / str(number))
        damage(run / "checkpoints" / "latest")
        found = run_on_ranks(1, resumes, folder=str(run), checked=True)[0]
        assert found["step"] == 3, name
        assert same(found, states), name
        assert (run / "checkpoints" / "latest").read_text() == "step-000000003", name


# ---------------------------------------------------------------- a job whose lock was taken


def saves_after_its_lock_was_taken(folder: str, checked: bool) -> dict[str, Any]:
    session = Session(folder)
    session.save()
    if session.lock.path is not None:  # on rank 0
        session.lock.path.unlink()  # as a job does that takes over
    if not checked:
        session.lock.check = lambda: None  # type: ignore[method-assign]
    raised = session.save()
    found = {"raised": str(raised), "newest": session.on_disk()}
    session.end()
    return found


def test_a_job_whose_lock_was_taken_publishes_nothing(tmp_path: Path) -> None:
    found = run_on_ranks(2, saves_after_its_lock_was_taken, folder=str(tmp_path), checked=True)
    for rank in found:
        assert "another job took" in rank["raised"]
        assert rank["newest"] == 1


def test_control_without_the_check_of_the_lock_it_does(tmp_path: Path) -> None:
    assert run_on_ranks(1, saves_after_its_lock_was_taken, folder=str(tmp_path), checked=False)[0]["newest"] == 2
