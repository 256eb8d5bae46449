"""Preflight by hand in a Slurm allocation."""

from pathlib import Path

import pytest

from tests.slurm.jobs import QUICK, Jobs

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


def test_two_nodes_are_fit(jobs: Jobs, tmp_path: Path) -> None:
    script = tmp_path / "preflight.sh"
    script.write_text('#!/usr/bin/env bash\ncd "$SLURM_SUBMIT_DIR" && exec bash launch/job.sh preflight configs/van_b3_in22k.yaml "$@"\n')
    output = jobs.complete(jobs.submit(str(script), *QUICK))
    lines = [line for line in output.splitlines() if not line.startswith("srun: ")]  # which knows no CPU binding here
    assert lines[0] == "preflight: 2 of 2 nodes inspected, for 1 ranks on each"
    assert [line.split()[0] for line in lines[3:5]] == ["n0", "n1"]
    assert lines[5] == "preflight of the nodes: fit"
    assert [line.split()[0] for line in lines[7:9]] == ["n0", "n1"]
    assert lines[-1] == "preflight of the network: fit"
