"""RandAugment as in timm: draws operators and magnitudes as pure functions of (seed, epoch, sample id).

    policy = parse_policy("rand-m9-mstd0.5-inc1")
    for layer in draw_rand_augment(seed, epoch, ids, policy): …      # layer.operator, layer.argument: arrays over samples
    for layer in draw_color_jitter(seed, epoch, ids, 0.4): …         # torchvision's ColorJitter, as layers of the same kind

Operators, magnitudes and their arguments are those of timm 1.0.31 (timm/data/auto_augment.py: LEVEL_TO_ARG, AugmentOp, RandAugment),
after "RandAugment" (arXiv 1909.13719). operators.py applies the operators to pixels.
"""

from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from data.common.counter_rng import Draw, hash64, standard_normal, uniform
from data.settings import Policy


class Operator(IntEnum):
    """Operators on an image, with the meaning of the argument; from AUTO_CONTRAST on, in the order of timm's list."""

    NONE = 0
    AUTO_CONTRAST = 1
    EQUALIZE = 2
    INVERT = 3
    ROTATE = 4  # degrees, counter-clockwise
    POSTERIZE = 5  # bits that are kept
    SOLARIZE = 6  # lowest intensity that is inverted
    SOLARIZE_ADD = 7  # added to intensities below 128
    COLOR = 8  # saturation: 0 gray, 1 unchanged
    CONTRAST = 9  # 0 the mean gray, 1 unchanged
    BRIGHTNESS = 10  # 0 black, 1 unchanged
    SHARPNESS = 11  # 0 smoothed, 1 unchanged
    SHEAR_X = 12  # pixels per row
    SHEAR_Y = 13  # pixels per column
    TRANSLATE_X = 14  # fraction of the width
    TRANSLATE_Y = 15  # fraction of the height


_ENHANCE = [Operator.COLOR, Operator.CONTRAST, Operator.BRIGHTNESS, Operator.SHARPNESS]
_JITTERED = np.array([Operator.BRIGHTNESS, Operator.CONTRAST, Operator.COLOR])
JITTER_LAYERS = len(_JITTERED)


@dataclass(frozen=True, eq=False)
class Layer:
    """An operator and its argument for each of n samples: int32 (n,), float64 (n,)."""

    operator: np.ndarray
    argument: np.ndarray


def draw_rand_augment(seed: int, epoch: int, ids: np.ndarray, policy: Policy) -> list[Layer]:
    """Draws the layers of RandAugment for each sample, in the order of application; an operator may come twice."""
    layers = []
    for number in range(policy.layers):
        drawn = 1 + hash64(seed, Draw.OPERATOR, epoch, ids, number) % np.uint64(len(Operator) - 1)
        applied = uniform(seed, Draw.OPERATOR_APPLIED, epoch, ids, number) < policy.probability
        operator = np.where(applied, drawn, Operator.NONE).astype(np.int32)
        if np.isinf(policy.magnitude_std):
            magnitude = policy.magnitude * uniform(seed, Draw.MAGNITUDE, epoch, ids, number)
        else:
            magnitude = policy.magnitude + policy.magnitude_std * standard_normal(seed, Draw.MAGNITUDE, epoch, ids, number)
        level = np.clip(magnitude, 0, policy.magnitude_max) / 10
        sign = np.where(uniform(seed, Draw.MAGNITUDE_SIGN, epoch, ids, number) < 0.5, 1.0, -1.0)
        layers.append(Layer(operator, _compute_argument(operator, level, sign, policy.increasing)))
    return layers


def _compute_argument(operator: np.ndarray, level: np.ndarray, sign: np.ndarray, increasing: bool) -> np.ndarray:
    """Computes the arguments of operators at a level, which is 1 for a magnitude of 10."""
    posterize, solarize = np.floor(4 * level), np.minimum(256, np.floor(256 * level))
    enhance = np.maximum(0.1, 1 + 0.9 * sign * level) if increasing else 0.1 + 1.8 * level
    by_operator = {
        Operator.ROTATE: 30 * sign * level,
        Operator.POSTERIZE: 4 - posterize if increasing else posterize,
        Operator.SOLARIZE: 256 - solarize if increasing else solarize,
        Operator.SOLARIZE_ADD: np.minimum(128, np.floor(110 * level)),
        **dict.fromkeys(_ENHANCE, enhance),
        **dict.fromkeys((Operator.SHEAR_X, Operator.SHEAR_Y), 0.3 * sign * level),
        **dict.fromkeys((Operator.TRANSLATE_X, Operator.TRANSLATE_Y), 0.45 * sign * level),
    }
    return np.select([operator == one for one in by_operator], list(by_operator.values()), 0.0)


def draw_color_jitter(seed: int, epoch: int, ids: np.ndarray, strength: float) -> list[Layer]:
    """Draws the layers of color jitter: brightness, contrast and saturation in a random order.

    Factors are uniform in [max(0, 1 - strength), 1 + strength], as in torchvision.transforms.ColorJitter, which timm uses with the same
    strength for all three and without hue.
    """
    rank = hash64(seed, Draw.JITTER_ORDER, epoch, ids[:, None], np.arange(JITTER_LAYERS)).argsort(axis=1)
    low, high = max(0.0, 1 - strength), 1 + strength
    factor = low + (high - low) * uniform(seed, Draw.JITTER_FACTOR, epoch, ids[:, None], np.arange(JITTER_LAYERS))
    operator = _JITTERED[rank].astype(np.int32)
    factor = np.take_along_axis(factor, rank, 1)
    return [Layer(operator[:, place], factor[:, place]) for place in range(JITTER_LAYERS)]
