"""What tests of several packages share."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from data.dataset.index import Index
from data.synthetic.synthesize import synthesize
from tests.support.datasets import make_dataset


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train (120 drawn images of ten classes) and val (20); not to be changed."""
    folder = tmp_path_factory.mktemp("drawn")
    synthesize(folder, classes=10, train=120, val=20)
    return folder


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Index:
    """150 images in several shards; not to be changed."""
    index = make_dataset(tmp_path_factory.mktemp("data") / "train", 150)
    assert len(index.shards) >= 5
    return index


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Processes that a test starts heed Ctrl-C, also where the tests run in the background of a shell and so ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, as files are run side by side."""
    items.sort(key=lambda item: "slurm" not in item.path.parts)
