"""Boxes of random erasing are distributed as in timm, and filled with normal noise."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chi2_contingency, ks_2samp, kstest
from timm.data.random_erasing import RandomErasing

from data.augment.erasing import NoiseBank
from data.augment.recipe import ErasedBoxes
from data.augment.sampling import draw_erased_boxes, draw_noise_starts

DRAWS, SIZE = 100_000, 64
UNLIKELY = 1e-5


def timms_boxes(probability: float, count: int, images: int) -> list[list[tuple[int, ...]]]:
    """Records the boxes, y, x, height, width, that timm erases in each image."""

    class Recorder:
        """Replaces an image tensor and records the slices that are assigned to."""

        def __init__(self) -> None:
            self.boxes: list[tuple[int, ...]] = []

        def __setitem__(self, where: tuple[slice, slice, slice], _: torch.Tensor) -> None:
            _, rows, columns = where
            self.boxes.append((rows.start, columns.start, rows.stop - rows.start, columns.stop - columns.start))

    random.seed(0)
    erasing = RandomErasing(probability, mode="const", max_count=count, device="cpu")
    found = []
    for _ in range(images):
        image = Recorder()
        erasing._erase(image, 3, SIZE, SIZE, torch.float32)
        found.append(image.boxes)
    return found


def check_against_timm(mine: np.ndarray, theirs: list[list[tuple[int, ...]]]) -> None:
    numbers = (mine[..., 2] > 0).sum(axis=1), np.array([len(boxes) for boxes in theirs])
    counts = np.array([np.bincount(number, minlength=mine.shape[1] + 1) for number in numbers])
    assert chi2_contingency(counts).pvalue > UNLIKELY, "numbers of boxes"
    flat_mine, flat_theirs = mine[mine[..., 2] > 0], np.array([box for boxes in theirs for box in boxes])
    for name, of in {
        "area": lambda box: box[:, 2] * box[:, 3],
        "ratio": lambda box: box[:, 2] / box[:, 3],
        "top": lambda box: box[:, 0],
        "left": lambda box: box[:, 1],
        "place": lambda box: box[:, 0] / (SIZE - box[:, 2]),
    }.items():
        assert ks_2samp(of(flat_mine), of(flat_theirs)).pvalue > UNLIKELY, name


@pytest.mark.parametrize("count", [1, 3])
def test_boxes_are_distributed_as_in_timm(count: int) -> None:
    mine = draw_erased_boxes(0, 0, np.arange(DRAWS), image_size=SIZE, probability=0.25, count=count)
    check_against_timm(mine, timms_boxes(0.25, count, DRAWS))


@pytest.mark.parametrize(("change", "message"), [({"probability": 0.27}, "numbers"), ({"image_size": SIZE - 6}, "area")], ids=str)
def test_comparison_detects_other_boxes(change: dict[str, Any], message: str) -> None:
    options = {"image_size": SIZE, "probability": 0.25} | change
    with pytest.raises(AssertionError, match=message):
        check_against_timm(draw_erased_boxes(0, 0, np.arange(DRAWS), **options), timms_boxes(0.25, 1, DRAWS))


def test_boxes_become_noise_and_nothing_else_changes() -> None:
    ids = np.arange(40)
    boxes, starts = draw_erased_boxes(0, 0, ids, image_size=SIZE, probability=0.5, count=2), draw_noise_starts(0, 0, ids, 2)
    images = torch.full((40, 3, SIZE, SIZE), 9.0).to(memory_format=torch.channels_last)
    memory = images.data_ptr()
    NoiseBank(SIZE, torch.device("cpu")).erase(images, ErasedBoxes(boxes, starts))
    assert images.data_ptr() == memory
    assert images.is_contiguous(memory_format=torch.channels_last)
    inside = np.zeros((40, SIZE, SIZE), bool)
    for own, pair in zip(inside, boxes.tolist(), strict=True):
        for y, x, height, width in pair:
            own[y : y + height, x : x + width] = True
    assert 0.01 < inside.mean() < 0.5
    assert ((images != 9).all(dim=1).numpy() == inside).all()
    noise = images.permute(0, 2, 3, 1)[torch.from_numpy(inside)]  # (pixels, 3)
    assert kstest(noise.flatten().numpy(), "norm").pvalue > UNLIKELY
    assert abs(np.corrcoef(noise.numpy().T) - np.eye(3)).max() < 0.02  # each channel has its own
    one, other = (
        images[sample].permute(1, 2, 0)[torch.from_numpy(inside[sample])] for sample in np.flatnonzero(inside.any(axis=(1, 2)))[:2]
    )
    shorter = min(len(one), len(other))
    assert not torch.equal(one[:shorter], other[:shorter])
