"""Fixtures of the tests of `pretrain`."""

from pathlib import Path

import pytest

from tests.support.ranks import run_on_ranks
from tests.support.tiny_runs import make_runs


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with two run directories and their weights (tests/support/tiny_runs.py). Tests must not change it."""
    folder = tmp_path_factory.mktemp("runs")
    run_on_ranks(1, make_runs, folder=str(folder))
    return folder
