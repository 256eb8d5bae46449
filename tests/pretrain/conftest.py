"""What tests of this package share."""

from pathlib import Path

import pytest

from tests.support.ranks import run_on_ranks
from tests.support.tiny_runs import worker


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """RUNS/averaged and RUNS/plain, run directories, and RUNS/….pt; not to be changed."""
    folder = tmp_path_factory.mktemp("runs")
    run_on_ranks(1, worker, folder=str(folder))
    return folder
