"""Counter-based random numbers never change, and have their distributions."""

import numpy as np
import pytest

import data.common.counter_rng
from data.common.counter_rng import Draw, hash64, permutation, uniform


def test_streams_never_change() -> None:
    """Golden numbers: the order and the augmentation of every run depend on them."""
    assert int(hash64(0)) == 0xE220A8397B1DCDAF  # the first output of splitmix64 seeded with 0, as published
    assert [int(value) for value in hash64(1, Draw.FLIP, np.arange(2))] == [2890219612724854039, 10092322580234381043]
    assert permutation(8, 3).tolist() == [5, 3, 0, 2, 6, 1, 7, 4]


def test_keys_broadcast_and_their_order_matters() -> None:
    ids = np.arange(5)
    assert hash64(1, ids[:, None], np.arange(3)).shape == (5, 3)
    assert hash64(1, ids)[2] == hash64(1, 2) == hash64(np.int64(1), np.uint32(2))
    assert hash64(1, 2) != hash64(2, 1)
    assert hash64(1) != hash64(1, 0)
    assert hash64(-1, 5) == hash64(2**64 - 1, 5) == hash64(np.int64(-1), 5)


def test_uniform_is_flat_and_uncorrelated() -> None:
    numbers = uniform(0, 7, np.arange(200)[:, None], np.arange(1000))
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts = np.histogram(numbers, bins=50, range=(0, 1))[0]
    expected = numbers.size / 50
    assert ((counts - expected) ** 2 / expected).sum() < 100  # chi square, 49 degrees of freedom: beyond 1e-5
    for shift in ((0, 1), (1, 0)):
        moved = np.roll(numbers, shift, (0, 1))
        assert abs(np.corrcoef(numbers.ravel(), moved.ravel())[0, 1]) < 0.01


def test_permutations_are_complete_and_differ() -> None:
    rows = permutation(100, 5, np.arange(4))
    assert rows.shape == (4, 100)
    assert (np.sort(rows, axis=1) == np.arange(100)).all()
    assert (rows[2] == permutation(100, 5, 2)).all()
    assert (rows[0] != rows[1]).any()


def test_equal_hashes_keep_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """The result must not depend on NumPy's sort on this machine."""
    monkeypatch.setattr(data.common.counter_rng, "hash64", lambda *keys: hash64(*keys) % np.uint64(16))
    few = data.common.counter_rng.hash64(data.common.counter_rng.hash64(5, np.arange(4))[:, None], np.arange(1000))
    expected = np.lexsort((np.broadcast_to(np.arange(1000), few.shape), few), axis=1)
    assert (permutation(1000, 5, np.arange(4)) == expected).all()
