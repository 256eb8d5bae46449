"""Fixtures: the private Slurm cluster, shared by all tests of this folder, and the jobs of a test."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import PATH, Cluster, private_cluster
from tests.slurm.jobs import Jobs


@pytest.fixture(scope="session")
def slurm_programs() -> None:
    """Skips without Slurm; fails in CI, where these tests must run."""
    if missing := [name for name in ("slurmctld", "slurmd", "sbatch", "srun") if shutil.which(name, path=PATH) is None]:
        reason = f"not installed: {', '.join(missing)}; `make slurm` installs the distribution's package slurm-wlm"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)


@pytest.fixture(scope="session")
def cluster(slurm_programs: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with private_cluster(tmp_path_factory.mktemp("slurm"), nodes=3) as running:
        yield running


@pytest.fixture
def jobs(cluster: Cluster, tmp_path: Path, drawn: Path) -> Iterator[Jobs]:
    mine = Jobs(cluster, tmp_path, drawn)
    yield mine
    mine.end()
