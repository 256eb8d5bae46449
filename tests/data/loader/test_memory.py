"""Ten epochs of the full recipe, with an evaluation after each, take no more memory than three."""

import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from data.common.placement import Placement
from data.dataset.index import open_index
from data.loader.loaders import EvalLoader, TrainLoader
from data.loader.order import SampleOrder
from data.loader.pipeline import Batch
from data.settings import DataConfig

IMAGE_SIZE, MICRO_BATCH, EPOCHS = 224, 40, 10
BATCH_BYTES = MICRO_BATCH * 3 * IMAGE_SIZE**2 * 4


def resident_bytes_after_epochs(drawn: Path, kept: list[Batch] | None) -> Iterator[int]:
    """Yields the resident memory after each epoch; `kept` receives one batch of each, all others are dropped at once."""
    train, val = open_index(drawn / "train"), open_index(drawn / "val")
    order = SampleOrder(train.shard_start, seed=0, global_batch=MICRO_BATCH)
    settings = DataConfig(image_size=IMAGE_SIZE, auto_augment="rand-m9-mstd0.5-inc1", random_erasing=0.25)
    settings.decode_threads, settings.read_threads = 1, 2
    placement, end = Placement(torch.device("cpu"), MICRO_BATCH), EPOCHS * order.steps_per_epoch
    with TrainLoader(train, order, settings, placement, end=end) as loader, EvalLoader(val, settings, placement) as evaluation:
        for number, batch in enumerate(loader, 1):
            if number % order.steps_per_epoch == 0:
                if kept is not None:
                    kept.append(batch)
                del batch
                for _ in evaluation:
                    pass
                yield int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.slow
@pytest.mark.parametrize("leak", [False, True])
def test_memory_does_not_grow_with_epochs(drawn: Path, leak: bool) -> None:
    """Growth after the third epoch is less than half a batch per epoch; the control keeps one batch of each epoch.

    Buffers of the loaders, DALI and its decoders, which never shrink, are full by then.
    """
    sizes = list(resident_bytes_after_epochs(drawn, [] if leak else None))
    growth = (sizes[-1] - sizes[2]) / (len(sizes) - 3)
    assert (growth > BATCH_BYTES / 2) == leak, [round(size / 1e6) for size in sizes]
