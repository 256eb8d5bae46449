"""The listed parameters of a sample are those that the loader applies."""

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


def load_batches(index: Index, settings: DataConfig) -> list[tuple[Batch, list[dict[str, str]]]]:
    """Loads the second epoch's first three global batches of 10, with the parameters of their samples."""
    order = SampleOrder(index.shard_start, seed=SEED, global_batch=10, lanes=5, window=8)
    start = order.steps_per_epoch
    with TrainLoader(index, order, settings, Placement(torch.device("cpu"), micro_batch=10), start=start, end=start + 3) as loader:
        batches = list(loader)
    recipe = Recipe(SEED, settings)
    return [(batch, list_parameters(recipe, batch.epoch, batch.ids, np.zeros_like(batch.ids), index)) for batch in batches]


def augment_with_pillow(index: Index, sample_id: int, parameters: dict[str, str]) -> np.ndarray:
    """Applies listed parameters to a sample with Pillow; returns float32 (SIZE, SIZE, 3)."""
    y, x, h, w = map(int, re.fullmatch(r"y (\d+) x (\d+) h (\d+) w (\d+)", parameters["crop"]).groups())  # type: ignore[union-attr]
    with ShardStore(index) as store, Image.open(io.BytesIO(store.read(sample_id).tobytes())) as image:
        picture = image.convert("RGB").crop((x, y, x + w, y + h)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    pixels = np.asarray(ImageOps.mirror(picture) if parameters["flip"] == "yes" else picture)
    for operator in parameters.get("operators", "no").split(", "):
        if operator != "no":
            name, _, argument = operator.partition(" ")
            pixels = in_timm(Image.fromarray(pixels), Operator[name.upper()], float(argument or 0), mirrored=False, linear=False)
    return pixels.astype(np.float32)


def test_crop_and_flip_match_the_batch(dataset: Index) -> None:
    settings = DataConfig(image_size=SIZE, mixup=0, cutmix=0, mean=(0, 0, 0), std=(1, 1, 1), flip=0.3, crop_area=(0.2, 0.9))
    flips = []
    for batch, parameters in load_batches(dataset, settings):
        pictures = 255 * batch.images.permute(0, 2, 3, 1).numpy()
        differences, flipped_differences = [], []
        for sample_id, texts, picture in zip(batch.ids.tolist(), parameters, pictures, strict=True):
            flipped = texts | {"flip": "no" if texts["flip"] == "yes" else "yes"}
            differences.append(np.abs(augment_with_pillow(dataset, sample_id, texts) - picture).mean())
            flipped_differences.append(np.abs(augment_with_pillow(dataset, sample_id, flipped) - picture).mean())
            flips.append(texts["flip"])
            assert texts.keys() == {"crop", "flip"}
        assert max(differences) < 3  # of 255; Pillow and DALI differ in the last bits
        assert np.median(flipped_differences) > 10  # control
    assert 0 < flips.count("yes") < len(flips) / 2


def test_operators_and_erased_boxes_match_the_batch(dataset: Index) -> None:
    settings = DataConfig(image_size=SIZE, mixup=0, cutmix=0, auto_augment="rand-m9-mstd0.5-inc1", random_erasing=0.5, erasing_count=2)
    mean, std = np.array(settings.mean), np.array(settings.std)
    names: set[str] = set()
    for batch, parameters in load_batches(dataset, settings):
        pictures = 255 * (batch.images.permute(0, 2, 3, 1).numpy() * std + mean)
        for sample_id, texts, picture in zip(batch.ids.tolist(), parameters, pictures, strict=True):
            is_kept = np.ones((SIZE, SIZE), bool)
            for y, x, h, w in (map(int, box) for box in re.findall(r"y (\d+) x (\d+) h (\d+) w (\d+)", texts["erased"])):
                is_kept[y : y + h, x : x + w] = False
            difference = np.abs(augment_with_pillow(dataset, sample_id, texts) - picture)
            # For so few pixels Pillow's integer equalize has a coarse table; at full size it matches DALI's (test_operators.py).
            assert "equalize" in texts["operators"] or difference[is_kept].mean() < 4
            assert is_kept.all() or difference[~is_kept].mean() > 20
            names |= {operator.partition(" ")[0] for operator in texts["operators"].split(", ")} | {"erased"} - {texts["erased"]}
    assert len(names) > 8


@pytest.mark.parametrize("alphas", [(0.8, 1.0), (0.8, 0.0), (0.0, 1.0)])
def test_mixes_match_the_batch(dataset: Index, alphas: tuple[float, float]) -> None:
    kinds = set()
    for batch, parameters in load_batches(dataset, DataConfig(image_size=SIZE, mixup=alphas[0], cutmix=alphas[1])):
        mixes = [texts["mix"] for texts in parameters]
        assert mixes[::2] == mixes[1::2]
        assert batch.mix is not None
        for text, (y0, y1, x0, x1), share in zip(mixes[::2], batch.mix.box.tolist(), batch.mix.lam.tolist(), strict=True):
            assert text == (f"cutmix {share:.2f} y {y0}:{y1} x {x0}:{x1}" if y1 > y0 and x1 > x0 else f"mixup {share:.2f}")
            kinds.add(text.split()[0])
    assert kinds == {name for name, alpha in zip(("mixup", "cutmix"), alphas, strict=True) if alpha}
