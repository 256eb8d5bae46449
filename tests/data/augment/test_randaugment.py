"""Operators, magnitudes and jitter have the distributions of timm and torchvision."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import chi2_contingency, ks_2samp
from timm.data.auto_augment import rand_augment_transform
from torchvision.transforms import ColorJitter

from data.augment.randaugment import Layer, Operator, draw_color_jitter, draw_rand_augment
from data.settings import Policy, parse_policy

pytestmark = pytest.mark.slow

DRAWS = 100_000
RECIPE = "rand-m9-mstd0.5-inc1"
POLICIES = [RECIPE, "rand-m6-n3-mstd1", "rand-m15-n1-p0.8-mmax20-inc1", "rand-m8-mstd101-inc1"]
# Probability that samples of equal distributions differ by so much; a hundred comparisons are made.
UNLIKELY = 1e-5

# Timm's names of the operators.
TIMM = {
    "AutoContrast": Operator.AUTO_CONTRAST,
    "Equalize": Operator.EQUALIZE,
    "Invert": Operator.INVERT,
    "Rotate": Operator.ROTATE,
    "Posterize": Operator.POSTERIZE,
    "Solarize": Operator.SOLARIZE,
    "SolarizeAdd": Operator.SOLARIZE_ADD,
    "Color": Operator.COLOR,
    "Contrast": Operator.CONTRAST,
    "Brightness": Operator.BRIGHTNESS,
    "Sharpness": Operator.SHARPNESS,
    "ShearX": Operator.SHEAR_X,
    "ShearY": Operator.SHEAR_Y,
    "TranslateXRel": Operator.TRANSLATE_X,
    "TranslateYRel": Operator.TRANSLATE_Y,
}

# Operators and arguments that are applied to each image, in order.
Applied = list[list[tuple[int, float]]]


def timms(text: str, images: int) -> Applied:
    """Records the operators and arguments that timm's RandAugment applies."""
    transform = rand_augment_transform(text, {"translate_const": 100, "img_mean": (0, 0, 0)})
    calls: list[tuple[int, float]] = []

    def recorder(operator: Operator) -> Any:
        def record(image: Image.Image, *arguments: float, **_: Any) -> Image.Image:
            calls.append((int(operator), float(arguments[0]) if arguments else 0.0))
            return image

        return record

    for op in transform.ops:
        op.aug_fn = recorder(TIMM[op.name.removesuffix("Increasing")])
    random.seed(0)
    np.random.seed(0)
    found: Applied = []
    for _ in range(images):
        transform(Image.new("RGB", (1, 1)))
        found.append(calls.copy())
        calls.clear()
    return found


def ours(layers: list[Layer]) -> Applied:
    found: Applied = [[] for _ in layers[0].operator]
    for layer in layers:
        for number in np.flatnonzero(layer.operator).tolist():
            found[number].append((int(layer.operator[number]), float(layer.argument[number])))
    return found


def alike(one: list[Any], other: list[Any]) -> float:
    """Returns the probability that counts of two samples of one distribution differ as much as these."""
    kinds = sorted(set(one) | set(other))
    counts = np.array([[sample.count(kind) for kind in kinds] for sample in (one, other)])
    return float(chi2_contingency(counts).pvalue) if len(kinds) > 1 else 1.0


def check_against_timm(mine: Applied, theirs: Applied) -> None:
    assert alike([len(calls) for calls in mine], [len(calls) for calls in theirs]) > UNLIKELY, "numbers of operators"
    flat_mine, flat_theirs = ([call for calls in sample for call in calls] for sample in (mine, theirs))
    assert {operator for operator, _ in flat_mine} == {operator for operator, _ in flat_theirs}
    assert alike([operator for operator, _ in flat_mine], [operator for operator, _ in flat_theirs]) > UNLIKELY, "operators"
    for operator in TIMM.values():
        arguments = [np.array([argument for one, argument in flat if one == operator]) for flat in (flat_mine, flat_theirs)]
        assert ks_2samp(*arguments).pvalue > UNLIKELY, f"arguments of {operator.name}"
    pairs = [[calls[0][0] * 100 + calls[1][0] for calls in sample if len(calls) == 2] for sample in (mine, theirs)]
    assert alike(*pairs) > UNLIKELY, "pairs of operators"


@pytest.mark.parametrize("text", POLICIES)
def test_operators_and_arguments_are_distributed_as_in_timm(text: str) -> None:
    draws = DRAWS if text == RECIPE else DRAWS // 5
    check_against_timm(ours(draw_rand_augment(3, 1, np.arange(draws), parse_policy(text))), timms(text, draws))


@pytest.mark.parametrize(("change", "message"), [({"probability": 0.55}, "numbers of operators"), ({"magnitude": 8}, "arguments")], ids=str)
def test_comparison_detects_another_policy(change: dict[str, Any], message: str) -> None:
    policy = Policy(**{**vars(parse_policy(RECIPE)), **change})
    with pytest.raises(AssertionError, match=message):
        check_against_timm(ours(draw_rand_augment(3, 1, np.arange(DRAWS // 5), policy)), timms(RECIPE, DRAWS // 5))


def test_policy_is_parsed() -> None:
    assert parse_policy(RECIPE) == Policy(magnitude=9, magnitude_std=0.5, increasing=True)
    assert parse_policy("rand-m7-n3-p0.25-mmax12") == Policy(magnitude=7, layers=3, probability=0.25, magnitude_max=12)
    assert parse_policy("rand-mstdinf").magnitude_std == parse_policy("rand-mstd101").magnitude_std == np.inf


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("augmix-m3", "must be RandAugment"),
        ("rand-m9-tweights", "'tweights'"),
        ("rand-m9.5", "'m9.5'"),
        ("rand-x3", "'x3'"),
        ("rand-p1.5", "probability"),
        ("rand-n0", "at least 1"),
    ],
)
def test_invalid_policy_is_an_error(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_policy(text)


@pytest.mark.parametrize("strength", [0.4, 1.5])
def test_jitter_is_distributed_as_in_torchvision(strength: float) -> None:
    layers = draw_color_jitter(0, 0, np.arange(DRAWS // 5), strength)
    torch.manual_seed(0)
    params = [ColorJitter.get_params(*[(max(0, 1 - strength), 1 + strength)] * 3, None) for _ in range(DRAWS // 5)]
    theirs = [([which for which in order.tolist() if which < 3], factors) for order, *factors in params]
    names = [Operator.BRIGHTNESS, Operator.CONTRAST, Operator.COLOR]  # 0, 1 and 2 of torchvision
    orders = np.stack([layer.operator for layer in layers], axis=1)
    assert alike([tuple(names[which] for which in order) for order, _ in theirs], [tuple(row) for row in orders.tolist()]) > UNLIKELY
    for which, name in enumerate(names):
        factors = np.concatenate([layer.argument[layer.operator == name] for layer in layers])
        assert len(factors) == DRAWS // 5
        assert ks_2samp(factors, [values[which] for _, values in theirs]).pvalue > UNLIKELY
