"""Batches of the whole recipe equal those of timm's transforms, and do not depend on ranks, threads or restarts."""

import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data.augment.erasing import NoiseBank
from data.augment.operators import Operator
from data.augment.randaugment import Layer, draw_color_jitter, draw_rand_augment
from data.augment.recipe import ErasedBoxes
from data.augment.sampling import draw_bilinear, draw_crops, draw_erased_boxes, draw_flips, draw_noise_starts
from data.common.placement import Placement
from data.dataset.index import Index
from data.loader.loaders import TrainLoader
from data.loader.order import SampleOrder
from data.loader.pipeline import Batch
from data.loader.store import ShardStore
from data.settings import DataConfig, parse_policy
from tests.data.augment.test_operators import difference, in_timm
from tests.data.loader.test_loaders import concatenate

pytestmark = pytest.mark.slow

SIZE, SEED, GLOBAL_BATCH = 224, 3, 16
RAND = "rand-m9-mstd0.5-inc1"
RECIPES: dict[str, dict[str, Any]] = {
    "rand-augment": {"auto_augment": RAND, "random_erasing": 0.25},
    "jitter": {"color_jitter": 0.4, "interpolation": "random", "random_erasing": 0.5, "erasing_count": 2},
    "random": {"auto_augment": RAND, "interpolation": "random", "color_jitter": 0.4},
}


def batches(dataset: Index, recipe: str, *, end: int, micro_batch: int = 4, start: int = 0, rank: int = 0, ranks: int = 1, **options: Any):
    settings = DataConfig(**({"image_size": SIZE, "decode_threads": 1} | RECIPES[recipe] | options))
    order = SampleOrder(dataset.shard_start, seed=SEED, global_batch=GLOBAL_BATCH, lanes=8, window=8)
    placement = Placement(torch.device("cpu"), micro_batch, rank, ranks)
    with TrainLoader(dataset, order, settings, placement, start=start, end=end) as loader:
        yield from loader


def in_pillow(dataset: Index, batch: Batch, place: int, settings: DataConfig) -> np.ndarray:
    """Augments a sample with Pillow by the drawn parameters, before normalization and erasing."""
    own, epoch = batch.ids[place : place + 1], batch.epoch
    with ShardStore(dataset) as store:
        image = Image.open(io.BytesIO(store.read(int(own[0])).tobytes())).convert("RGB")
    ((y, x, h, w),) = draw_crops(SEED, epoch, own, np.array([image.width]), np.array([image.height])).tolist()

    def linear(use: int) -> bool:
        return bool(draw_bilinear(SEED, epoch, own, settings.interpolation, use)[0])

    kernel = Image.Resampling.BILINEAR if linear(0) else Image.Resampling.BICUBIC
    image = image.crop((x, y, x + w, y + h)).resize((SIZE, SIZE), kernel)
    if draw_flips(SEED, epoch, own)[0]:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    layers: list[Layer] = []
    if settings.auto_augment:
        layers = draw_rand_augment(SEED, epoch, own, parse_policy(settings.auto_augment))
    elif settings.color_jitter:
        layers = draw_color_jitter(SEED, epoch, own, settings.color_jitter)
    pixels = np.array(image)
    for number, layer in enumerate(layers, 1):
        operator, argument = int(layer.operator[0]), float(layer.argument[0])
        if operator != Operator.NONE:
            pixels = in_timm(Image.fromarray(pixels), operator, argument, mirrored=False, linear=linear(number))
    return pixels


@pytest.mark.parametrize("recipe", RECIPES)
def test_batch_equals_that_of_timm(dataset: Index, recipe: str) -> None:
    settings = DataConfig(image_size=SIZE, **RECIPES[recipe])
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (settings.mean, settings.std))
    (batch,) = batches(dataset, recipe, end=1, micro_batch=GLOBAL_BATCH)
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    probability, count = settings.random_erasing, settings.erasing_count
    boxes = draw_erased_boxes(SEED, 0, batch.ids, image_size=SIZE, probability=probability, count=count)
    differences = []
    for place in range(GLOBAL_BATCH):
        untouched = np.ones((SIZE, SIZE), bool)
        for y, x, h, w in boxes[place].tolist():
            untouched[y : y + h, x : x + w] = False
        found = ((batch.images[place] * std + mean) * 255).round().clip(0, 255).byte().permute(1, 2, 0).numpy()
        differences.append(difference(found[untouched], in_pillow(dataset, batch, place, settings)[untouched]))
    assert np.median(differences) <= 1
    assert np.max(differences) <= 8  # equalize and posterize make large differences of small ones

    if probability:
        expected = batch.images.clone()
        NoiseBank(SIZE, torch.device("cpu")).erase(expected, ErasedBoxes(boxes, draw_noise_starts(SEED, 0, batch.ids, count)))
        assert (boxes[..., 2] > 0).any()
        assert torch.equal(batch.images, expected)  # the noise is there already


@pytest.mark.parametrize(
    "options",
    [
        {"micro_batch": 2, "decode_threads": 2, "read_threads": 1},
        {"start": 5, "ranks": 2, "micro_batch": 8},
        {"ranks": 8, "micro_batch": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("recipe", ["rand-augment", "jitter"])
def test_batches_do_not_depend_on_ranks_threads_or_start(dataset: Index, recipe: str, options: dict[str, int]) -> None:
    """Bit for bit, over the end of an epoch."""
    end = len(dataset) // GLOBAL_BATCH + 2
    whole = list(batches(dataset, recipe, end=end, image_size=64, micro_batch=GLOBAL_BATCH))
    ranks, start = options.get("ranks", 1), options.get("start", 0)
    parts = [list(batches(dataset, recipe, end=end, image_size=64, rank=rank, **options)) for rank in range(ranks)]
    for step in range(start, end):
        own = [batch for rank in range(ranks) for batch in parts[rank] if batch.step == step]
        for one, other in zip(concatenate([whole[step]]), concatenate(own), strict=True):
            assert torch.equal(one, other)
    assert not torch.equal(whole[0].images, whole[1].images)


def test_copies_of_a_sample_are_augmented_differently(dataset: Index) -> None:
    """The first copy equals a sample that is not repeated, and all copies are the same on any number of ranks."""
    order = SampleOrder(dataset.shard_start, seed=SEED, global_batch=GLOBAL_BATCH, lanes=8, window=8, repeats=2)
    plain = SampleOrder(dataset.shard_start, seed=SEED, global_batch=GLOBAL_BATCH // 2, lanes=8, window=8)
    settings = DataConfig(image_size=64, decode_threads=1, **RECIPES["rand-augment"])
    device = torch.device("cpu")

    def step(order: SampleOrder, ranks: int) -> list[Batch]:
        found = []
        for rank in range(ranks):
            share = order.global_batch // ranks
            with TrainLoader(dataset, order, settings, Placement(device, share, rank, ranks), start=3, end=4) as loader:
                found += list(loader)
        return found

    (single,), copies = step(plain, 1), step(order, 4)
    ids, images = np.concatenate([batch.ids for batch in copies]), torch.cat([batch.images for batch in copies])
    half = GLOBAL_BATCH // 2
    assert (ids == np.tile(single.ids, 2)).all()
    assert torch.equal(images[:half], single.images)
    assert all(not torch.equal(one, other) for one, other in zip(images[:half], images[half:], strict=True))
    assert torch.equal(images, step(order, 1)[0].images)
    lam = np.concatenate([batch.mix.lam for batch in copies if batch.mix is not None])
    assert (lam[: half // 2] != lam[half // 2 :]).all()
