import itertools
from typing import Any

import numpy as np
import pytest

import data.order
from data.draws import Draw, permutation
from data.order import SampleOrder, evaluation_ids, lanes_for, rank_slice


def shard_start(*sizes: int) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)


def check_epoch(order: SampleOrder, epoch: int) -> None:
    """Every sample at most once, steps_per_epoch * global_batch distinct ones."""
    ids = np.concatenate([order.batch(epoch, step) for step in range(order.steps_per_epoch)])
    assert len(ids) == order.steps_per_epoch * order.global_batch
    assert ids.min() >= 0
    assert ids.max() < order.samples
    assert len(np.unique(ids)) == len(ids), f"samples repeat: {order}"


COMBINATIONS = [
    (sizes, lanes, window, batch)
    for sizes, lanes, window, batch in itertools.product(
        [(1,), (7,), (40,), (3, 1, 9), (10, 10, 10, 10), (1, 2, 3, 4, 5, 6, 7)],
        (1, 2, 3, 4, 64),
        (1, 2, 5, 7, 2048),
        (1, 2, 4, 6, 12),
    )
    if sum(sizes) >= batch
]


def test_every_sample_at_most_once_an_epoch() -> None:
    for sizes, lanes, window, batch in COMBINATIONS:
        for epoch in (0, 3):
            check_epoch(SampleOrder(shard_start(*sizes), seed=1, global_batch=batch, lanes=lanes, window=window), epoch)


def test_the_check_above_finds_a_broken_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: permute each lane's last window as if it were a whole one, wrapped into what there is of it."""

    def whole_windows(seed: int, epoch: int, lanes: int, window: int, length: int) -> np.ndarray:
        return permutation(length + 1, seed, Draw.WINDOW, epoch, np.arange(lanes), window)[:, :length] % length

    monkeypatch.setattr(data.order, "_window_permutations", whole_windows)
    with pytest.raises(AssertionError, match="samples repeat"):
        test_every_sample_at_most_once_an_epoch()


def test_another_epoch_seed_or_step_is_another_order() -> None:
    order = SampleOrder(shard_start(50, 60, 70), seed=0, global_batch=12, lanes=4, window=16)
    other_seed = SampleOrder(shard_start(50, 60, 70), seed=1, global_batch=12, lanes=4, window=16)
    first = order.batch(0, 0)
    for other in (order.batch(1, 0), order.batch(0, 1), other_seed.batch(0, 0)):
        assert (first != other).any()
    assert (first == SampleOrder(shard_start(50, 60, 70), seed=0, global_batch=12, lanes=4, window=16).batch(0, 0)).all()


@pytest.mark.parametrize("sizes", [(103,), (50, 53)])
def test_what_is_left_over_differs_between_epochs(sizes: tuple[int, ...]) -> None:
    order = SampleOrder(shard_start(*sizes), seed=0, global_batch=20, lanes=4, window=8)
    left = []
    for epoch in range(12):
        used = np.concatenate([order.batch(epoch, step) for step in range(order.steps_per_epoch)])
        left.append(frozenset(range(103)) - set(used.tolist()))
    assert {len(part) for part in left} == {3}
    assert len(set(left)) >= 10
    assert len(frozenset.union(*left)) > 20  # over time the loss is spread


def test_ranks_own_consecutive_slots_and_whole_lanes() -> None:
    """The first 50 global batches are the same for any number of ranks, and a rank's slots are whole lanes where it can be."""
    order = SampleOrder(shard_start(*[37] * 9), seed=4, global_batch=16, lanes=8, window=10)
    for step in range(50):
        epoch, step_in_epoch = order.locate(step)
        whole = order.batch(epoch, step_in_epoch)
        for ranks in (1, 2, 4, 8, 16):
            parts = [whole[rank_slice(16, rank, ranks)] for rank in range(ranks)]
            assert (np.concatenate(parts) == whole).all()
    used = {rank: np.concatenate([order.batch(0, step)[rank_slice(16, rank, 4)] for step in range(20)]) for rank in range(4)}
    lane_length = order.steps_per_epoch * 2
    shards, starts, offset = data.order._epoch_layout(order, 0)
    for rank, ids in used.items():
        shard = np.searchsorted(order.shard_start, ids, side="right") - 1
        place = {number: slot for slot, number in enumerate(shards)}
        positions = np.array([starts[place[s]] for s in shard]) + ids - order.shard_start[shard]
        lanes = ((positions - offset) % order.samples) // lane_length
        assert set(lanes.tolist()) == {2 * rank, 2 * rank + 1}


def test_locate() -> None:
    order = SampleOrder(shard_start(10), seed=0, global_batch=3)
    assert [order.locate(step) for step in range(5)] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]


def test_cost_does_not_depend_on_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted in permuted positions, at the size of ImageNet-22K."""
    work = []

    def counting(n: int, *keys: Any) -> np.ndarray:
        result = permutation(n, *keys)
        work.append(result.size)
        return result

    monkeypatch.setattr(data.order, "permutation", counting)
    order = SampleOrder(np.linspace(0, 14_197_122, 4097).astype(np.int64), seed=0, global_batch=8192)
    assert order.steps_per_epoch == 1733
    for epoch, step in ((0, 0), (0, 1200), (50, 7), (89, 1731)):
        work.clear()
        data.order._window_permutations.cache_clear()
        data.order._epoch_layout.cache_clear()
        ids = order.batch(epoch, step)
        assert len(np.unique(ids)) == 8192
        assert sum(work) <= 4096 + 64 * 2048


def test_a_batch_mixes_lanes_far_apart() -> None:
    order = SampleOrder(np.linspace(0, 1_000_000, 101).astype(np.int64), seed=0, global_batch=1024)
    shard = np.searchsorted(order.shard_start, order.batch(0, 100), side="right") - 1
    assert len(np.unique(shard)) >= 60
    own = shard[rank_slice(1024, 3, 64)]
    assert len(np.unique(own)) <= 2  # one lane of one rank: one shard, or the border of two


def test_lanes_for() -> None:
    assert lanes_for(8192, 64) == 64
    assert lanes_for(96, 64) == 48
    assert lanes_for(7, 64) == 7
    assert lanes_for(130, 64) == 26
    assert lanes_for(131, 64) == 1


def test_evaluation_covers_every_sample_once() -> None:
    for samples, ranks in itertools.product((0, 1, 5, 12), (1, 2, 5, 8)):
        parts = [evaluation_ids(samples, rank, ranks) for rank in range(ranks)]
        assert sorted(np.concatenate(parts).tolist()) == list(range(samples))


def test_errors_name_what_would_work() -> None:
    with pytest.raises(ValueError, match="9 samples, fewer than one global batch of 10"):
        SampleOrder(shard_start(4, 5), seed=0, global_batch=10)
    with pytest.raises(ValueError, match="numbers of ranks that work: 1, 2, 3, 4, 6"):
        rank_slice(12, 0, 5)
    with pytest.raises(ValueError, match="outside of an epoch of 3 steps"):
        SampleOrder(shard_start(10), seed=0, global_batch=3).batch(0, 3)
