"""The job scripts as a user submits them: two nodes train the real models, stop, resume, and fail in words.

Options of sbatch and settings make the jobs small; scripts, launcher, data loading, DeepSpeed and checkpoints are those of every job.
"""

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pretrain.checkpoint import steps, verify
from tests.slurm.cluster import Cluster, processes

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

REPOSITORY = Path(__file__).parents[2]
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=0", "--time=20")
# The machine's own name, by which gloo would look for its interface, may not resolve where tests run.
ENVIRONMENT = {"GLOO_SOCKET_IFNAME": "lo"}
SMALL = (
    "engine.device=cpu", "model.classes=10", "data.image_size=32", "data.val=null", "data.decode_threads=1", "data.read_threads=1",
    "global_batch=4", "engine.micro_batch=2", "run.log_every=1",
)  # fmt: skip
# Where a job's ends are tested and not its model, so that a step takes tenths of a second.
QUICK = ("model.name=van_b0", "steps=40")
PATIENCE = 240  # seconds; a job takes 25 to 60 where two cores have nothing else to do


class Jobs:
    """Submits jobs that share the run directory `run`."""

    def __init__(self, cluster: Cluster, folder: Path, drawn: Path):
        self.cluster, self.folder = cluster, folder
        self.run = folder / "run"
        self.settings = (*SMALL, f"data.train={drawn / 'train'}", f"run.dir={self.run}")
        self.submitted: list[int] = []

    def submit(self, script: str, *settings: str, cwd: Path = REPOSITORY) -> int:
        options = [*TWO_NODES, f"--output={self.folder}/%j.out"]
        job = self.cluster.sbatch(REPOSITORY / "launch" / script, *self.settings, *settings, cwd=cwd, options=options, env=ENVIRONMENT)
        self.submitted.append(job)
        return job

    def wait_for(self, job: int, reached: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while True:
            state = self.cluster.job(job)["JobState"]
            if reached():
                return
            assert state in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"), f"{state}\n{self.cluster.output(job)}"
            assert time.monotonic() < deadline, self.cluster.output(job)
            time.sleep(0.1)

    def complete(self, job: int) -> str:
        """Waits for the job's success; returns its output."""
        self.cluster.wait(job, "COMPLETED", timeout=PATIENCE)
        return self.cluster.output(job)

    def end(self) -> None:
        """Cancels what still runs, and makes room: a checkpoint of VAN-B6 has 2.4 GB."""
        for job in self.submitted:
            self.cluster.run("scancel", str(job))
        deadline = time.monotonic() + 30
        while self.cluster.run("squeue", "--noheader") and time.monotonic() < deadline:
            time.sleep(0.1)
        shutil.rmtree(self.run, ignore_errors=True)


@pytest.fixture
def jobs(cluster: Cluster, tmp_path: Path, drawn: Path) -> Iterator[Jobs]:
    mine = Jobs(cluster, tmp_path, drawn)
    yield mine
    mine.end()


def ranks(cluster: Cluster) -> dict[int, tuple[str, str, str]]:
    """(node, rank, ranks) of the training processes that run, by process id."""
    found = {}
    for pid in processes(cluster.config):
        folder = Path("/proc", str(pid))
        try:
            words = (folder / "cmdline").read_text().split("\0")
            values = dict(entry.split("=", 1) for entry in (folder / "environ").read_text().split("\0") if "=" in entry)
        except OSError:  # it ended meanwhile
            continue
        if words[1:4] == ["-m", "pretrain", "train"] and values.get("RANK"):
            found[pid] = (values["SLURMD_NODENAME"], values["RANK"], values["WORLD_SIZE"])
    return found


def available_memory() -> int:
    """In bytes, as the kernel estimates it."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return 1024 * int(fields["MemAvailable"].split()[0])


def resumed_at(output: str) -> list[int]:
    return [int(step) for step in re.findall(r"resumed at step (\d+) of", output)]


def test_two_nodes_pretrain_van_b3(jobs: Jobs, cluster: Cluster, drawn: Path) -> None:
    job = jobs.submit("van_b3_in22k.sh", f"data.val={drawn / 'val'}", "steps=4", "run.save_every=1")
    jobs.wait_for(job, lambda: set(ranks(cluster).values()) == {("n0", "0", "2"), ("n1", "1", "2")})
    output = jobs.complete(job)
    assert "van_b3, 44.26 M parameters, 10 classes" in output
    assert "2 cpu ranks; global batch 4 = 2 x 2 x 1" in output
    assert [int(step) for step in re.findall(r"step (\d+)/4 ", output)] == [1, 2, 3, 4]
    assert re.search(r"evaluation at step 4 .* on 20 images", output)
    assert "complete after 4 steps" in output
    newest = steps(jobs.run / "checkpoints")[-1]
    assert newest.name == "step-000000004"
    assert verify(newest) == []
    assert {path.name for path in newest.glob("*.distcp")} == {"__0_0.distcp", "__1_0.distcp"}  # both ranks have their part in it


LARGER = [
    ("van_b4", "59.78", 5),
    pytest.param("van_b5", "89.21", 6, marks=pytest.mark.full),
    pytest.param("van_b6", "199.07", 12, marks=pytest.mark.full),
]


@pytest.mark.parametrize(("name", "millions", "gigabytes"), LARGER)
def test_larger_models_train(jobs: Jobs, name: str, millions: str, gigabytes: int) -> None:
    if available_memory() < gigabytes * 1e9:
        pytest.skip(f"two ranks of {name} need {gigabytes} GB of free memory")
    output = jobs.complete(jobs.submit(f"{name}_in22k.sh", "steps=1"))
    assert f"{name}, {millions} M parameters" in output
    assert "complete after 1 steps" in output
    assert verify(jobs.run / "checkpoints" / "step-000000001") == []


def test_killed_and_cancelled_jobs_go_on_when_submitted_again(jobs: Jobs, cluster: Cluster) -> None:
    command = ("van_b3_in22k.sh", *QUICK, "run.save_every=2")
    latest = jobs.run / "checkpoints" / "latest"

    killed = jobs.submit(*command)
    jobs.wait_for(killed, latest.exists)
    for pid in ranks(cluster):
        os.kill(pid, signal.SIGKILL)  # scancel would send TERM first, whatever signal it is given
    assert cluster.wait(killed, timeout=30) == "FAILED"
    assert "stopped at step" not in cluster.output(killed)
    saved = int(latest.read_text().removeprefix("step-"))

    cancelled = jobs.submit(*command)
    jobs.wait_for(cancelled, lambda: bool(resumed_at(cluster.output(cancelled))))
    assert resumed_at(cluster.output(cancelled))[0] >= saved  # one more may have been whole but for `latest`
    jobs.wait_for(cancelled, lambda: "images/s" in cluster.output(cancelled))
    cluster.run("scancel", str(cancelled))
    assert cluster.wait(cancelled, timeout=30) == "CANCELLED"  # even if its ranks had the time to save and to say 85

    last = jobs.submit(*command)
    output = jobs.complete(last)
    assert saved <= resumed_at(cluster.output(cancelled))[0] <= resumed_at(output)[0] < 40
    assert "complete after 40 steps" in output
    assert [cluster.job(job)["Restarts"] for job in (killed, cancelled, last)] == ["0", "0", "0"]


def test_job_told_to_stop_requeues_itself_and_resumes(jobs: Jobs, cluster: Cluster) -> None:
    job = jobs.submit("van_b3_in22k.sh", *QUICK, "run.save_every=1000")
    jobs.wait_for(job, lambda: "step 3/40 " in cluster.output(job))
    cluster.signal(job, "USR1")  # as --signal does ahead of the time limit
    jobs.wait_for(job, lambda: "goes back to the queue" in cluster.output(job))
    cluster.skip_requeue_wait(job)
    output = jobs.complete(job)
    stopped = re.findall(r"stopped at step (\d+) of 40 and saved", output)
    assert len(stopped) == 1
    assert resumed_at(output) == [int(stopped[0])]
    # Both ranks left with the code that says so, at whatever moment each.
    assert output.count("Exited with exit code 85") == 2
    assert "complete after 40 steps" in output
    assert cluster.job(job)["Restarts"] == "1"


def with_ranks_that(body: str, folder: Path) -> Path:
    """A copy of the repository's scripts in which a rank is the given lines of bash."""
    shutil.copytree(REPOSITORY / "launch", folder / "launch")
    python = folder / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/usr/bin/env bash\n{body}")
    python.chmod(0o755)
    return folder


def test_requeues_though_ranks_end_seconds_apart(jobs: Jobs, cluster: Cluster, tmp_path: Path) -> None:
    body = "sleep $((2 * SLURM_PROCID)); [[ -n ${SLURM_RESTART_COUNT:-} ]] || exit 85; echo again"
    job = jobs.submit("van_b3_in22k.sh", cwd=with_ranks_that(body, tmp_path / "copy"))
    jobs.wait_for(job, lambda: "goes back to the queue" in cluster.output(job))
    cluster.skip_requeue_wait(job)
    assert jobs.complete(job).count("again\n") == 2


@pytest.mark.parametrize("code", [1, 2])
def test_failure_is_not_requeued_and_keeps_its_code(jobs: Jobs, cluster: Cluster, tmp_path: Path, code: int) -> None:
    job = jobs.submit("van_b3_in22k.sh", cwd=with_ranks_that(f"sleep $((2 * SLURM_PROCID)); exit {code}", tmp_path / "copy"))
    assert cluster.wait(job, timeout=30) == "FAILED"
    assert (cluster.job(job)["ExitCode"], cluster.job(job)["Restarts"]) == (f"{code}:0", "0")


@pytest.mark.full
def test_rank_that_hangs_after_another_failed_does_not_keep_the_job(jobs: Jobs, cluster: Cluster, tmp_path: Path) -> None:
    job = jobs.submit("van_b3_in22k.sh", cwd=with_ranks_that("(( SLURM_PROCID )) || exit 1; sleep 1000", tmp_path / "copy"))
    assert cluster.wait(job, timeout=90) == "FAILED"
    assert cluster.job(job)["Restarts"] == "0"


def test_wrong_setting_ends_the_job_with_one_message(jobs: Jobs, cluster: Cluster) -> None:
    job = jobs.submit("van_b3_in22k.sh", "engine.micro_bach=2")
    assert cluster.wait(job, timeout=60) == "FAILED"
    assert cluster.job(job)["ExitCode"] == "2:0"
    assert cluster.job(job)["Restarts"] == "0"
    output = cluster.output(job)
    assert output.count("engine.micro_bach = 2 (command line): unknown key; did you mean engine.micro_batch?") == 1
    assert "Traceback" not in output


@pytest.mark.parametrize("script", sorted(path.name for path in (REPOSITORY / "launch").glob("[!p]*_in*.sh")))
def test_submission_from_another_folder_says_what_to_do(jobs: Jobs, cluster: Cluster, script: str, tmp_path: Path) -> None:
    job = jobs.submit(script, cwd=tmp_path)
    assert cluster.wait(job, timeout=30) == "FAILED"
    assert cluster.job(job)["ExitCode"] == "2:0"
    assert f"error: submit this from the repository's root: cd REPOSITORY && sbatch launch/{script}" in cluster.output(job)


def test_script_without_slurm_runs_on_this_machine(tmp_path: Path, drawn: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SLURM")}
    settings = (*SMALL, f"data.train={drawn / 'train'}", f"run.dir={tmp_path / 'run'}", "model.name=van_b0", "steps=1")
    done = subprocess.run(
        ["bash", REPOSITORY / "launch" / "van_b3_in22k.sh", *settings],
        cwd=tmp_path, env=environment | ENVIRONMENT | {"RANKS": "2"}, capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "van_b0, 3.85 M parameters" in done.stdout
    assert "2 cpu ranks" in done.stdout
    assert verify(tmp_path / "run" / "checkpoints" / "step-000000001") == []
    shutil.rmtree(tmp_path / "run")
