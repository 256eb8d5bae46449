"""Submits the scripts of launch/ to the private cluster, with options and settings that make the jobs small.

A job runs as it does for users: script, preflight, launcher, data loading, DeepSpeed, checkpoints.
"""

import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from pretrain.run import attempts
from pretrain.run.attempts import Attempt
from pretrain.run.directory import list_checkpoints
from tests.slurm.cluster import Cluster, processes
from tests.support import REPOSITORY
from tests.support.waiting import wait_until

# gloo would look for its interface by the machine's name, which may not resolve. All nodes share the cores of this machine.
ENVIRONMENT = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
SMALL = (
    "engine.device=cpu", "model.classes=10", "data.image_size=32", "data.val=null", "data.decode_threads=1", "data.read_threads=1",
    "run.log_every=1",
)  # fmt: skip
# For tests of the ends of a job: a step takes tenths of a second.
QUICK = ("model.name=van_b0", "steps=40", "run.save_every=5", "run.export=[]")
PATIENCE = 600  # seconds; a job takes 20 to 60 on two idle cores


class Jobs:
    """Submits jobs that share the run directory `run`."""

    def __init__(self, cluster: Cluster, folder: Path, drawn: Path, batches: Sequence[str] = ("global_batch=4", "engine.micro_batch=2")):
        self.cluster, self.folder = cluster, folder
        folder.mkdir(exist_ok=True)
        self.run = folder / "run"
        self.settings = (*SMALL, *batches, f"data.train={drawn / 'train'}", f"run.dir={self.run}")
        self.submitted: list[int] = []

    def submit(
        self, script: str, *settings: str, nodes: str = "2", cwd: Path = REPOSITORY, options: Sequence[str] = (), **environment: str
    ) -> int:
        sizes = [
            f"--nodes={nodes}",
            "--gpus-per-node=0",
            "--time=20",
            f"--output={self.folder}/%j.out",
        ]
        job = self.cluster.sbatch(
            REPOSITORY / "launch" / script, *self.settings, *settings, cwd=cwd, options=[*sizes, *options], env=ENVIRONMENT | environment
        )
        self.submitted.append(job)
        return job

    def wait_for(self, job: int, reached: Callable[[], bool]) -> None:
        def check() -> bool:
            state = self.cluster.job(job)["JobState"]
            is_reached = reached()
            assert is_reached or state in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"), f"{state}\n{self.cluster.output(job)}"
            return is_reached

        wait_until(check, PATIENCE, lambda: self.cluster.output(job))

    def wait_for_step(self, job: int, step: int) -> None:
        """Waits until the job has logged this step or a later one."""
        self.wait_for(job, lambda: bool(steps := re.findall(r" step (\d+)/", self.cluster.output(job))) and int(steps[-1]) >= step)

    def wait_for_attempt(self, job: int, number: int) -> Attempt:
        """Waits for the end of the job's attempt of this number, counted from 0; returns it."""

        def ended() -> list[Attempt]:
            return [attempt for attempt in self.attempts(job) if attempt.restart == number and attempt.end]

        wait_until(ended, PATIENCE, lambda: self.cluster.output(job))
        return ended()[0]

    def attempts(self, job: int) -> list[Attempt]:
        return [attempt for attempt in attempts.read(self.run) if attempt.job == str(job)]

    def complete(self, job: int) -> str:
        """Waits until the job is completed; returns its output."""
        self.cluster.wait(job, "COMPLETED", timeout=PATIENCE)
        return self.cluster.output(job)

    def newest(self) -> Path:
        return list_checkpoints(self.run / "checkpoints")[-1]

    def end(self) -> None:
        """Cancels the jobs and removes their run: a checkpoint of VAN-B6 has 2.4 GB."""
        for job in self.submitted:
            self.cluster.run("scancel", str(job))
        wait_until(lambda: not self.cluster.run("squeue", "--noheader"))
        shutil.rmtree(self.run, ignore_errors=True)


def ranks(cluster: Cluster) -> dict[int, tuple[str, str, str]]:
    """Returns (node, rank, ranks) of the running training processes by process id."""
    running = {}
    for pid in processes(cluster.config):
        folder = Path("/proc", str(pid))
        try:
            words = (folder / "cmdline").read_text().split("\0")
            values = dict(entry.split("=", 1) for entry in (folder / "environ").read_text().split("\0") if "=" in entry)
        except OSError:  # it ended meanwhile
            continue
        if words[1:4] == ["-m", "pretrain", "train"] and values.get("RANK"):
            running[pid] = (values["SLURMD_NODENAME"], values["RANK"], values["WORLD_SIZE"])
    return running


def send(cluster: Cluster, rank: int, number: int) -> str:
    """Sends a signal to the process of one rank; returns its node."""
    pid, node = next((pid, node) for pid, (node, other, _) in ranks(cluster).items() if int(other) == rank)
    os.kill(pid, number)
    return node


def resumed_at(output: str) -> list[int]:
    return [int(step) for step in re.findall(r"resumed at step (\d+) of", output)]
