"""One job at a time in a run directory: on this machine by its process, on others by the heartbeat."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pretrain.checkpoint import lock
from pretrain.checkpoint.lock import RunLock, acquire
from pretrain.run.directory import machine_id, process_start


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT_S", 0.1)
    monkeypatch.setattr(lock, "PATIENCE_S", 1.0)


@pytest.fixture
def other_process() -> Iterator[subprocess.Popen]:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    yield process
    process.kill()
    process.wait()


def held_by(run: Path, process: subprocess.Popen, elsewhere: bool = False) -> Path:
    """Writes the lock file of a job whose rank 0 is another process, on this machine or elsewhere."""
    run.mkdir(exist_ok=True)
    path = run / "lock-000004"
    holder = {"host": "node7", "pid": process.pid, "job": "123", "since": "2026-01-01 00:00:00 +0000"}
    place = "another/pid:[1]" if elsewhere else machine_id()
    path.write_text(json.dumps(holder | {"machine": place, "started": process_start(process.pid)}))
    return path


def test_a_lock_names_its_holder_and_is_removed_by_release(tmp_path: Path) -> None:
    held = RunLock(acquire(tmp_path / "run", print))
    (path,) = (tmp_path / "run").iterdir()
    assert path.name == "lock-000001"
    holder = json.loads(path.read_text())
    assert (holder["pid"], holder["host"]) == (os.getpid(), os.uname().nodename)
    held.check()
    held.release()
    assert list((tmp_path / "run").iterdir()) == []
    RunLock(acquire(tmp_path / "run", print)).release()


def test_a_second_job_on_a_live_run_is_refused_with_the_holders_name(tmp_path: Path, other_process: subprocess.Popen) -> None:
    path = held_by(tmp_path, other_process)
    with pytest.raises(
        ValueError, match=rf"is in use by job 123, process {other_process.pid} on node7, since 2026.*its own name or run.dir"
    ):
        acquire(tmp_path, print)
    other_process.send_signal(signal.SIGSTOP)  # a stopped process can continue
    with pytest.raises(ValueError, match="is in use by job 123"):
        acquire(tmp_path, print)
    assert list(tmp_path.iterdir()) == [path]


def test_the_lock_of_a_killed_job_is_taken_over_at_once(tmp_path: Path, other_process: subprocess.Popen) -> None:
    held_by(tmp_path, other_process)
    other_process.kill()
    while process_start(other_process.pid) is not None:  # until it has ended; its exit code is not collected
        time.sleep(0.01)
    lines: list[str] = []
    began = time.monotonic()
    path = acquire(tmp_path, lines.append)
    assert time.monotonic() - began < 0.5
    assert list(tmp_path.iterdir()) == [path]
    assert path.name == "lock-000005"
    assert "which runs no more: taking over" in lines[-1]


def test_a_reused_process_number_is_not_the_holder(tmp_path: Path, other_process: subprocess.Popen) -> None:
    path = held_by(tmp_path, other_process)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"started": 1}))
    assert acquire(tmp_path, print).name == "lock-000005"


def test_a_lock_of_another_machine_is_live_while_it_is_touched(tmp_path: Path, other_process: subprocess.Popen) -> None:
    path = held_by(tmp_path, other_process, elsewhere=True)
    holder = RunLock(path)  # touches the file as the other machine's process does
    lines: list[str] = []
    with pytest.raises(ValueError, match="is in use by job 123"):
        acquire(tmp_path, lines.append)
    assert "watching lock-000004" in lines[0]
    holder._released.set()  # it is killed there
    time.sleep(0.2)
    began = time.monotonic()
    mine = acquire(tmp_path, lines.append)
    assert time.monotonic() - began >= 1
    assert mine.name == "lock-000005"
    with pytest.raises(RuntimeError, match="another job took"):  # a suspended holder that continues
        holder.check()


@pytest.mark.parametrize("text", ["", '{"host": "no'])
def test_an_incomplete_lock_file_counts_by_its_touches(tmp_path: Path, text: str) -> None:
    (tmp_path / "lock-000001").write_text(text)
    assert acquire(tmp_path, print).name == "lock-000002"


def contend(run: str, started: "multiprocessing.synchronize.Event", got: "multiprocessing.Queue") -> None:
    lock.PATIENCE_S = 0.5
    started.wait()
    try:
        got.put(acquire(Path(run), lambda line: None).name)
        time.sleep(2)
    except ValueError:
        got.put(None)


@pytest.mark.parametrize("stale", [False, True])
def test_one_of_many_jobs_that_start_at_once_gets_the_lock(tmp_path: Path, stale: bool) -> None:
    if stale:
        (tmp_path / "lock-000007").write_text("")
    context = multiprocessing.get_context("fork")
    started, got = context.Event(), context.Queue()
    processes = [context.Process(target=contend, args=(str(tmp_path), started, got)) for _ in range(8)]
    for process in processes:
        process.start()
    started.set()
    names = [got.get(timeout=30) for _ in processes]
    for process in processes:
        process.join()
    assert [name for name in names if name] == ["lock-000008" if stale else "lock-000001"]


def test_the_heartbeat_survives_a_failure_of_the_file_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = RunLock(acquire(tmp_path, print))
    original: Callable[..., None] = os.utime
    failing = threading.Event()

    def utime(*args: object) -> None:
        if failing.is_set():
            raise OSError(5, "Input/output error")
        original(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "utime", utime)
    failing.set()
    time.sleep(0.3)
    failing.clear()
    before = held.path.stat().st_mtime_ns  # type: ignore[union-attr]
    time.sleep(0.4)
    assert held.path.stat().st_mtime_ns > before  # type: ignore[union-attr]
    held.release()
