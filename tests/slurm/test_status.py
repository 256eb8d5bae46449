"""What Slurm says of a run's job, as `python -m pretrain status` asks it."""

import time
from pathlib import Path

import pytest

from pretrain.run import attempts
from pretrain.run.attempts import Attempt
from pretrain.run.state import read, state_of
from tests.slurm.cluster import Cluster

pytestmark = pytest.mark.slurm


def test_a_job_in_the_queue_running_and_gone(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, cluster.env[name])
    (tmp_path / "job.sh").write_text("#!/bin/bash\nsleep 100\n")
    waiting, running = (
        cluster.sbatch(tmp_path / "job.sh", cwd=tmp_path, options=[f"--begin={begin}", f"--output={tmp_path}/%j.out"])
        for begin in ("now+1hour", "now")
    )
    for name, job in (("waiting", waiting), ("running", running)):
        (tmp_path / name).mkdir()
        attempts.write(tmp_path / name, Attempt(str(job), 0, time.time(), ("n0",), 1, 0))
    cluster.wait(running, "RUNNING", timeout=30)

    def states() -> list[tuple[str, str]]:
        return [state_of(run, time.time()) for run in read([tmp_path / "waiting", tmp_path / "running"])]

    start = cluster.job(waiting)["StartTime"]
    assert states() == [
        ("waiting", f"job {waiting} PENDING (BeginTime), expected to start {start}"),
        ("running", f"job {running} RUNNING"),
    ]

    cluster.run("scancel", str(waiting), str(running))
    cluster.wait(running, "CANCELLED", timeout=30)
    remark = "is no longer in the queue and did not report its end: canceled, or lost with its node"
    assert states() == [("failed", f"job {job} {remark}") for job in (waiting, running)]
    assert state_of(read([tmp_path / "waiting"])[0], time.time())[0] == "failed"  # squeue reports a single unknown id as an error
