"""Packing ends with the same bytes however often it is killed, and in however many processes and parts it runs."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import data.packing.pack
from data.dataset.index import open_index
from tests.data.packing.test_workers import list_session
from tests.support import REPOSITORY
from tests.support.packs import DRAWN, HOLDOUT, make_source_files, pack_small, read_files, write_files

pytestmark = pytest.mark.slow


def make_command(source: Path, out: Path, *options: str) -> list[str]:
    settings = ["--shard-mb", str(60_000 / 2**20), "--holdout", "3", "--max-rejected", "10", "--name", "in"]
    return [sys.executable, "-m", "data", "pack", str(source), str(out), *settings, *options]


def start_packing(source: Path, out: Path, *options: str) -> subprocess.Popen:
    """Starts the command line in a new process group."""
    command = make_command(source, out, *options)
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True)


def check_final_files(out: Path, reference: dict[str, bytes]) -> None:
    """Asserts that every file under a final name is whole: equal to that of an uninterrupted packing."""
    for path in [*out.glob("train/*"), *out.glob("val/*")]:
        name = path.relative_to(out).as_posix()
        assert path.read_bytes() == reference.get(name), name


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(("number", "is_to_group"), [(signal.SIGKILL, True), (signal.SIGKILL, False), (signal.SIGINT, True)])
def test_packing_resumes_after_a_signal(source: Path, packed: Path, tmp_path: Path, number: signal.Signals, is_to_group: bool) -> None:
    """To all processes, as when a node fails or at Ctrl-C, or to the parent alone, whose workers may overlap with the next run's."""
    reference, out = read_files(packed), tmp_path / "in"
    process = start_packing(source, out, "--workers", "2")
    while not list(out.glob("train.packing/done/*.npz")):
        assert process.poll() is None
        time.sleep(0.01)
    (os.killpg if is_to_group else os.kill)(process.pid, number)
    _, errors = process.communicate(timeout=30)
    check_final_files(out, reference)
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert "Traceback" not in errors
        assert not list_session(process.pid), "no process is left"
        assert not list((out / "train.packing" / "scratch").iterdir())
    again = start_packing(source, out, "--workers", "3")
    _, errors = again.communicate(timeout=60)
    assert again.returncode == 0, errors
    assert read_files(out) == reference


# Ends the process, as kill -9 would, just before the n-th call that syncs, creates or renames a file or folder.
CRASH = """
import os, sys
from pathlib import Path
import webdataset  # takes seconds, and so is imported before the forks
import data.packing.pack
from data.packing.pack import pack
from data.packing.plan import Settings

source, out, first, step = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
settings = Settings(name="in", shard_bytes=60_000, holdout=3)
replace = os.replace

def torn(source, target):
    # Writes a file in two halves under its final name, as a packing without renames would.
    content = Path(source).read_bytes()
    with open(target, "wb") as file:
        for half in (content[: len(content) // 2], content[len(content) // 2 :]):
            file.write(half)
            file.flush()
            os.fsync(file.fileno())
    os.unlink(source)

def run(crash_at):
    calls = 0
    def counted(function):
        def call(*arguments, **options):
            nonlocal calls
            calls += 1
            if calls == crash_at:
                os._exit(9)
            return function(*arguments, **options)
        return call
    for name in ("fsync", "rename", "mkdir", "rmdir"):
        setattr(os, name, counted(getattr(os, name)))
    os.replace = torn if "torn" in sys.argv else counted(replace)
    pack(source, out, settings, max_rejected=10)
    os._exit(0)

crash_at = first
while True:
    child = os.fork()
    if not child:
        sys.stderr = open(os.devnull, "w")
        run(crash_at)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(crash_at, code, flush=True)
    if sys.stdin.readline() != "next\\n" or code == 0:
        break
    crash_at += step
"""


def crash_repeatedly(source: Path, out: Path, *, first: int, step: int, torn: bool = False) -> Iterator[int]:
    """Packs repeatedly, ending the process at a later call each time; yields the number of that call while OUT exists."""
    arguments = [str(source), str(out), str(first), str(step), *["torn"] * torn]
    process = subprocess.Popen(
        [sys.executable, "-c", CRASH, *arguments], cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        for line in process.stdout:
            call, code = map(int, line.split())
            assert code in (0, 9)
            yield call
            process.stdin.write("next\n" if code else "end\n")
            process.stdin.flush()
    finally:
        process.stdin.close()
        process.wait(timeout=30)


@pytest.fixture(scope="module")
def small_source(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """A source of 14 files, and the files of its 3 packed shards."""
    folder = tmp_path_factory.mktemp("few")
    root = write_files(folder / "source", {f"n{label}/{number}.jpg": encoded for number, (encoded, label) in enumerate(DRAWN[:13])})
    (root / "n0" / "bad.jpg").write_bytes(b"bad")
    pack_small(root, folder / "in", HOLDOUT)
    return root, read_files(folder / "in")


def crash_and_resume(small_source: tuple[Path, dict[str, bytes]], out: Path, **options: Any) -> int:
    source, reference = small_source
    count = 0
    for _ in crash_repeatedly(source, out, **options):
        check_final_files(out, reference)
        pack_small(source, out, HOLDOUT)
        assert read_files(out) == reference
        shutil.rmtree(out)
        count += 1
    return count


def test_packing_resumes_after_crashes_at_some_calls(small_source: tuple[Path, dict[str, bytes]], tmp_path: Path) -> None:
    assert crash_and_resume(small_source, tmp_path / "in", first=2, step=9) > 8


@pytest.mark.long
def test_packing_resumes_after_a_crash_at_every_call(small_source: tuple[Path, dict[str, bytes]], tmp_path: Path) -> None:
    assert crash_and_resume(small_source, tmp_path / "in", first=1, step=1) > 75


def test_crash_test_detects_half_written_files(small_source: tuple[Path, dict[str, bytes]], tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="in-"):
        crash_and_resume(small_source, tmp_path / "in", first=26, step=1, torn=True)


def test_workers_and_parts_make_the_same_files(source: Path, packed: Path, tmp_path: Path) -> None:
    expected = read_files(packed)
    pack_small(source, tmp_path / "three" / "in", HOLDOUT, workers=3)
    assert read_files(tmp_path / "three" / "in") == expected

    out = tmp_path / "parts" / "in"
    with pytest.raises(ValueError, match="no shard of train is packed yet"):
        pack_small(source, out, HOLDOUT, merge_only=True)
    assert pack_small(source, out, HOLDOUT, part=(2, 3)) == []
    with pytest.raises(ValueError, match="shards are not packed yet"):
        pack_small(source, out, HOLDOUT, merge_only=True)
    assert pack_small(source, out, HOLDOUT, part=(0, 3)) == []
    assert not (out / "train" / "dataset.json").exists()
    assert len(pack_small(source, out, HOLDOUT, part=(1, 3))) == 2, "the last part merges"
    assert read_files(out) == expected


WITHOUT_LOCKS = """
import errno, fcntl, os, sys, time
import data.packing.pack
from data.packing import plan
from data.__main__ import main

def lockf(file, flags):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

write, fcntl.lockf = plan.write_plan, lockf
data.packing.pack.write_plan = lambda *arguments: (write(*arguments), time.sleep(1))  # until every process has written a plan
sys.exit(main(sys.argv[1:]))
"""


def test_processes_race_on_a_file_system_without_locks(source: Path, packed: Path, tmp_path: Path) -> None:
    arguments = make_command(source, tmp_path / "in", "--workers", "1")[3:]
    racers = [subprocess.Popen([sys.executable, "-c", WITHOUT_LOCKS, *arguments], cwd=REPOSITORY) for _ in range(2)]
    assert [racer.wait(timeout=60) for racer in racers] == [0, 0]
    assert read_files(tmp_path / "in") == read_files(packed)


@pytest.mark.parametrize(("step", "is_after"), [("recognize_source", False), ("open_plan", True), ("pack_shard", True), ("_merge", False)])
def test_another_process_finishes_first(
    source: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, is_after: bool
) -> None:
    """It packs, merges and removes the work folder just before or after a step of this process."""
    out, real_step = tmp_path / "in", getattr(data.packing.pack, step)

    def run_both(*arguments: Any, **options: Any) -> Any:
        monkeypatch.undo()
        if not is_after:
            pack_small(source, out, HOLDOUT)
        result = real_step(*arguments, **options)
        if is_after:
            pack_small(source, out, HOLDOUT)
        return result

    if step == "open_plan":
        run_both.cache_clear = real_step.cache_clear  # type: ignore[attr-defined]
    monkeypatch.setattr(data.packing.pack, step, run_both)
    assert [len(index) for index in pack_small(source, out, HOLDOUT)] == [len(open_index(packed / split)) for split in ("train", "val")]
    assert read_files(out) == read_files(packed)


def test_changed_source_stops_the_packing(tmp_path: Path) -> None:
    source = write_files(tmp_path / "source", make_source_files())
    out = tmp_path / "in"
    pack_small(source, out, part=(0, 3))
    for name, encoded in list(make_source_files().items())[:40]:
        (source / name).write_bytes(encoded + b"!")
    with pytest.raises(ValueError, match=r"image \d+\.JPEG: it has changed since it was listed"):
        pack_small(source, out, workers=2)
    write_files(source, make_source_files())
    pack_small(source, out)
    pack_small(source, tmp_path / "other" / "in")
    assert read_files(out) == read_files(tmp_path / "other" / "in")


def test_full_disk_stops_the_packing_and_loses_nothing(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "in"
    real_write, shards = data.packing.pack.write_shard, 0

    def write_until_full(*arguments: Any) -> Any:
        nonlocal shards
        shards += 1
        if shards > 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real_write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(data.packing.pack, "write_shard", write_until_full)
        with pytest.raises(ValueError, match=r"in: no space left\. Packed shards are kept: make room and start the same command again"):
            pack_small(source, out)
    assert len(list((out / "train.packing" / "done").iterdir())) == 3
    assert list((out / "train.packing" / "scratch").iterdir()) == []
    pack_small(source, out)
    pack_small(source, tmp_path / "other" / "in")
    assert read_files(out) == read_files(tmp_path / "other" / "in")
