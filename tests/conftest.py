"""Fixtures of several packages."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from data.dataset.index import Index
from data.synthetic.synthesize import synthesize
from tests.support.datasets import make_dataset
from tests.support.ranks import run_on_ranks
from tests.support.tiny_runs import make_runs


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with train (120 drawn images of ten classes) and val (20), which tests must not change."""
    folder = tmp_path_factory.mktemp("drawn")
    synthesize(folder, classes=10, train=120, val=20)
    return folder


@pytest.fixture(scope="session")
def four_classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with train (32 drawn images of four classes) and val (8); tests must not change it."""
    folder = tmp_path_factory.mktemp("four_classes")
    synthesize(folder, classes=4, train=32, val=8)
    return folder


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Index:
    """Returns a dataset of 150 images in several shards, which tests must not change."""
    index = make_dataset(tmp_path_factory.mktemp("data") / "train", 150)
    assert len(index.shards) >= 5
    return index


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two run directories and their weights (tests/support/tiny_runs.py); not to be changed."""
    folder = tmp_path_factory.mktemp("runs")
    run_on_ranks(1, make_runs, folder=str(folder))
    return folder


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Lets the processes of a test handle Ctrl-C, which a shell ignores for tests in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the longest files first, as files run in parallel."""
    items.sort(key=lambda item: "slurm" not in item.path.parts)
