"""Random numbers that are a function of their keys: no state to carry, save or restore.

    uniform(seed, Draw.FLIP, epoch, sample_ids)  ->  one number in [0, 1) a sample, the same on every rank

The generator is this file's own, not NumPy's: the streams of `numpy.random.Generator` may change between NumPy versions, and
the order and the augmentation of a run must not.
"""

from enum import IntEnum

import numpy as np
from numpy.typing import ArrayLike

# Constants of splitmix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", OOPSLA 2014), whose finaliser
# is a bijection of 64 bits in which every input bit flips every output bit with a probability near 1/2.
_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLY_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLY_2 = np.uint64(0x94D049BB133111EB)
_WORD = 0xFFFFFFFFFFFFFFFF


class Draw(IntEnum):
    """What a number is drawn for. Each use has its own key, so no two choices ever share random bits. Values are for good:
    changing one changes every run."""

    PACK = 1
    SHARDS = 2
    ROTATION = 3
    WINDOW = 4
    HOLDOUT = 5
    CROP_AREA = 10
    CROP_RATIO = 11
    CROP_Y = 12
    CROP_X = 13
    FLIP = 14
    INTERPOLATION = 15
    MIX_KIND = 20
    MIXUP_LAM = 21
    CUTMIX_LAM = 22
    CUTMIX_Y = 23
    CUTMIX_X = 24
    SYNTHESIZE = 30
    OPERATOR = 40
    OPERATOR_APPLIED = 41
    MAGNITUDE = 42
    MAGNITUDE_SIGN = 43
    JITTER_ORDER = 45
    JITTER_FACTOR = 46
    ERASED = 50
    ERASED_COUNT = 51
    ERASED_AREA = 52
    ERASED_RATIO = 53
    ERASED_Y = 54
    ERASED_X = 55
    ERASED_NOISE = 56
    PROBE = 60


def hash64(*keys: ArrayLike) -> np.ndarray:
    """64 well mixed bits for each combination of keys, uint64, of the shape the keys broadcast to.

    Keys are integers or integer arrays (negative ones count modulo 2^64). They are folded in one after another, so the same
    keys in another order give other bits.
    """
    state: np.ndarray | np.uint64 = np.uint64(0)
    with np.errstate(over="ignore"):  # arithmetic is modulo 2^64 on purpose; NumPy warns about it for scalars only
        for key in keys:
            word = np.uint64(int(key) & _WORD) if isinstance(key, int) else np.asarray(key).astype(np.uint64)
            state = state + word + _GAMMA
            state = (state ^ (state >> np.uint64(30))) * _MULTIPLY_1
            state = (state ^ (state >> np.uint64(27))) * _MULTIPLY_2
            state = state ^ (state >> np.uint64(31))
    return np.asarray(state)


def uniform(*keys: ArrayLike) -> np.ndarray:
    """A float64 in [0, 1) for each combination of keys: the upper 53 bits of `hash64`, so every value is exact."""
    return (hash64(*keys) >> np.uint64(11)) * 2.0**-53


def standard_normal(*keys: ArrayLike) -> np.ndarray:
    """A float64 from the standard normal distribution for each combination of keys (Box and Muller, 1958)."""
    return np.sqrt(-2 * np.log1p(-uniform(*keys, 0))) * np.cos(2 * np.pi * uniform(*keys, 1))


def permutation(n: int, *keys: ArrayLike) -> np.ndarray:
    """A permutation of range(n), int64, of shape (..., n) for keys that broadcast to (...).

    It is the order of the hashes, and where two hashes are equal that of their places. A sort that keeps equal ones in place takes
    four times as long, so it is called only where there are some: hardly ever, of 64 bits.
    """
    rows = hash64(*keys)
    hashes = hash64(rows[..., None], np.arange(n))
    order = np.argsort(hashes, axis=-1)
    ranked = np.take_along_axis(hashes, order, axis=-1)
    if (ranked[..., 1:] == ranked[..., :-1]).any():
        return np.argsort(hashes, axis=-1, kind="stable")
    return order
