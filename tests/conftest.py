"""What tests of several packages share."""

from pathlib import Path

import pytest

from data.packing.synthesize import synthesize


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train (120 drawn images of ten classes) and val (20); not to be changed."""
    folder = tmp_path_factory.mktemp("drawn")
    synthesize(folder, classes=10, train=120, val=20)
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, as files are run side by side."""
    items.sort(key=lambda item: "slurm" not in item.path.parts)
