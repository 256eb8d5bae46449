"""The chain of jobs from pretraining to weights: dependencies, arguments and cancellation."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.support import REPOSITORY

pytestmark = pytest.mark.slurm

CHAIN = REPOSITORY / "launch" / "van_b3_full.sh"
# Fits the private cluster.
OPTIONS = ("--cpus-per-task=1", "--gpus-per-node=0", "--time=20")
PARTS = ["pretrain", "finetune", "evaluate", "export", "finetune", "evaluate", "export"]


@pytest.fixture
def submitted(cluster: Cluster) -> Iterator[list[int]]:
    """Ids of jobs to cancel."""
    jobs: list[int] = []
    yield jobs
    if jobs:
        cluster.run("scancel", *map(str, jobs))


def submit(cluster: Cluster, *words: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", CHAIN, *words], cwd="/", env=cluster.env | environment, capture_output=True, text=True, timeout=60, check=False
    )


def read_chain(output: str) -> dict[int, tuple[str, str, int | None]]:
    """Returns (part, run, id of the job before) of each job by id."""
    rows = re.findall(r"^(\d+) +(\w+) +(\S+?)(?:, after (\d+))?$", output, re.MULTILINE)
    return {int(job): (part, run, int(after) if after else None) for job, part, run, after in rows}


def arguments(cluster: Cluster, job: int) -> list[str]:
    """Returns the arguments of the job's script."""
    return cluster.job(job)["Command"].split()[1:]


def test_each_job_waits_for_the_one_before(cluster: Cluster, submitted: list[int], tmp_path: Path) -> None:
    words = (*OPTIONS, f"--output={tmp_path}/%j.out", "--nodes=1", "pretrain.--begin=now+1hour", "finetune.--nodes=2", "seed=3",
             "pretrain.steps=1", "finetune.steps=2", "evaluate.data.val=other")  # fmt: skip
    done = submit(cluster, *words, NAME="trial")
    assert done.returncode == 0, done.stderr
    jobs = read_chain(done.stdout)
    submitted += jobs
    first, small, _, _, large, *_ = jobs
    tuned = [f"runs/trial_in22k_ft_in1k_{size}" for size in (224, 384)]
    assert [part for part, _, _ in jobs.values()] == PARTS
    assert [run for _, run, _ in jobs.values()] == ["runs/trial_in22k", *[tuned[0]] * 3, *[tuned[1]] * 3]
    before = [None, first, small, small + 1, first, large, large + 1]
    assert [after for _, _, after in jobs.values()] == before
    for job, after in zip(jobs, before, strict=True):
        dependency = cluster.job(job)["Dependency"]
        assert dependency.startswith(f"afterok:{after}(unfulfilled)" if after else "(null)")
    assert [cluster.job(job)["NumNodes"].split("-")[0] for job in (first, small)] == ["1", "2"]

    assert arguments(cluster, first) == ["name=trial_in22k", "seed=3", "steps=1"]
    assert arguments(cluster, large) == [
        "configs/van_b3_in22k_ft_in1k_384.yaml", "name=trial_in22k_ft_in1k_384", "model.init_from=runs/trial_in22k",
        "run.export=[official,timm,mmseg,mmpretrain,hf]", "seed=3", "steps=2",
    ]  # fmt: skip
    assert arguments(cluster, large + 1) == [tuned[1], "data.val=other"]
    assert arguments(cluster, large + 2) == [tuned[1]]
    assert f"status runs/trial_in22k {tuned[0]} {tuned[1]} --follow" in done.stdout

    cluster.run("scancel", str(first))  # cancels the jobs that depend on it
    for job in list(jobs)[1:]:
        assert cluster.wait(job, timeout=60) == "CANCELLED"


def test_a_job_can_submit_the_chain(cluster: Cluster, submitted: list[int], tmp_path: Path) -> None:
    words = (*OPTIONS, f"--output={tmp_path}/%j.out", "--nodes=1", "pretrain.--begin=now+1hour")
    submitter = cluster.sbatch(CHAIN, *words, cwd=REPOSITORY, options=["--cpus-per-task=2", f"--output={tmp_path}/%j.out"])
    cluster.wait(submitter, "COMPLETED", timeout=60)
    jobs = read_chain(cluster.output(submitter))
    submitted += jobs
    assert [part for part, _, _ in jobs.values()] == PARTS
    assert cluster.job(next(iter(jobs)))["CPUs/Task"] == "1"


def test_a_chain_that_fails_to_submit_is_cancelled(cluster: Cluster, tmp_path: Path) -> None:
    words = (*OPTIONS, f"--output={tmp_path}/%j.out", "--nodes=1", "pretrain.--begin=now+1hour", "evaluate.--partition=nowhere")
    done = submit(cluster, *words)
    assert done.returncode == 1
    jobs = list(read_chain(done.stdout))
    assert len(jobs) == 2
    assert f"canceling {jobs[0]} {jobs[1]}" in done.stderr
    assert [cluster.wait(job, timeout=30) for job in jobs] == ["CANCELLED"] * 2


@pytest.mark.full
def test_from_pretraining_to_weights_in_every_format(cluster: Cluster, submitted: list[int], drawn: Path, tmp_path: Path) -> None:
    name = f"chain-{os.getpid()}"
    settings = (
        "model.name=van_b0", "model.classes=10", "engine.device=cpu", "engine.micro_batch=4", "global_batch=4", "steps=2",
        f"data.train={drawn / 'train'}", f"data.val={drawn / 'val'}", "data.image_size=32", "data.decode_threads=1", "data.read_threads=1",
    )  # fmt: skip
    try:
        done = submit(cluster, *OPTIONS, "--nodes=1", f"--output={tmp_path}/%j.out", *settings, NAME=name, GLOO_SOCKET_IFNAME="lo")
        jobs = read_chain(done.stdout)
        submitted += jobs
        for job in jobs:
            cluster.wait(job, "COMPLETED", timeout=600)
        parts = dict(zip(jobs, PARTS, strict=True))
        for job in (job for job, part in parts.items() if part == "finetune"):
            assert f"starting from runs/{name}_in22k: all " in cluster.output(job)
        for job in (job for job, part in parts.items() if part == "evaluate"):
            assert re.search(r"top-1 \d+\.\d+%", cluster.output(job))
        for size in (224, 384):
            tuned = f"{name}_in22k_ft_in1k_{size}"
            written = {path.name for path in (REPOSITORY / "runs" / tuned / "weights").iterdir()}
            assert {f"{tuned}{suffix}" for suffix in (".pth", "_timm", "_mmseg.pth", "_mmpretrain.pth", "_hf")} <= written
    finally:
        for run in (REPOSITORY / "runs").glob(f"{name}_*"):
            shutil.rmtree(run)


@pytest.mark.parametrize(
    ("word", "problem"),
    [
        ("finetune.run.dir=x", "the chain sets this; name its runs"), ("name=x", "the chain sets this; name its runs"),
        ("4", "neither key=value nor --option=value"), ("export.steps=3", "an export has no settings"),
    ],
)  # fmt: skip
def test_invalid_words(word: str, problem: str) -> None:
    done = subprocess.run(["bash", CHAIN, word], env=os.environ | {"PATH": "/bin:/usr/bin"}, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"error: {word}: {problem}" in done.stderr
