"""Ten epochs take no more memory than three; at another size: python -m benchmarks.loader.memory"""

from pathlib import Path

import pytest

from benchmarks.loader.memory import epochs
from data.dataset.index import open_index
from data.loader.pipeline import Batch

IMAGE_SIZE, MICRO_BATCH = 224, 40
BATCH_BYTES = MICRO_BATCH * 3 * IMAGE_SIZE**2 * 4


@pytest.mark.slow
@pytest.mark.parametrize("leak", [False, True])
def test_memory_does_not_grow(drawn: Path, leak: bool) -> None:
    """By less than half a batch an epoch; whoever keeps one batch of each is found out, which is the control."""
    kept: dict[int, Batch] = {}

    def keep(batch: Batch) -> None:
        if leak:
            kept[batch.epoch] = batch

    train, val = open_index(drawn / "train"), open_index(drawn / "val")
    sizes = list(epochs(train, val, image_size=IMAGE_SIZE, micro_batch=MICRO_BATCH, use=keep))
    growth = (sizes[-1] - sizes[2]) / (len(sizes) - 3)
    assert (growth > BATCH_BYTES / 2) == leak, [round(size / 1e6) for size in sizes]
