"""Runs one task of a preflight step: inspects its node, or times the network as one rank, and reports in events.

    srun --ntasks-per-node=1 … -m launch.preflight.step nodes CONFIG key=value …          one task on each node
    srun --ntasks-per-node=8 … -m launch.preflight.step network CONFIG key=value …        one task for each rank

A task reports "doing" before each operation and "result" or "failed" at its end (pretrain/run/events.py), and
`python -m launch.preflight` reads these events from the output of the step. The kernel ends a task whose operation takes too long.
"""

import os
import signal
import sys
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data.common.command_line import job_words
from launch.__main__ import set_rank_from_slurm
from launch.preflight.node import Inspection, read_settings
from launch.task import FLUSH_S
from pretrain.config import ConfigError
from pretrain.run.events import emit_event
from pretrain.run.exit_codes import EXIT_CONFIG, EXIT_UNFIT
from pretrain.run.position import host_name

PATIENCE_S = 20  # for one operation
IMPORT_S = 60  # for the import of torch from a cold file system


def main(arguments: list[str]) -> int:
    set_rank_from_slurm()
    try:
        result = _run(*arguments)
    except ConfigError as error:
        _report("failed", error=f"{error}")
        return EXIT_CONFIG
    except Exception as error:  # of any kind: the report names the node
        place = traceback.extract_tb(error.__traceback__)[-1]
        _report("failed", error=f"{type(error).__name__}: {error}".splitlines()[0] + f" ({Path(place.filename).name}, line {place.lineno})")
        return EXIT_UNFIT
    _report("result", result=result)
    return 0


def _run(step: str, *words: str) -> dict[str, Any]:
    path, overrides = job_words(words)
    config, problems = read_settings(Path(path), overrides, int(os.environ["RANKS"]))
    if step == "nodes":
        inspection = Inspection(host_name(), config, problems, "--force-config" in words)
        return asdict(inspection.run(int(os.environ["SLURM_NODEID"]), int(os.environ["SLURM_STEP_NUM_NODES"]), report_progress))
    report_progress("importing torch", IMPORT_S)
    from launch.preflight.network import time_network

    return time_network(config.engine.device, IMPORT_S, report_progress)


def report_progress(doing: str, seconds: float = PATIENCE_S) -> None:
    """Reports the next operation of this process; SIGALRM ends the process if it takes longer than `seconds`."""
    _report("doing", doing=doing)
    signal.setitimer(signal.ITIMER_REAL, seconds)


def _report(kind: str, **values: Any) -> None:
    emit_event(kind, rank=int(os.environ["RANK"]), host=host_name(), **values)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    signal.setitimer(signal.ITIMER_REAL, 0)
    time.sleep(FLUSH_S)
    os._exit(code)  # without waiting for threads that may hang
