"""The order of entries, the cuts between shards, and the holdout, as arithmetic on arrays."""

from itertools import pairwise

import numpy as np
import xxhash

from data.packing.plan import cut_shards, draw_holdout, draw_order


def hash_keys(keys: list[str]) -> np.ndarray:
    return np.array([xxhash.xxh3_64_intdigest(key.encode()) for key in keys], np.uint64)


def test_prefix_of_the_shards_is_an_unbiased_draw() -> None:
    """Compares class counts and sizes of the first shards with those of all: as for a random draw, and unlike listing order."""
    random_sizes = np.random.default_rng(1)
    labels = np.repeat(np.arange(100), 300)
    size = random_sizes.integers(1000, 2000, len(labels)) + 10 * labels  # classes differ in size
    hashes = hash_keys([f"n{label:08d}/n{label:08d}_{number}" for number, label in enumerate(labels)])

    def find_biased_prefixes(order: np.ndarray) -> list[bool]:
        biased = []
        shards = cut_shards(size[order].astype(float), 1_000_000)
        for count in (1, 2, 5, 10, 20):
            drawn = order[: shards[count - 1][1]]
            expected = len(drawn) / 100
            # Drawn without replacement, so the variance is smaller by the remaining share.
            chi_square = ((np.bincount(labels[drawn], minlength=100) - expected) ** 2 / expected).sum() / (1 - len(drawn) / len(labels))
            mean_error = (size[drawn].mean() - size.mean()) / (size.std() / np.sqrt(len(drawn)))
            biased.append(not (50 < chi_square < 160 and abs(mean_error) < 3.5))  # 99 degrees of freedom: 0.1 % at 52 and at 148
        return biased

    for seed in range(5):
        assert not any(find_biased_prefixes(draw_order(hashes, seed)[0]))
    assert all(find_biased_prefixes(np.arange(len(labels))))
    assert all(find_biased_prefixes(np.lexsort((draw_order(hashes, 0)[0], labels % 10)))), "shuffled, but not over all classes"


def test_cuts_are_even_and_lose_nothing() -> None:
    random_costs = np.random.default_rng(0)
    for count, target in ((1, 100), (10, 1000), (1000, 5000), (1000, 1), (50, 10**9)):
        cost = random_costs.integers(50, 150, count).astype(float)
        shards = cut_shards(cost, target)
        assert shards[0][0] == 0
        assert shards[-1][1] == count
        assert all(before[1] == after[0] for before, after in pairwise(shards))
        sizes = [cost[start:stop].sum() for start, stop in shards]
        if 150 < target < cost.sum():
            assert max(sizes) - min(sizes) <= 300
            assert target * 0.6 < np.mean(sizes) < target * 1.5
    assert cut_shards(np.zeros(0), 100) == []


def test_holdout_takes_at_most_half_of_a_class() -> None:
    labels = np.repeat(np.arange(4), [1, 2, 5, 1000])
    hashes = hash_keys([f"{label}/{number}" for number, label in enumerate(labels)])
    order = np.random.default_rng(0).permutation(len(labels))
    held = draw_holdout(labels, hashes, 3, seed=0)
    assert np.bincount(labels[held], minlength=4).tolist() == [0, 1, 2, 3], "never more than half of a class"
    assert (draw_holdout(labels[order], hashes[order], 3, seed=0) == held[order]).all()
    assert 50 < draw_holdout(labels, hashes, 0.1, seed=0).sum() < 150
    assert not draw_holdout(labels, hashes, None, seed=0).any()
