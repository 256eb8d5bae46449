"""The contract of a job on Slurm: time limits, preemption, crashes, hangs, lost and drained nodes, poison steps, other sizes.

If the number of ranks stays the same, the last checkpoint is compared bit for bit with that of an undisturbed job.
Slurm's delay before the start of a requeued job is skipped.
"""

import json
import os
import re
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from pretrain.checkpoint.command import compare
from pretrain.run.exit_codes import EXIT_CONFIG, EXIT_STOP_FILE
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import QUICK, Jobs, ranks, resumed_at, send

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

SCRIPT = "van_b3_in22k.sh"
POISON = str(Path(__file__).parent / "poison")


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory, drawn: Path) -> Iterator[Jobs]:
    """A job that ran without interruption; all others must end with the same checkpoint."""
    jobs = Jobs(cluster, tmp_path_factory.mktemp("undisturbed"), drawn)
    job = jobs.submit(SCRIPT, *QUICK)
    output = jobs.complete(job)
    assert "complete after 40 steps" in output
    assert [(attempt.restart, attempt.end.outcome) for attempt in jobs.attempts(job) if attempt.end] == [(0, "complete")]
    yield jobs
    jobs.end()


def losses(jobs: Jobs) -> dict[int, float]:
    """Returns the losses by step; the last one of a step that was computed again."""
    records = map(json.loads, (jobs.run / "metrics.jsonl").read_text().splitlines())
    return {record["step"]: record["loss"] for record in records if record["kind"] == "train"}


def outcomes(jobs: Jobs, job: int) -> list[str]:
    return [attempt.end.outcome if attempt.end else "not recorded" for attempt in jobs.attempts(job)]


def test_time_limit_and_preemption_lose_no_step(jobs: Jobs, cluster: Cluster, tmp_path: Path, undisturbed: Jobs) -> None:
    """USR1 before the time limit, by --signal: Slurm checks every half minute and sends it half a minute early, here 15 to 45 seconds
    after the job's start. Then TERM by preemption, and more signals during the save."""
    settings = (*QUICK, "run.save_every=1000")
    job = jobs.submit(SCRIPT, *settings, options=["--time=4", "--signal=USR1@195"], PYTHONPATH=POISON, POISON="slow twice")
    jobs.wait_for_attempt(job, 0)
    cluster.wait(job, "PENDING", timeout=30)
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=20")
    cluster.skip_requeue_wait(job)

    jobs.wait_for(job, lambda: len(resumed_at(cluster.output(job))) == 1)
    jobs.wait_for_step(job, resumed_at(cluster.output(job))[0] + 1)
    urgent = tmp_path / "urgent.sh"
    urgent.write_text("#!/bin/bash\nsleep 1\n")
    preempting = cluster.sbatch(urgent, cwd=tmp_path, options=["--partition=urgent", "--nodes=3", f"--cpus-per-task={cluster.cpus}"])
    jobs.wait_for(job, lambda: cluster.job(job)["PreemptTime"] != "None")

    def has_ended() -> bool:
        with suppress(RuntimeError):  # no task is left to be signalled
            cluster.signal(job, "USR1")
            cluster.signal(job, "TERM")
        return outcomes(jobs, job)[1] != "not recorded"

    jobs.wait_for(job, has_ended)
    cluster.wait(preempting, "COMPLETED", timeout=600)
    cluster.skip_requeue_wait(job)

    output = jobs.complete(job)
    stopped = [int(step) for step in re.findall(r"stopped at step (\d+) of 40 and saved", output)]
    assert resumed_at(output) == stopped
    assert len(stopped) == 2
    assert outcomes(jobs, job) == ["stopped", "stopped", "complete"]
    assert cluster.job(job)["Restarts"] == "2"
    assert compare(jobs.newest(), undisturbed.newest()) == 0


@pytest.mark.long
def test_a_killed_rank_a_hung_rank_and_a_drained_node(jobs: Jobs, cluster: Cluster, undisturbed: Jobs) -> None:
    job = jobs.submit(SCRIPT, *QUICK, "guard.step_limit=3", "guard.start_limit=100")
    used: list[tuple[str, ...]] = []

    def next_attempt() -> int:
        """Waits for the next attempt; returns the step it resumes from."""
        before = len(resumed_at(cluster.output(job)))
        cluster.skip_requeue_wait(job)
        jobs.wait_for(job, lambda: len(resumed_at(cluster.output(job))) > before)
        used.append(jobs.attempts(job)[-1].nodes)
        return resumed_at(cluster.output(job))[-1]

    jobs.wait_for_step(job, 6)
    assert send(cluster, 1, signal.SIGKILL) == "n1"
    began = time.monotonic()
    end = jobs.wait_for_attempt(job, 0).end
    assert time.monotonic() - began < 20  # without waiting for a timeout
    assert end is not None
    assert (end.outcome, end.rank, end.host, end.again, end.excluded) == ("crashed", 1, "n1", True, ())
    assert "rank 1 on n1 was killed by SIGKILL" in cluster.output(job)
    first = next_attempt()
    assert first == end.saved >= 5

    jobs.wait_for_step(job, first + 6)
    assert send(cluster, 0, signal.SIGSTOP) == "n0"
    end = jobs.wait_for_attempt(job, 1).end
    assert end is not None
    assert (end.outcome, end.rank, end.host, end.again) == ("hung", 0, "n0", True)
    output = cluster.output(job)
    assert "HANG: rank 0 on n0 gives no answer" in output
    assert re.search(r"rank 1 on n1 has not finished a step for 3 s; it is in step \d+", output)
    assert re.search(r'File ".*pretrain/train.py", line \d+ in train', output)  # the stacks
    assert not ranks(cluster)  # the stopped one is gone too

    cluster.wait(job, "PENDING", timeout=30)
    cluster.run("scontrol", "update", "NodeName=n1", "State=DRAIN", "Reason=test")
    second = next_attempt()
    assert used[-1] == ("n0", "n2")
    assert second >= first + 5

    cluster.run("scontrol", "update", "NodeName=n1", "State=RESUME")
    jobs.complete(job)
    assert outcomes(jobs, job) == ["crashed", "hung", "complete"]
    assert compare(jobs.newest(), undisturbed.newest()) == 0


@pytest.mark.full
def test_a_lost_node(jobs: Jobs, cluster: Cluster, undisturbed: Jobs) -> None:
    """The first node, with the batch script and rank 0, which stays alive, stopped, and holds the lock of the run directory."""
    job = jobs.submit(SCRIPT, *QUICK)
    jobs.wait_for_step(job, 6)
    left = ranks(cluster)
    assert send(cluster, 0, signal.SIGSTOP) == "n0"
    cluster.lose("n0")
    try:
        jobs.wait_for(job, lambda: cluster.job(job)["Restarts"] == "1")  # by Slurm, as the node is down
        cluster.skip_requeue_wait(job)
        output = jobs.complete(job)
    finally:
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        cluster.restore("n0")
    cluster.wait_until_idle()
    assert [attempt.nodes for attempt in jobs.attempts(job)] == [("n0", "n1"), ("n1", "n2")]
    assert resumed_at(output) == [5]
    assert "an earlier start of this job: taking over" in output
    assert cluster.job(job)["Restarts"] == "1"
    assert compare(jobs.newest(), undisturbed.newest()) == 0


@pytest.mark.long
def test_a_node_that_does_not_respond_is_excluded(jobs: Jobs, cluster: Cluster) -> None:
    """Preflight is stopped on this node, so that srun has to end it."""
    job = jobs.submit(SCRIPT, *QUICK, "steps=2", PYTHONPATH=POISON, POISON="stopped on n1")
    end = jobs.wait_for_attempt(job, 0).end
    assert end is not None
    assert (end.outcome, end.excluded, end.again) == ("unfit", ("n1",), True)
    assert "preflight of the nodes: unfit: n1" in cluster.output(job)
    cluster.skip_requeue_wait(job)
    output = jobs.complete(job)
    assert "excluding n1 from now on" in output
    assert [attempt.nodes for attempt in jobs.attempts(job)] == [("n0", "n1"), ("n0", "n2")]
    assert cluster.job(job)["ExcNodeList"] == "n1"


@pytest.mark.long
def test_a_poison_step_stops_the_job_with_a_summary(jobs: Jobs, cluster: Cluster, tmp_path: Path, undisturbed: Jobs) -> None:
    job = jobs.submit(SCRIPT, *QUICK, PYTHONPATH=POISON, POISON="rank 1, step 7")
    end = jobs.wait_for_attempt(job, 0).end
    assert end is not None
    assert (end.outcome, end.step, end.rank, end.again) == ("crashed", 7, 1, True)
    cluster.skip_requeue_wait(job)
    assert cluster.wait(job, timeout=600) == "FAILED"
    assert [attempt.end.again for attempt in jobs.attempts(job) if attempt.end] == [True, False]
    summary = (jobs.run / "FAILED.md").read_text()
    assert "step 7 has failed twice in a row: rank 1 on n1 was killed by SIGSEGV in step 7 (data)" in summary

    output = jobs.complete(jobs.submit(SCRIPT, *QUICK))  # with the cause fixed
    assert resumed_at(output) == [5]
    assert not (jobs.run / "FAILED.md").exists()
    assert compare(jobs.newest(), undisturbed.newest()) == 0


@pytest.mark.full
def test_other_sizes_resume_with_the_same_samples(cluster: Cluster, tmp_path: Path, drawn: Path, undisturbed: Jobs) -> None:
    """Two nodes, ended by RUN/STOP; one node, cancelled; then all three."""
    batches = ("global_batch=12", "engine.micro_batch=2")
    jobs, whole = Jobs(cluster, tmp_path / "jobs", drawn, batches), Jobs(cluster, tmp_path / "whole", drawn, batches)
    # The losses must depend on the samples only: drop path is drawn by rank, and rounding differences grow from step to step.
    settings = (*QUICK, "steps=20", "engine.precision=fp32", "model.drop_path=0", "optim.lr=1e-6")
    try:
        reference = whole.submit(SCRIPT, *settings)
        whole.complete(reference)

        two = jobs.submit(SCRIPT, *settings)
        jobs.wait_for_step(two, 2)
        (jobs.run / "STOP").touch()
        assert cluster.wait(two, timeout=600) == "FAILED"
        assert cluster.job(two)["ExitCode"] == f"{EXIT_STOP_FILE}:0"
        assert outcomes(jobs, two) == ["ended"]
        assert not (jobs.run / "STOP").exists()
        stopped = int(re.findall(r"stopped at step (\d+) of 20", cluster.output(two))[0])

        one = jobs.submit(SCRIPT, *settings, nodes="1")
        jobs.wait_for_step(one, stopped + 3)
        cluster.run("scancel", str(one))
        assert cluster.wait(one, timeout=600) == "CANCELLED"
        assert "1 cpu ranks; global batch 12 = 1 x 2 x 6" in cluster.output(one)

        cluster.wait_until_idle()
        three = jobs.submit(SCRIPT, *settings, nodes="2-3")
        output = jobs.complete(three)
        assert "3 cpu ranks; global batch 12 = 3 x 2 x 2" in output
        assert resumed_at(output)[0] >= stopped + 3 - 5  # TERM may have saved later than the last interval
        assert cluster.job(three)["Restarts"] == cluster.job(one)["Restarts"] == "0"
        resumed, expected = losses(jobs), losses(whole)
        assert resumed == pytest.approx(expected, rel=1e-4)
        shifted = {step: expected.get(step + 1, 0.0) for step in expected}
        assert not any(resumed[step] == pytest.approx(shifted[step], rel=1e-4) for step in resumed)  # other samples would change the losses
        assert compare(jobs.newest(), whole.newest()) != 0  # the order of sums differs, so the comparison can fail
    finally:
        jobs.end()
        whole.end()


def test_a_job_with_wrong_settings_is_never_requeued(jobs: Jobs, cluster: Cluster) -> None:
    job = jobs.submit(SCRIPT, *QUICK, nodes="3")  # a global batch of 4
    assert cluster.wait(job, timeout=600) == "FAILED"
    assert cluster.job(job)["ExitCode"] == f"{EXIT_CONFIG}:0"
    assert cluster.job(job)["Restarts"] == "0"
    output = cluster.output(job)
    assert output.count("global_batch = 4 can't be divided over 3 ranks of engine.micro_batch = 2") == 1
    assert "with engine.micro_batch=2, 2 ranks" in output
    assert outcomes(jobs, job) == ["settings"]
    assert not (jobs.run / "FAILED.md").exists()
    assert os.listdir(jobs.run / "logs") == [f"{job}-0.log"]
