"""What is told of a sample is what is done to it."""

import io
import re

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from data.augment.randaugment import Operator
from data.augment.recipe import Recipe
from data.common.placement import Placement
from data.dataset.index import Index
from data.inspect.parameters import list_parameters
from data.loader.loaders import TrainLoader
from data.loader.order import SampleOrder
from data.loader.pipeline import Batch
from data.loader.store import ShardStore
from data.settings import DataConfig
from tests.data.augment.test_operators import in_timm

SEED, SIZE = 5, 64


def batches(index: Index, settings: DataConfig) -> list[Batch]:
    """The second epoch's first three global batches of 10."""
    order = SampleOrder(index.shard_start, seed=SEED, global_batch=10, lanes=5, window=8)
    start = order.steps_per_epoch
    placement = Placement(torch.device("cpu"), micro_batch=10)
    with TrainLoader(index, order, settings, placement, start=start, end=start + 3) as loader:
        return list(loader)


def told_of(batch: Batch, index: Index, settings: DataConfig) -> list[dict[str, str]]:
    return list_parameters(Recipe(SEED, settings), batch.epoch, batch.ids, np.zeros_like(batch.ids), index)


def redone(index: Index, sample_id: int, drawn: dict[str, str]) -> np.ndarray:
    """The picture, as told, by Pillow; float32 (SIZE, SIZE, 3)."""
    y, x, h, w = map(int, re.fullmatch(r"y (\d+) x (\d+) h (\d+) w (\d+)", drawn["crop"]).groups())  # type: ignore[union-attr]
    with ShardStore(index) as store, Image.open(io.BytesIO(store.read(sample_id).tobytes())) as image:
        picture = image.convert("RGB").crop((x, y, x + w, y + h)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    pixels = np.asarray(ImageOps.mirror(picture) if drawn["flip"] == "yes" else picture)
    for operator in drawn.get("operators", "no").split(", "):
        if operator != "no":
            name, _, argument = operator.partition(" ")
            pixels = in_timm(Image.fromarray(pixels), Operator[name.upper()], float(argument or 0), mirrored=False, linear=False)
    return pixels.astype(np.float32)


def test_crop_and_flip_are_those_of_the_batch(dataset: Index) -> None:
    settings = DataConfig(image_size=SIZE, mixup=0, cutmix=0, mean=(0, 0, 0), std=(1, 1, 1), flip=0.3, crop_area=(0.2, 0.9))
    flips = []
    for batch in batches(dataset, settings):
        told = told_of(batch, dataset, settings)
        pictures = 255 * batch.images.permute(0, 2, 3, 1).numpy()
        differences = np.array(
            [
                [
                    np.abs(redone(dataset, sample_id, drawn) - picture).mean()
                    for drawn in (own, own | {"flip": ["no", "yes"][own["flip"] == "no"]})
                ]
                for sample_id, own, picture in zip(batch.ids.tolist(), told, pictures, strict=True)
            ]
        )
        assert differences[:, 0].max() < 3  # of 255; Pillow and DALI are not the same to the bit
        assert np.median(differences[:, 1]) > 10  # control: flipped the other way
        flips += [own["flip"] for own in told]
        assert all(own.keys() == {"crop", "flip"} for own in told)
    assert 0 < flips.count("yes") < len(flips) / 2


def test_operators_and_what_is_erased_are_those_of_the_batch(dataset: Index) -> None:
    settings = DataConfig(image_size=SIZE, mixup=0, cutmix=0, auto_augment="rand-m9-mstd0.5-inc1", random_erasing=0.5, erasing_count=2)
    mean, std = np.array(settings.mean), np.array(settings.std)
    seen: set[str] = set()
    for batch in batches(dataset, settings):
        pictures = 255 * (batch.images.permute(0, 2, 3, 1).numpy() * std + mean)
        for sample_id, own, picture in zip(batch.ids.tolist(), told_of(batch, dataset, settings), pictures, strict=True):
            untouched = np.ones((SIZE, SIZE), bool)
            for y, x, h, w in (map(int, box) for box in re.findall(r"y (\d+) x (\d+) h (\d+) w (\d+)", own["erased"])):
                untouched[y : y + h, x : x + w] = False
            difference = np.abs(redone(dataset, sample_id, own) - picture)
            # Of so few pixels Pillow's equalize, in whole numbers, makes a coarse table; at full size it is DALI's (test_operators.py).
            assert "equalize" in own["operators"] or difference[untouched].mean() < 4
            assert untouched.all() or difference[~untouched].mean() > 20
            seen |= {name.partition(" ")[0] for name in own["operators"].split(", ")} | {"erased"} - {own["erased"]}
    assert len(seen) > 8


@pytest.mark.parametrize("alphas", [(0.8, 1.0), (0.8, 0.0), (0.0, 1.0)])
def test_mixes_are_those_of_the_batch(dataset: Index, alphas: tuple[float, float]) -> None:
    settings = DataConfig(image_size=SIZE, mixup=alphas[0], cutmix=alphas[1])
    kinds = set()
    for batch in batches(dataset, settings):
        told = [drawn["mix"] for drawn in told_of(batch, dataset, settings)]
        assert told[::2] == told[1::2]
        assert batch.mix is not None
        for text, (y0, y1, x0, x1), share in zip(told[::2], batch.mix.box.tolist(), batch.mix.lam.tolist(), strict=True):
            assert text == (f"cutmix {share:.2f} y {y0}:{y1} x {x0}:{x1}" if y1 > y0 and x1 > x0 else f"mixup {share:.2f}")
            kinds.add(text.split()[0])
    assert kinds == {name for name, alpha in zip(("mixup", "cutmix"), alphas, strict=True) if alpha}
