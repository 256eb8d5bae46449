import os
from collections.abc import Iterator

import pytest

from pretrain import engine as engines


@pytest.fixture(autouse=True, scope="module")
def _left_as_it_was() -> Iterator[None]:
    """A benchmark's process is a job of one rank until it ends; the tests' goes on."""
    before = dict(os.environ)
    yield
    engines.stop()
    os.environ.clear()
    os.environ.update(before)
