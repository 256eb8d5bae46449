"""Runs a function, or a training job, on several ranks: one process each on this machine.

    results = run_on_ranks(2, session, folder=str(tmp_path), stage=1)

The function belongs to a module, takes keyword arguments and returns a picklable value; results are in rank order. The processes are
forked from a server process that has imported the slow modules (tests/support/heavy.py).

    codes = join(start_training(2, tmp_path / "log", ["job.yaml", "steps=2"])).codes

starts such processes as the ranks of a training job, each `python -m pretrain train`.
"""

import atexit
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

from launch.__main__ import free_port

PATIENCE_S, LEAVE_S = 240, 5
Prepare = Callable[[int], None]


@dataclass(frozen=True)
class Ended:
    """The end of a job.

    Args:
        codes: exit codes by rank; negative: the signal that killed the rank.
        first: exit code of the first rank that failed, which a launcher would return.
        stopped: whether the job was killed because one of its ranks was stopped (SIGSTOP).
    """

    codes: list[int | None]
    first: int
    stopped: bool


def run_on_ranks(ranks: int, function: Callable[..., Any], **kwargs: Any) -> list[Any]:
    """Returns the results of all ranks; raises AssertionError with the tracebacks of the ranks that failed."""
    context = _context()
    processes, ends = [], []
    for environment in _environments(ranks):
        end, other_end = context.Pipe()
        processes.append(context.Process(target=_be_rank, args=(other_end, environment, function, kwargs), daemon=True))
        processes[-1].start()
        ends.append(end)
    try:
        # The ranks wait for one that fails, so results are taken in the order in which they come.
        outcomes: dict[int, tuple[bool, Any]] = {}
        while len(outcomes) < ranks and all(succeeded for succeeded, _ in outcomes.values()):
            pending = {end: rank for rank, end in enumerate(ends) if rank not in outcomes}
            ready = multiprocessing.connection.wait(list(pending), timeout=300)
            assert ready, f"ranks {sorted(pending.values())} did not end"
            outcomes |= {pending[end]: end.recv() for end in ready}  # type: ignore[index,union-attr]
    finally:
        for process in processes:
            process.terminate()
            process.join()
    failed = [f"rank {rank}:\n{outcome}" for rank, (succeeded, outcome) in outcomes.items() if not succeeded]
    assert not failed, "\n".join(failed)
    return [outcomes[rank][1] for rank in range(ranks)]


def _be_rank(end: Connection, environment: dict[str, str], function: Callable[..., Any], kwargs: dict[str, Any]) -> None:
    os.environ |= environment
    try:
        end.send((True, function(**kwargs)))
    except BaseException:
        end.send((False, traceback.format_exc()))


def start_training(
    ranks: int, log: Path, arguments: Sequence[str], *, environment: Mapping[str, str] | None = None, prepare: Prepare | None = None
) -> list[multiprocessing.Process]:
    """Starts the ranks of a job; returns their processes.

    Args:
        ranks: number of ranks.
        log: file that their output is appended to.
        arguments: those of `pretrain train`.
        environment: further environment variables.
        prepare: is called with the rank in its process before anything else, to break or replace something.
    """
    processes = []
    for variables in _environments(ranks):
        process = _context().Process(target=_train, args=(log, list(arguments), variables | dict(environment or {}), prepare), daemon=True)
        process.start()
        processes.append(process)
    return processes  # type: ignore[return-value]


def _train(log: Path, arguments: list[str], environment: dict[str, str], prepare: Prepare | None) -> None:
    os.environ |= environment
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if prepare is not None:
        prepare(int(environment["RANK"]))
    sys.argv = ["pretrain", "train", *arguments]
    from pretrain.__main__ import main

    try:
        sys.exit(main())
    finally:
        atexit._run_exitfuncs()  # processes of multiprocessing skip them


def join(processes: list[multiprocessing.Process]) -> Ended:
    """Waits for a job as a launcher does: LEAVE_S after a rank has failed the others are killed. If a rank is stopped, all are."""
    deadline = time.monotonic() + PATIENCE_S
    leave: float | None = None
    first, stopped = 0, False
    while any(process.exitcode is None for process in processes):
        assert time.monotonic() < deadline, "the job did not end"
        failed = [process.exitcode for process in processes if process.exitcode not in (None, 0, 85)]
        if failed and leave is None:
            first, leave = failed[0], time.monotonic() + LEAVE_S
        if not stopped and any(_is_stopped(process) for process in processes):
            time.sleep(1)  # the others must wait for it
            assert all(process.exitcode is None for process in processes)
            stopped, leave = True, time.monotonic()
        if leave is not None and time.monotonic() >= leave:
            kill(processes)
        time.sleep(0.02)
    codes = [process.exitcode for process in processes]
    return Ended(codes, first or next((code for code in codes if code), 0), stopped)


def kill(processes: list[multiprocessing.Process]) -> None:
    for process in processes:
        process.kill()
        process.join()


def _is_stopped(process: multiprocessing.Process) -> bool:
    try:
        return process.exitcode is None and psutil.Process(process.pid).status() == psutil.STATUS_STOPPED
    except psutil.NoSuchProcess:
        return False


def _context() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.heavy"])
    return context


def _environments(ranks: int) -> list[dict[str, str]]:
    shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
