"""Runs a function as every rank of a job on this machine, in processes of their own, for tests of what needs several ranks.

    results = run_on_ranks(2, "tests.pretrain.test_checkpoint:worker", folder=str(tmp_path), stage=1)

The function takes the keyword arguments (what JSON can hold) and returns what JSON can hold; results are in rank order.
"""

import importlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from launch.__main__ import free_port

REPOSITORY = Path(__file__).parent.parent


def run_on_ranks(ranks: int, function: str, **kwargs: Any) -> list[Any]:
    """Raises AssertionError with the output of the ranks that failed."""
    with tempfile.TemporaryDirectory() as folder:
        shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
        processes = []
        for rank in range(ranks):
            environment = os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            command = [sys.executable, "-m", "tests.ranks", function, json.dumps(kwargs), f"{folder}/{rank}.json"]
            log = open(f"{folder}/{rank}.log", "w")  # noqa: SIM115  the process writes to it
            processes.append(subprocess.Popen(command, env=environment, cwd=REPOSITORY, stdout=log, stderr=subprocess.STDOUT))
        try:
            codes = [process.wait(timeout=300) for process in processes]
        finally:
            for process in processes:
                process.kill()
        failed = [
            f"rank {rank} ended with {code}:\n{Path(folder, f'{rank}.log').read_text()[-4000:]}" for rank, code in enumerate(codes) if code
        ]
        assert not failed, "\n".join(failed)
        return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(ranks)]


if __name__ == "__main__":
    module, name = sys.argv[1].split(":")
    result = getattr(importlib.import_module(module), name)(**json.loads(sys.argv[2]))
    Path(sys.argv[3]).write_text(json.dumps(result))
