"""Ensures that only one job at a time trains in a run directory.

    lock = lock_run(run, log)    on every rank, at the start; released when the process ends normally
    lock.check()                 on rank 0, before publishing a checkpoint: raises if another job has taken the lock

The file RUN/lock-000007 names the holder. The number increases with every holder, and only one process can create the next number.

The lock is free when the holder's process is gone, which only the holder's own machine can see. Other machines share just the file system
with it: the holder touches the file every few seconds, and a job that wants the lock watches the file for longer than that. Clocks are
not compared. A job that Slurm has requeued takes the lock from its earlier start at once. A holder that was suspended until its lock was
taken finds its file gone, and publishes nothing more.
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
    """Holds the lock of a run directory. Only rank 0 has a `path`, and checks and releases the lock."""

    def __init__(self, path: Path | None):
        self.path = path
        self._released = threading.Event()
        if path is not None:
            threading.Thread(target=self._beat, name="lock", daemon=True).start()
            atexit.register(self.release)

    def check(self) -> None:
        """Raises RuntimeError if another job has taken the lock."""
        assert self.path is not None
        try:
            os.utime(self.path)  # always reaches the file server, while a stat may be answered from this machine's cache
        except FileNotFoundError:
            raise RuntimeError(f"{self.path} is gone: another job took {self.path.parent} over, so this one must not write to it") from None

    def release(self) -> None:
        """Removes the lock file and ends the heartbeat."""
        self._released.set()
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def _beat(self) -> None:
        assert self.path is not None
        while not self._released.wait(BEAT_S):
            try:
                os.utime(self.path)
            except FileNotFoundError:  # another job has the lock; `check` raises
                return
            except OSError:  # a temporary failure of the file server, shorter than PATIENCE_S
                continue


def lock_run(run: Path, log: Callable[[str], None]) -> RunLock:
    """Takes the lock of a run directory, and creates the directory. Collective; ValueError if another job holds the lock."""
    path = run_on_rank_0(lambda: acquire(run, log))
    return RunLock(path if dist.get_rank() == 0 else None)


def acquire(run: Path, log: Callable[[str], None]) -> Path:
    """Creates this process's lock file and returns its path; raises as `lock_run` does."""
    try:
        run.mkdir(parents=True, exist_ok=True)
        while True:
            held = list_locks(run)
            if held:
                _require_gone(held[-1], log)
            mine = run / f"lock-{int(held[-1].name.removeprefix('lock-')) + 1 if held else 1:06d}"
            try:
                descriptor = os.open(mine, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            except FileExistsError:  # another job was faster
                continue
            os.write(descriptor, json.dumps(_describe_this_process()).encode())
            os.close(descriptor)
            if list_locks(run)[-1] == mine:  # otherwise the first listing came from a cache that lacked a newer lock
                for path in held:
                    path.unlink(missing_ok=True)
                return mine
            mine.unlink()
    except OSError as error:
        raise ValueError(f"run directory {run} can't be written to: {error}") from error


def _require_gone(path: Path, log: Callable[[str], None]) -> None:
    """Raises ValueError if the holder of a lock is alive."""
    held = read_lock(path)
    if held is None:  # the file may have just been created and not be written yet
        time.sleep(min(1.0, PATIENCE_S / 10))
        held = read_lock(path)
    who = f"{path.parent} is in use"
    if held:
        who += f" by job {held['job'] or 'without a number'}, process {held['pid']} on {held['host']}, since {held['since']}"
    if held and held["job"] and held["job"] == os.environ.get("SLURM_JOB_ID"):
        # Slurm has requeued the job. Processes of the earlier start, on a node that Slurm has lost, must not continue.
        log(f"{who}, an earlier start of this job: taking over")
        return
    if held and held["machine"] == machine_id():
        is_alive = process_start(held["pid"]) == held["started"]
    else:
        log(f"{who}: watching {path.name} for up to {PATIENCE_S:.0f} s to see whether its holder still runs")
        is_alive = _is_touched(path)
    if is_alive:
        raise ValueError(f"{who}; wait until it ends, or give this job its own name or run.dir")
    log(f"{who}, which runs no more: taking over")


def _is_touched(path: Path) -> bool:
    """Returns whether the file is touched within PATIENCE_S."""
    before = _read_touch(path)
    deadline = time.monotonic() + PATIENCE_S
    while before is not None and time.monotonic() < deadline:
        time.sleep(min(1.0, PATIENCE_S / 10))
        now = _read_touch(path)
        if now is not None and now != before:
            return True
        before = now
    return False


def _read_touch(path: Path) -> int | None:
    try:
        with path.open("rb") as file:  # opening makes a network file system ask its server
            return os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None


def _describe_this_process() -> dict[str, Any]:
    return {
        "host": host_name(),
        "pid": os.getpid(),
        "job": os.environ.get("SLURM_JOB_ID"),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "machine": machine_id(),
        "started": process_start(os.getpid()),
    }
