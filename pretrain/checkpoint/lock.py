"""One job at a time in a run directory.

    lock = hold(run, log)        at the start, on every rank; released when the process ends in good order
    lock.check()                 on rank 0, before anything is published: raises when the lock was lost

RUN/lock-000007 says who holds the lock; its number grows with every holder, and only one process can create the next. A holder is
gone when its process is, which can be seen on its own machine. Elsewhere only the file system is shared: the holder touches the file
every few seconds, and whoever wants the lock watches it for longer than that. Clocks are not compared. A job that Slurm has started
again takes the lock from its earlier start at once. A holder that was stopped for so long that its lock was taken finds its file gone and
publishes nothing any more.
"""

import atexit
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from pretrain.engine.distributed import run_on_rank_0
from pretrain.run.directory import BEAT_S, PATIENCE_S, list_locks, machine_id, process_start, read_lock
from pretrain.run.position import host_name


class RunLock:
    """The lock, as its holder (rank 0) has it; on other ranks `path` is None and nothing is to be done."""

    def __init__(self, path: Path | None):
        self.path = path
        self._released = threading.Event()
        if path is not None:
            threading.Thread(target=self._beat, name="lock", daemon=True).start()
            atexit.register(self.release)

    def check(self) -> None:
        """Raises RuntimeError when another job has taken the lock over."""
        assert self.path is not None
        try:
            os.utime(self.path)  # asks the file server, where a look might be answered from this machine's memory
        except FileNotFoundError:
            raise RuntimeError(f"{self.path} is gone: another job took {self.path.parent} over, so this one must not write to it") from None

    def release(self) -> None:
        self._released.set()
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def _beat(self) -> None:
        assert self.path is not None
        while not self._released.wait(BEAT_S):
            try:
                os.utime(self.path)
            except FileNotFoundError:  # taken over; `check` says so
                return
            except OSError:  # a file server's bad moment: others are patient
                continue


def hold(run: Path, log: Callable[[str], None]) -> RunLock:
    """Takes the lock of a run directory, which is made if need be. Collective.

    Raises:
        ValueError: another job holds it, or the directory can't be written to.
    """
    path = run_on_rank_0(lambda: acquire(run, log))
    return RunLock(path if dist.get_rank() == 0 else None)


def acquire(run: Path, log: Callable[[str], None]) -> Path:
    """Creates this process's lock file."""
    try:
        run.mkdir(parents=True, exist_ok=True)
        while True:
            held = list_locks(run)
            for path in held[-1:]:
                _must_be_gone(path, log)
            mine = run / f"lock-{_number(held[-1]) + 1 if held else 1:06d}"
            try:
                descriptor = os.open(mine, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            except FileExistsError:  # another job was faster
                continue
            os.write(descriptor, json.dumps(_this_process()).encode())
            os.close(descriptor)
            if list_locks(run)[-1] == mine:  # else a listing from memory had hidden a newer one
                for path in held:
                    path.unlink(missing_ok=True)
                return mine
            mine.unlink()
    except OSError as error:
        raise ValueError(f"run directory {run} can't be written to: {error}") from error


def _number(path: Path) -> int:
    return int(path.name.removeprefix("lock-"))


def _must_be_gone(path: Path, log: Callable[[str], None]) -> None:
    """Raises ValueError when the lock's holder lives."""
    held = read_lock(path)
    if held is None:  # made in this moment
        time.sleep(min(1.0, PATIENCE_S / 10))
        held = read_lock(path)
    who = (
        f"{path.parent} is in use by job {held['job'] or 'without a number'}, process {held['pid']} on {held['host']}, "
        f"since {held['since']}"
        if held
        else f"{path.parent} is in use"
    )
    if held and held["job"] and held["job"] == os.environ.get("SLURM_JOB_ID"):
        # Slurm has started the job again: whatever is left of the earlier start, on a node that it has lost, must not go on.
        log(f"{who}, an earlier start of this job: taking over")
        return
    if held and held["machine"] == machine_id():
        alive = process_start(held["pid"]) == held["started"]
    else:
        log(f"{who}: watching {path.name} for up to {PATIENCE_S:.0f} s to see whether that still runs")
        alive = _beats(path)
    if alive:
        raise ValueError(f"{who}; wait until it ends, or give this job its own name or run.dir")
    log(f"{who}, which runs no more: taking over")


def _beats(path: Path) -> bool:
    """Whether the file is touched within PATIENCE_S. It is opened anew each time: that makes a network file system look."""
    seen = _touched(path)
    deadline = time.monotonic() + PATIENCE_S
    while seen is not None and time.monotonic() < deadline:
        time.sleep(min(1.0, PATIENCE_S / 10))
        now = _touched(path)
        if now is not None and now != seen:
            return True
        seen = now
    return False


def _touched(path: Path) -> int | None:
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None


def _this_process() -> dict[str, Any]:
    return {
        "host": host_name(),
        "pid": os.getpid(),
        "job": os.environ.get("SLURM_JOB_ID"),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "machine": machine_id(),
        "started": process_start(os.getpid()),
    }
