"""Starts a job's processes: all of them on this machine, or one as a task of a Slurm step.

    python -m launch configs/van_b3_in22k.yaml [--force-config] key=value …
    python -m launch evaluate runs/van_b3_in22k data.val=datasets/in1k/val …       what follows is for `python -m pretrain evaluate`

As a task of a Slurm step (srun, one task a GPU) it starts the rank that SLURM_PROCID says (launch/task.py). Elsewhere it starts one
process for each GPU of this machine, or for each of RANKS (default 1 without a GPU), passes stop signals on to them, and ends them all
when one fails. When training is complete it exports the weights (run.export).
There the exit code is the job's: 0 complete, 2 settings that can't work, 85 stopped and saved, start again, 86 ended by RUN/STOP.

torchrun works too: torchrun --nproc-per-node=8 -m pretrain train CONFIG key=value …
"""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

from data.common.command_line import job_words
from launch import task
from pretrain import config as settings
from pretrain.run.exit_codes import EXIT_AGAIN, EXIT_CONFIG, EXIT_ENDED

# Seconds. A rank that was told to stop saves first; one that hangs instead is killed. When a rank fails, the others have a moment:
# they may be about to fail of the same, and be the ones who say why.
GRACE, LEAVE = 120, 5


def main() -> int:
    job = [] if sys.argv[1:2] == ["evaluate"] else ["train"]
    command = [sys.executable, "-m", "pretrain", *job, *sys.argv[1:]]
    if "SLURM_PROCID" in os.environ and "SLURM_STEP_ID" in os.environ:
        os.environ |= slurm_rank(dict(os.environ))
        return task.run(command)
    code = run_here(command, ranks_here())
    if code == 0 and job:
        run = settings.load(*job_words(sys.argv[1:])).run
        if run.export:
            from pretrain.weights.export import release

            release(Path(run.dir))
    return code


def slurm_rank(environment: dict[str, str]) -> dict[str, str]:
    """What torch.distributed wants to know, from what srun tells a task; MASTER_ADDR and MASTER_PORT come from launch/job.sh."""
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_NTASKS"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
    }


def ranks_here() -> int:
    if "RANKS" in os.environ:
        return int(os.environ["RANKS"])
    import torch

    return max(1, torch.cuda.device_count())


def run_here(command: list[str], ranks: int) -> int:
    """Runs `command` as every rank of a job on this machine; returns 0, or the exit code of the first rank that failed."""
    shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // ranks))}

    def pass_on(number: int, frame: FrameType | None) -> None:
        for process in processes:
            process.send_signal(number)

    with task.usr1_waiting():
        processes = [
            subprocess.Popen(command, env=threads | os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(ranks)
        ]
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, pass_on)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to the ranks itself
    failed = wait(processes)
    if failed is None:
        return 0
    code = failed.returncode
    if code not in (EXIT_AGAIN, EXIT_CONFIG, EXIT_ENDED):
        print(f"rank {processes.index(failed)} {task.died(code)}", file=sys.stderr, flush=True)
    let_end(processes, GRACE if code in (EXIT_AGAIN, EXIT_ENDED) else LEAVE)
    for process in processes:
        process.terminate()
    let_end(processes, LEAVE)
    for process in processes:
        process.kill()
        process.wait()
    return code if code > 0 else 128 - code  # killed by a signal: as a shell reports it


def wait(processes: list[subprocess.Popen]) -> subprocess.Popen | None:
    """Waits until all have ended with 0 (returns None), or one has failed (returns it)."""
    while True:
        codes = [process.poll() for process in processes]  # all of them: one that runs must not hide one that failed
        failed = next((process for process, code in zip(processes, codes, strict=True) if code), None)
        if failed is not None or None not in codes:
            return failed
        time.sleep(0.1)


def let_end(processes: list[subprocess.Popen], seconds: float) -> None:
    """Returns when all have ended, or when the time is up."""
    deadline = time.monotonic() + seconds
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        time.sleep(0.1)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    sys.exit(main())
