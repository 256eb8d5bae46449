"""Crops, flips, boxes and mixes have the distributions of torchvision and timm, and depend on their keys alone."""

import random

import numpy as np
import pytest
from PIL import Image
from scipy.stats import ks_2samp
from timm.data.mixup import cutmix_bbox_and_lam
from timm.data.transforms import RandomResizedCropAndInterpolation

from data.augment.randaugment import draw_color_jitter, draw_rand_augment
from data.augment.sampling import draw_bilinear, draw_crops, draw_erased_boxes, draw_flips, draw_mix, draw_noise_starts, draw_symmetric_beta
from data.common.counter_rng import Draw
from data.settings import parse_policy

QUANTILES = np.linspace(0.05, 0.95, 19)


def crops(width: int, height: int, count: int, **options: tuple[float, float]) -> np.ndarray:
    ids = np.arange(count)
    return draw_crops(0, 0, ids, np.full(count, width, np.uint16), np.full(count, height, np.uint16), **options)


def timms_crops(width: int, height: int, count: int, scale: tuple[float, float]) -> np.ndarray:
    """y, x, height, width."""
    random.seed(0)
    image = Image.new("L", (width, height))
    return np.array([RandomResizedCropAndInterpolation.get_params(image, scale, (3 / 4, 4 / 3)) for _ in range(count)])


def least_likely(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Returns the least p-value of Kolmogorov-Smirnov tests on place, sides, area and ratio."""
    described = [np.column_stack([one, one[:, 2] * one[:, 3], one[:, 3] / one[:, 2]]) for one in (ours, theirs)]
    return min(ks_2samp(described[0][:, column], described[1][:, column]).pvalue for column in range(6))


@pytest.mark.parametrize(("width", "height"), [(200, 150), (64, 220), (500, 375)])
def test_crops_are_distributed_as_in_timm(width: int, height: int) -> None:
    assert least_likely(crops(width, height, 100_000), timms_crops(width, height, 100_000, (0.08, 1.0))) > 1e-5


def test_comparison_detects_other_crops() -> None:
    assert least_likely(crops(500, 375, 100_000), timms_crops(500, 375, 100_000, (0.09, 1.0))) < 1e-5
    assert least_likely(crops(500, 375, 100_000, ratio=(0.76, 4 / 3)), timms_crops(500, 375, 100_000, (0.08, 1.0))) < 1e-5


def test_central_crop_is_taken_where_none_fits() -> None:
    """torchvision's fallback, for the whole area of images too long for any allowed ratio."""
    for width, height in ((300, 40), (40, 300), (33, 117), (301, 51)):
        image = Image.new("L", (width, height))
        expected = RandomResizedCropAndInterpolation.get_params(image, (1.0, 1.0), (3 / 4, 4 / 3))
        assert (crops(width, height, 5, scale=(1.0, 1.0)) == np.array(expected)).all()
    assert (crops(80, 80, 5, scale=(1.0, 1.0), ratio=(1.0, 1.0)) == (0, 0, 80, 80)).all()


def draw_everything(seed: int, epoch: int, ids: np.ndarray) -> list[np.ndarray]:
    """Draws all kinds of parameters, with an array axis of samples each."""
    layers = draw_rand_augment(seed, epoch, ids, parse_policy("rand-m9-mstd0.5-inc1")) + draw_color_jitter(seed, epoch, ids, 0.4)
    mix = draw_mix(seed, epoch, ids, image_size=64, mixup=0.8, cutmix=1.0)
    return [
        draw_crops(seed, epoch, ids, 90 + ids % 111, 80 + ids % 220),
        draw_flips(seed, epoch, ids),
        draw_bilinear(seed, epoch, ids, "random", 1),
        draw_erased_boxes(seed, epoch, ids, image_size=64, probability=0.5, count=2),
        draw_noise_starts(seed, epoch, ids, 2),
        *(values for layer in layers for values in (layer.operator, layer.argument)),
        mix.box,
        mix.lam,
    ]


def test_parameters_depend_on_seed_epoch_and_id_alone() -> None:
    ids = np.array([5, 900, 17, 3, 14_000_000, *range(20, 60)])
    whole = draw_everything(1, 2, ids)
    for place in range(len(ids)):
        for one, other in zip(whole, draw_everything(1, 2, ids[place : place + 1]), strict=True):
            assert (one[place] == other[0]).all()
    for seed, epoch in ((2, 2), (1, 3)):
        assert all((one != other).any() for one, other in zip(whole, draw_everything(seed, epoch, ids), strict=True))


def test_flips_have_their_probability() -> None:
    ids = np.arange(20_000)
    assert abs(draw_flips(0, 0, ids).mean() - 0.5) < 0.02
    assert abs(draw_flips(0, 0, ids, 0.2).mean() - 0.2) < 0.02
    assert not draw_flips(0, 0, ids, 0.0).any()
    assert draw_flips(0, 0, ids, 1.0).all()
    assert 0.4 < (draw_flips(0, 0, ids) == draw_flips(0, 1, ids)).mean() < 0.6


@pytest.mark.parametrize("alpha", [0.1, 0.4, 0.8, 1.0, 2.0])
def test_beta_has_its_distribution(alpha: float) -> None:
    numbers = draw_symmetric_beta(alpha, 0, Draw.MIXUP_LAM, 0, np.arange(100_000))
    assert numbers.min() >= 0
    assert numbers.max() <= 1
    assert abs(numbers.mean() - 0.5) < 0.005
    assert abs(numbers.var() * 4 * (2 * alpha + 1) - 1) < 0.02
    reference = np.random.default_rng(0).beta(alpha, alpha, 100_000)
    assert np.abs(np.quantile(numbers, QUANTILES) - np.quantile(reference, QUANTILES)).max() < 0.02


def test_cutmix_boxes_are_distributed_as_in_timm() -> None:
    """For every box, lam is the share of a sample's own pixels."""
    size, count = 224, 20_000
    mix = draw_mix(0, 0, np.arange(count), image_size=size, mixup=0.0, cutmix=1.0)
    np.random.seed(0)
    theirs = np.array(
        [(*box, lam) for box, lam in (cutmix_bbox_and_lam((3, size, size), lam) for lam in np.random.default_rng(0).beta(1, 1, count))]
    )
    y0, y1, x0, x1 = mix.box.T
    assert ((y0 >= 0) & (y0 <= y1) & (y1 <= size) & (x0 >= 0) & (x0 <= x1) & (x1 <= size)).all()
    assert np.allclose(mix.lam, 1 - (y1 - y0) * (x1 - x0) / size**2)
    ours = np.column_stack([y0, y1, x0, x1, mix.lam])
    for column, unit in enumerate((size, size, size, size, 1)):
        difference = np.quantile(ours[:, column], QUANTILES) - np.quantile(theirs[:, column], QUANTILES)
        assert np.abs(difference).max() < 0.025 * unit


def test_mixup_and_cutmix_have_their_probabilities() -> None:
    ids = np.arange(10_000)

    def share_cut(mixup: float, cutmix: float, switch: float) -> float:
        box = draw_mix(0, 0, ids, image_size=224, mixup=mixup, cutmix=cutmix, switch=switch).box
        return float(((box[:, 1] > box[:, 0]) & (box[:, 3] > box[:, 2])).mean())

    assert abs(share_cut(0.8, 1.0, 0.5) - 0.5) < 0.02
    assert abs(share_cut(0.8, 1.0, 0.1) - 0.1) < 0.02
    assert share_cut(0.8, 0.0, 0.5) == 0
    assert share_cut(0.0, 1.0, 0.5) > 0.99
    lam = draw_mix(0, 0, ids, image_size=224, mixup=0.8, cutmix=0.0).lam
    assert abs(lam.var() - 1 / (4 * 2.6)) < 0.003
