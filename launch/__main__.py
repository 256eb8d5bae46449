"""Starts a job's processes: all ranks on this machine, or one rank as a task of a Slurm step.

    python -m launch configs/van_b3_in22k.yaml [--force-config] key=value …
    python -m launch evaluate runs/van_b3_in22k data.val=datasets/in1k/val …       same arguments as `python -m pretrain evaluate`

As a task of a Slurm step (srun, one task per GPU) it starts rank SLURM_PROCID (launch/task.py). Elsewhere it starts one process per GPU
of this machine, or RANKS processes (default 1 without a GPU), forwards stop signals to them, ends all of them when one fails, and
exports the weights of a complete run (run.export). Its exit codes there: 0 complete, 2 wrong settings, 85 stopped and saved (start
again), 86 stopped by RUN/STOP.

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
from pretrain.run.exit_codes import EXIT_CONFIG, EXIT_REQUEUE, EXIT_STOP_FILE

GRACE_S = 120  # for the other ranks to save after one was stopped; then they are ended
LEAVE_S = 5  # for the other ranks to end after one failed; a rank with the same fault can still report it


def main() -> int:
    job = [] if sys.argv[1:2] == ["evaluate"] else ["train"]
    command = [sys.executable, "-m", "pretrain", *job, *sys.argv[1:]]
    if "SLURM_PROCID" in os.environ and "SLURM_STEP_ID" in os.environ:
        set_rank_from_slurm()
        return task.run(command)
    code = run_ranks(command, local_ranks())
    if code == 0 and job:
        run = settings.load(*job_words(sys.argv[1:])).run
        if run.export != []:
            from pretrain.weights.export import export_run

            export_run(Path(run.dir))
    return code


def set_rank_from_slurm() -> None:
    """Sets torch.distributed's variables from srun's, except for MASTER_ADDR and MASTER_PORT, which launch/job.sh sets."""
    for name, source in {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}.items():
        os.environ[name] = os.environ[source]


def local_ranks() -> int:
    if "RANKS" in os.environ:
        return int(os.environ["RANKS"])
    import torch

    return max(1, torch.cuda.device_count())


def run_ranks(command: list[str], ranks: int) -> int:
    """Runs `command` as every rank of a job on this machine; returns 0, or the first failed rank's exit code."""
    shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // ranks))}
    processes: list[subprocess.Popen] = []

    def forward(number: int, frame: FrameType | None) -> None:
        for process in processes:
            process.send_signal(number)

    with task.hold_usr1():
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, forward)
        for rank in range(ranks):
            environment = threads | os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            processes.append(subprocess.Popen(command, env=environment))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to the ranks itself
    failed = wait_for_failure(processes)
    if failed is None:
        return 0
    code = failed.returncode
    if code not in (EXIT_REQUEUE, EXIT_CONFIG, EXIT_STOP_FILE):
        print(f"rank {processes.index(failed)} {task.describe_end(code)}", file=sys.stderr, flush=True)
    wait_for_ends(processes, GRACE_S if code in (EXIT_REQUEUE, EXIT_STOP_FILE) else LEAVE_S)
    for process in processes:
        process.terminate()
    wait_for_ends(processes, LEAVE_S)
    for process in processes:
        process.kill()
        process.wait()
    return task.to_shell_code(code)


def wait_for_failure(processes: list[subprocess.Popen]) -> subprocess.Popen | None:
    """Returns the first process that fails, or None once all have ended with code 0."""
    while True:
        codes = [process.poll() for process in processes]  # of all: a running process must not hide a failed one
        failed = next((process for process in processes if process.returncode), None)
        if failed is not None or None not in codes:
            return failed
        time.sleep(0.1)


def wait_for_ends(processes: list[subprocess.Popen], seconds: float) -> None:
    """Returns once all processes have ended, or after `seconds`."""
    deadline = time.monotonic() + seconds
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        time.sleep(0.1)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    sys.exit(main())
