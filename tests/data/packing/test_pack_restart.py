"""However often packing is killed, in however many processes and parts it runs, it ends with the same bytes."""

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import data.packing.pack
from data.dataset.index import open_index
from data.packing.pack import pack_shard
from tests.data.packing.test_workers import in_session
from tests.support import REPOSITORY
from tests.support.packs import DRAWN, HOLDOUT, files_of, quietly, tree, write_tree

pytestmark = pytest.mark.slow


def command(source: Path, out: Path, *options: str) -> list[str]:
    settings = ["--shard-mb", str(60_000 / 2**20), "--holdout", "3", "--max-rejected", "10", "--name", "in"]
    return [sys.executable, "-m", "data", "pack", str(source), str(out), *settings, *options]


def start(source: Path, out: Path, *options: str) -> subprocess.Popen:
    """The command line in a process group of its own."""
    return subprocess.Popen(
        command(source, out, *options), cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def unfinished(out: Path, reference: dict[str, bytes]) -> None:
    """What lies under a final name is whole, at any moment: it is the file that an uninterrupted packing makes."""
    for path in [*out.glob("train/*"), *out.glob("val/*")]:
        name = path.relative_to(out).as_posix()
        assert path.read_bytes() == reference.get(name), name


def kill_and_restart(source: Path, packed: Path, folder: Path, moments: list[float]) -> None:
    reference = files_of(packed)
    for number, moment in enumerate(moments):
        out = folder / str(number) / "in"
        workers = str(1 + number % 3)
        process = start(source, out, "--workers", workers)
        try:
            process.wait(timeout=moment)
        except subprocess.TimeoutExpired:
            # All processes at once, as a node fails; or the first alone, whose workers may go on for a moment beside those of the restart.
            (os.killpg if number % 4 else os.kill)(process.pid, signal.SIGKILL)
        process.wait(timeout=30)
        unfinished(out, reference)
        again = start(source, out, "--workers", str(1 + (number + 1) % 3))
        _, said = again.communicate(timeout=60)
        assert again.returncode == 0, said
        assert files_of(out) == reference, f"killed after {moment:.2f} s"
        shutil.rmtree(out)


def duration_of(source: Path, out: Path) -> float:
    began = time.monotonic()
    process = start(source, out, "--workers", "2")
    process.communicate()
    assert process.returncode == 0
    return time.monotonic() - began


def test_killed_twice(source: Path, packed: Path, tmp_path: Path) -> None:
    whole = duration_of(source, tmp_path / "whole" / "in")
    kill_and_restart(source, packed, tmp_path, [whole * 0.6, whole * 0.8])


@pytest.mark.full
def test_killed_at_twenty_moments(source: Path, packed: Path, tmp_path: Path) -> None:
    whole = duration_of(source, tmp_path / "whole" / "in")
    draw = random.Random(0)
    kill_and_restart(source, packed, tmp_path, [whole * (number + draw.random()) / 20 for number in range(20)])


# Ends the process, as kill -9 would, just before the n-th call that makes something durable or gives it a name.
CRASH = """
import os, sys
from pathlib import Path
import data.packing.pack
from data.packing.pack import pack
from data.packing.plan import Settings

source, out, first, step = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
settings = Settings(name="in", shard_bytes=60_000, holdout=3)
replace = os.replace

def torn(source, target):
    # What a packing would do that writes under final names: half of the file, then the rest.
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
    if sys.stdin.readline() != "on\\n" or code == 0:
        break
    crash_at += step
"""


def crashes(source: Path, out: Path, *, first: int, step: int, torn: bool = False) -> Iterator[int]:
    """Packs, again and again, and ends the process each time at a later call; gives the number of that call while OUT lies there."""
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
            process.stdin.write("on\n" if code else "end\n")
            process.stdin.flush()
    finally:
        process.stdin.close()
        process.wait(timeout=30)


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """A source of 14 files, and what is made of it: 3 shards."""
    folder = tmp_path_factory.mktemp("few")
    root = write_tree(folder / "source", {f"n{label}/{number}.jpg": encoded for number, (encoded, label) in enumerate(DRAWN[:13])})
    (root / "n0" / "bad.jpg").write_bytes(b"bad")
    quietly(root, folder / "in", HOLDOUT)
    return root, files_of(folder / "in")


def sweep(few: tuple[Path, dict[str, bytes]], out: Path, **options: Any) -> int:
    source, reference = few
    count = 0
    for _ in crashes(source, out, **options):
        unfinished(out, reference)
        quietly(source, out, HOLDOUT)
        assert files_of(out) == reference
        shutil.rmtree(out)
        count += 1
    return count


def test_ended_at_some_steps(few: tuple[Path, dict[str, bytes]], tmp_path: Path) -> None:
    assert sweep(few, tmp_path / "in", first=2, step=9) > 8


@pytest.mark.long
def test_ended_at_every_step(few: tuple[Path, dict[str, bytes]], tmp_path: Path) -> None:
    assert sweep(few, tmp_path / "in", first=1, step=1) > 75


def test_the_check_sees_half_of_a_file(few: tuple[Path, dict[str, bytes]], tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="in-"):
        sweep(few, tmp_path / "in", first=26, step=1, torn=True)


@pytest.mark.usefixtures("interruptible")
def test_stopped_by_hand(source: Path, packed: Path, tmp_path: Path) -> None:
    """Ctrl-C leaves no process and no scratch, and says little; what was packed counts."""
    out = tmp_path / "in"
    process = start(source, out, "--workers", "2")
    while not list(out.glob("train.packing/done/*.npz")):
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in said
    deadline = time.monotonic() + 10
    while in_session(process.pid):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert list((out / "train.packing" / "scratch").iterdir()) == []
    quietly(source, out, HOLDOUT)
    assert files_of(out) == files_of(packed)


def test_one_process_or_three_and_parts_make_the_same(source: Path, packed: Path, tmp_path: Path) -> None:
    expected = files_of(packed)
    quietly(source, tmp_path / "three" / "in", HOLDOUT, workers=3)
    assert files_of(tmp_path / "three" / "in") == expected

    out = tmp_path / "parts" / "in"
    with pytest.raises(ValueError, match="no shard of train is packed yet"):
        quietly(source, out, HOLDOUT, merge_only=True)
    assert quietly(source, out, HOLDOUT, part=(2, 3)) == []
    with pytest.raises(ValueError, match="shards are not packed yet"):
        quietly(source, out, HOLDOUT, merge_only=True)
    assert quietly(source, out, HOLDOUT, part=(0, 3)) == []
    assert not (out / "train" / "dataset.json").exists()
    assert len(quietly(source, out, HOLDOUT, part=(1, 3))) == 2, "the last one merges"
    assert files_of(out) == expected

    # All at once, each told to do all: they race for the plan, for every shard and for the merge.
    racers = [start(source, tmp_path / "race" / "in", "--workers", "2") for _ in range(3)]
    assert [racer.wait(timeout=60) for racer in racers] == [0, 0, 0], [racer.stderr.read() for racer in racers if racer.stderr]
    assert files_of(tmp_path / "race" / "in") == expected
    parts = [start(source, tmp_path / "shared" / "in", "--part", f"{part}/3", "--workers", "1") for part in range(3)]
    assert [racer.wait(timeout=60) for racer in parts] == [0, 0, 0]
    assert files_of(tmp_path / "shared" / "in") == expected


WITHOUT_LOCKS = """
import errno, fcntl, os, sys, time
import data.packing.pack
from data.packing import plan
from data.__main__ import main

def lockf(file, flags):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

write, fcntl.lockf = plan.write_plan, lockf
data.packing.pack.write_plan = lambda *arguments: (write(*arguments), time.sleep(1))  # until all have made one
sys.exit(main(sys.argv[1:]))
"""


def test_where_files_can_not_be_locked(source: Path, packed: Path, tmp_path: Path) -> None:
    arguments = command(source, tmp_path / "in", "--workers", "1")[3:]
    racers = [subprocess.Popen([sys.executable, "-c", WITHOUT_LOCKS, *arguments], cwd=REPOSITORY) for _ in range(2)]
    assert [racer.wait(timeout=60) for racer in racers] == [0, 0]
    assert files_of(tmp_path / "in") == files_of(packed)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("step", ["recognize_source", "open_plan", "_pack_shards", "pack_shard", "_merge"])
def test_another_process_is_done_first(
    source: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, after: bool
) -> None:
    """It packs, merges and removes the folder of the work just before or after a step of this one: all is well, and nothing is left."""
    out, real = tmp_path / "in", getattr(data.packing.pack, step)

    def overtaken(*arguments: Any, **options: Any) -> Any:
        monkeypatch.undo()
        if not after:
            quietly(source, out, HOLDOUT)
        result = real(*arguments, **options)
        if after:
            quietly(source, out, HOLDOUT)
        return result

    if step == "open_plan":
        overtaken.cache_clear = real.cache_clear  # type: ignore[attr-defined]
    monkeypatch.setattr(data.packing.pack, step, overtaken)
    assert [len(index) for index in quietly(source, out, HOLDOUT)] == [len(open_index(packed / split)) for split in ("train", "val")]
    assert files_of(out) == files_of(packed)


def test_packing_a_shard_again_changes_nothing(source: Path, tmp_path: Path) -> None:
    """As when a part is started twice: the same bytes take the place of the same bytes."""
    out = tmp_path / "in"
    quietly(source, out, part=(0, 2))
    before = files_of(out / "train")
    pack_shard(out, out / "train.packing", 0)
    assert files_of(out / "train") == before


def test_a_source_that_changes_stops_the_job(tmp_path: Path) -> None:
    source = write_tree(tmp_path / "source", tree())
    out = tmp_path / "in"
    quietly(source, out, part=(0, 3))
    for name, data_ in list(tree().items())[:40]:
        (source / name).write_bytes(data_ + b"!")
    with pytest.raises(ValueError, match=r"image \d+\.JPEG: it has changed since it was listed"):
        quietly(source, out, workers=2)
    write_tree(source, tree())
    quietly(source, out)
    quietly(source, tmp_path / "other" / "in")
    assert files_of(out) == files_of(tmp_path / "other" / "in")


def test_a_full_disk_stops_the_job_and_loses_nothing(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "in"
    members = 0
    add = tarfile.TarFile.addfile

    def full_at_last(tar: tarfile.TarFile, member: tarfile.TarInfo, file: Any) -> None:
        nonlocal members
        members += 1
        if members > 70:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        add(tar, member, file)

    with monkeypatch.context() as patch:
        patch.setattr(tarfile.TarFile, "addfile", full_at_last)
        with pytest.raises(ValueError, match=r"in: no space left\. Packed shards are kept: make room and start the same command again"):
            quietly(source, out)
    assert list((out / "train.packing" / "done").iterdir())
    assert list((out / "train.packing" / "scratch").iterdir()) == []
    quietly(source, out)
    quietly(source, tmp_path / "other" / "in")
    assert files_of(out) == files_of(tmp_path / "other" / "in")
