"""Counter-based random numbers: pure functions of their keys, without a state to save or restore.

    uniform(seed, Draw.FLIP, epoch, sample_ids)      # one number in [0, 1) for each sample, the same on every rank

NumPy's generators are not used, because their streams may change between versions, and the order and augmentation of a run must not.
"""

from enum import IntEnum

import numpy as np
from numpy.typing import ArrayLike

# Constants of splitmix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", OOPSLA 2014), whose finalizer
# is a bijection of 64 bits in which every input bit flips every output bit with a probability near 1/2.
_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLY_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLY_2 = np.uint64(0x94D049BB133111EB)
_WORD = 0xFFFFFFFFFFFFFFFF


class Draw(IntEnum):
    """Purposes of random numbers. Each has its own key, so that no two choices share random bits.

    Values must never change: each one is part of every run.
    """

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
    """Hashes each combination of integer keys, or of arrays of integers that broadcast, to uint64.

    The order of the keys matters; negative numbers count modulo 2^64.
    """
    state: np.ndarray | np.uint64 = np.uint64(0)
    with np.errstate(over="ignore"):  # the arithmetic is modulo 2^64; NumPy warns of overflow for scalars only
        for key in keys:
            word = np.uint64(int(key) & _WORD) if isinstance(key, int) else np.asarray(key).astype(np.uint64)
            state = state + word + _GAMMA
            state = (state ^ (state >> np.uint64(30))) * _MULTIPLY_1
            state = (state ^ (state >> np.uint64(27))) * _MULTIPLY_2
            state = state ^ (state >> np.uint64(31))
    return np.asarray(state)


def uniform(*keys: ArrayLike) -> np.ndarray:
    """Draws a float64 from [0, 1) for each combination of keys: the upper 53 bits of `hash64`, which a float64 holds exactly."""
    return (hash64(*keys) >> np.uint64(11)) * 2.0**-53


def standard_normal(*keys: ArrayLike) -> np.ndarray:
    """Draws a float64 from the standard normal distribution for each combination of keys (Box and Muller, 1958)."""
    return np.sqrt(-2 * np.log1p(-uniform(*keys, 0))) * np.cos(2 * np.pi * uniform(*keys, 1))


def permutation(n: int, *keys: ArrayLike) -> np.ndarray:
    """Draws a permutation of range(n) for each combination of keys: int64 (..., n), where the keys broadcast to (...).

    Positions are sorted by their hashes. A stable sort takes four times as long, so it runs only if two hashes are equal.
    """
    rows = hash64(*keys)
    hashes = hash64(rows[..., None], np.arange(n))
    order = np.argsort(hashes, axis=-1)
    ranked = np.take_along_axis(hashes, order, axis=-1)
    if (ranked[..., 1:] == ranked[..., :-1]).any():
        return np.argsort(hashes, axis=-1, kind="stable")
    return order
