"""Runs a function as every rank of a job on this machine, in processes of their own, for tests of what needs several ranks.

    results = run_on_ranks(2, session, folder=str(tmp_path), stage=1)

The function is one of a test module's, takes keyword arguments and returns something that can be pickled; results are in rank
order. The processes are forked from one that has imported what takes seconds to import.
"""

import multiprocessing
import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from launch.__main__ import free_port

REPOSITORY = Path(__file__).parent.parent
HEAVY = ["torch", "deepspeed", "timm", "nvidia.dali.fn", "torch.distributed.checkpoint"]


def run_on_ranks(ranks: int, function: Callable[..., Any], **kwargs: Any) -> list[Any]:
    """Raises AssertionError with the tracebacks of the ranks that failed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(HEAVY)
    shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes, ends = [], []
    for rank in range(ranks):
        end, other_end = context.Pipe()
        environment = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        processes.append(context.Process(target=_be_rank, args=(other_end, environment, function, kwargs), daemon=True))
        processes[-1].start()
        ends.append(end)
    try:
        # A rank that fails leaves the others waiting for it: whoever speaks first is heard first.
        outcomes: dict[int, tuple[bool, Any]] = {}
        while len(outcomes) < ranks and all(succeeded for succeeded, _ in outcomes.values()):
            silent = {end: rank for rank, end in enumerate(ends) if rank not in outcomes}
            spoken = multiprocessing.connection.wait(list(silent), timeout=300)
            assert spoken, f"ranks {sorted(silent.values())} did not end"
            outcomes |= {silent[end]: end.recv() for end in spoken}  # type: ignore[index,union-attr]
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
