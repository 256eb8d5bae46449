"""Preflight of a real Slurm allocation: its steps, and a node that does not respond."""

from pathlib import Path

import pytest

from pretrain.run.exit_codes import EXIT_UNFIT
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import QUICK, Jobs
from tests.slurm.test_contract import POISON
from tests.support import REPOSITORY

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "preflight.sh"
    path.write_text('#!/usr/bin/env bash\ncd "$SLURM_SUBMIT_DIR" && exec bash launch/job.sh preflight configs/van_b3_in22k.yaml "$@"\n')
    return path


def test_two_nodes_are_fit(jobs: Jobs, script: Path) -> None:
    output = jobs.complete(jobs.submit(str(script), *QUICK))
    lines = [line for line in output.splitlines() if not line.startswith("srun: ")]  # which knows no CPU binding here
    assert lines[0] == "preflight: 2 of 2 nodes inspected, for 1 ranks on each"
    assert [line.split()[0] for line in lines[3:5]] == ["n0", "n1"]
    assert lines[5] == "preflight of the nodes: fit"
    assert [line.split()[0] for line in lines[7:9]] == ["n0", "n1"]
    assert lines[-1] == "preflight of the network: fit"


@pytest.mark.long
def test_a_node_that_does_not_respond_is_named(jobs: Jobs, cluster: Cluster, script: Path) -> None:
    """Its process is stopped, so that srun has to end it."""
    job = jobs.submit(str(script), *QUICK, PYTHONPATH=f"{POISON}:{REPOSITORY}", POISON="stopped on n1")
    assert cluster.wait(job, timeout=200) == "FAILED"
    assert cluster.job(job)["ExitCode"] == f"{EXIT_UNFIT}:0"
    assert "error: n1: 1 of its 1 tasks reported nothing" in cluster.output(job)
    assert "preflight of the nodes: unfit: n1" in cluster.output(job)
