import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import data.loader.order
from data.common.counter_rng import Draw, permutation
from data.loader.order import (
    SampleOrder,
    ShardUse,
    compute_evaluation_peak_bytes,
    compute_peak_bytes,
    count_lanes,
    plan_evaluation_uses,
    plan_shard_uses,
    select_rank_slots,
)


def shard_start(*sizes: int) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)


def check_epoch(order: SampleOrder, epoch: int, ranks: int) -> None:
    """Asserts that an epoch uses each copy at most once, and all samples but those that can't fill a batch."""
    slots = [select_rank_slots(order.global_batch, rank, ranks) for rank in range(ranks)]
    batches = [order.batch(epoch, step) for step in range(order.steps_per_epoch)]
    ids = np.concatenate([batch[part] for batch in batches for part in slots])
    copies = np.concatenate([order.copies[part] for _ in batches for part in slots])
    assert ids.min() >= 0
    assert ids.max() < order.samples
    used, times = np.unique(ids, return_counts=True)
    assert set(times.tolist()) == {order.repeats}, f"samples repeat: {order}"
    assert 0 <= order.samples - len(used) < order.global_batch // order.repeats, f"samples are unused: {order}"
    assert len(np.unique(ids * order.repeats + copies)) == len(ids), f"copies repeat: {order}"


COMBINATIONS = [
    (sizes, lanes, window, batch)
    for sizes, lanes, window, batch in itertools.product(
        [(1,), (7,), (40,), (3, 1, 9), (10, 10, 10, 10), (1, 2, 3, 4, 5, 6, 7)], (1, 2, 3, 4, 64), (1, 2, 5, 7, 2048), (1, 2, 4, 6, 12)
    )
    if sum(sizes) >= batch
]


def make_orders(combinations: list[tuple[tuple[int, ...], int, int, int]]) -> Iterator[SampleOrder]:
    """Yields the orders of the combinations, with every number of repeats that a batch allows."""
    for sizes, lanes, window, batch in combinations:
        for repeats in (1, 2, 3):
            if repeats == 1 or (batch % repeats == 0 and batch > repeats):
                yield SampleOrder(shard_start(*sizes), seed=1, global_batch=batch, lanes=lanes, window=window, repeats=repeats)


def ranks_for(order: SampleOrder) -> list[int]:
    return [ranks for ranks in (1, 2, 3, 4, 6, 12) if order.global_batch % ranks == 0]


def test_every_sample_once_an_epoch_over_all_ranks() -> None:
    for number, order in enumerate(make_orders(COMBINATIONS)):
        for ranks in ranks_for(order):
            check_epoch(order, number % 4, ranks)


def test_check_detects_a_broken_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: each lane's last, shorter window gets the permutation of a longer one, modulo its length."""

    def whole_windows(seed: int, epoch: int, lanes: int, window: int, length: int) -> np.ndarray:
        return permutation(length + 1, seed, Draw.WINDOW, epoch, np.arange(lanes), window)[:, :length] % length

    monkeypatch.setattr(data.loader.order, "_permute_windows", whole_windows)
    with pytest.raises(AssertionError, match="samples repeat"):
        test_every_sample_once_an_epoch_over_all_ranks()


def test_copies_are_in_one_batch_and_never_neighbors() -> None:
    seen = 0
    for order in make_orders(COMBINATIONS):
        if order.repeats == 1:
            assert (order.copies == 0).all()
            continue
        batch = order.batch(1, order.steps_per_epoch - 1)
        assert set(np.unique(batch, return_counts=True)[1].tolist()) == {order.repeats}
        assert (batch[1:] != batch[:-1]).all()
        for copy in range(order.repeats):
            assert (batch[order.copies == copy] == batch[order.copies == 0]).all()
        for ranks in ranks_for(order):
            if ranks >= order.repeats:
                for rank in range(ranks):
                    own = batch[select_rank_slots(order.global_batch, rank, ranks)]
                    assert len(np.unique(own)) == len(own), "copies on one rank"
                    seen += 1
    assert seen > 1000


def test_order_never_changes() -> None:
    """Golden ids: a run must be able to resume with a newer version."""
    order = SampleOrder(shard_start(50, 60, 70), seed=3, global_batch=12, lanes=4, window=16)
    assert order.batch(2, 7).tolist() == [167, 174, 166, 35, 29, 28, 78, 83, 73, 120, 117, 128]


@pytest.mark.parametrize("sizes", [(103,), (50, 53)])
def test_unused_samples_differ_between_epochs(sizes: tuple[int, ...]) -> None:
    order = SampleOrder(shard_start(*sizes), seed=0, global_batch=20, lanes=4, window=8)
    left = []
    for epoch in range(12):
        used = np.concatenate([order.batch(epoch, step) for step in range(order.steps_per_epoch)])
        left.append(frozenset(range(103)) - set(used.tolist()))
    assert {len(part) for part in left} == {3}
    assert len(set(left)) >= 10
    assert len(frozenset.union(*left)) > 20  # over time the loss is spread


def test_cost_does_not_depend_on_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cost is the number of permuted positions, at the size of ImageNet-22K."""
    work = []

    def counting(n: int, *keys: Any) -> np.ndarray:
        result = permutation(n, *keys)
        work.append(result.size)
        return result

    monkeypatch.setattr(data.loader.order, "permutation", counting)
    order = SampleOrder(np.linspace(0, 14_197_122, 4097).astype(np.int64), seed=0, global_batch=8192)
    assert order.steps_per_epoch == 1733
    for epoch, step in ((0, 0), (0, 1200), (50, 7), (89, 1731)):
        work.clear()
        data.loader.order._permute_windows.cache_clear()
        data.loader.order._lay_out_epoch.cache_clear()
        ids = order.batch(epoch, step)
        assert len(np.unique(ids)) == 8192
        assert sum(work) <= 4096 + 64 * 2048


def test_batch_mixes_lanes_far_apart() -> None:
    order = SampleOrder(np.linspace(0, 1_000_000, 101).astype(np.int64), seed=0, global_batch=1024)
    shard = np.searchsorted(order.shard_start, order.batch(0, 100), side="right") - 1
    assert len(np.unique(shard)) >= 60
    own = shard[select_rank_slots(1024, 3, 64)]
    assert len(np.unique(own)) <= 2  # one lane of one rank: one shard, or the border of two


def test_errors_name_values_that_work() -> None:
    with pytest.raises(ValueError, match="9 samples, fewer than one global batch of 10"):
        SampleOrder(shard_start(4, 5), seed=0, global_batch=10)
    with pytest.raises(ValueError, match="9 samples, fewer than one global batch of 20 with 2 repeats needs"):
        SampleOrder(shard_start(4, 5), seed=0, global_batch=20, repeats=2)
    for repeats in (0, 5, 12):
        with pytest.raises(ValueError, match=f"of 12 can't hold {repeats} copies .*; numbers of repeats that work: 1, 2, 3, 4, 6$"):
            SampleOrder(shard_start(100), seed=0, global_batch=12, repeats=repeats)
    with pytest.raises(ValueError, match="numbers of ranks that work: 1, 2, 3, 4, 6"):
        select_rank_slots(12, 0, 5)
    with pytest.raises(ValueError, match="outside of an epoch of 3 steps"):
        SampleOrder(shard_start(10), seed=0, global_batch=3).batch(0, 3)


def per_lane(order: SampleOrder) -> int:
    """Returns the distinct samples of a lane in a step."""
    distinct = order.global_batch // order.repeats
    return distinct // count_lanes(distinct, order.lanes)


def list_touched_shards(order: SampleOrder, slots: slice, start: int, end: int) -> list[list[tuple[int, int]]]:
    """Lists (shard, lane) of each slot of each step, from the batches themselves."""
    lane = (np.arange(order.global_batch) % order.distinct // per_lane(order))[slots].tolist()
    steps = []
    for step in range(start, end):
        ids = order.batch(*order.locate(step))[slots]
        steps.append(list(zip((np.searchsorted(order.shard_start, ids, side="right") - 1).tolist(), lane, strict=True)))
    return steps


def check_uses(order: SampleOrder, ranks: int, start: int, end: int) -> int:
    """Compares the uses of all ranks with the batches; returns the number of uses."""
    sizes = np.diff(order.shard_start) * 1000 + 7
    most = compute_peak_bytes(order, sizes, ranks, start, end)
    whole = list_touched_shards(order, slice(0, order.global_batch), start, end)
    count = 0
    for rank in range(ranks):
        slots = select_rank_slots(order.global_batch, rank, ranks)
        uses = list(plan_shard_uses(order, slots, start, end))
        count += len(uses)
        steps = list_touched_shards(order, slots, start, end)
        assert [use.first for use in uses] == sorted(use.first for use in uses)
        for use in uses:
            assert use.shard in {shard for shard, _ in steps[max(use.first - start, 0)]}, "in use before it is needed"
        first_needs: dict[int, dict[int, None]] = {}  # by epoch: shards in the order in which the batches come to them
        for step, touched in enumerate(steps, start):
            active = {use.shard for use in uses if use.first <= step <= use.last}
            assert {shard for shard, _ in touched} <= active, "a shard is read that is not in use"
            assert int(sum(sizes[shard] for shard in active)) <= most, "more at once than foreseen"
            first_needs.setdefault(order.locate(step)[0], {}).update(dict.fromkeys(shard for shard, _ in touched))
        for epoch, shards in first_needs.items():
            found = dict.fromkeys(use.shard for use in uses if order.locate(use.first)[0] == epoch)
            assert list(found) == list(shards), "not in the order of first need"
        for use in uses:
            lanes = {lane for shard, lane in steps[use.first - start] if shard == use.shard}
            window_steps = (order.window - 1) // per_lane(order) + 1
            of_lanes = range(max(start, use.last - window_steps), min(end, use.last + 1))
            assert use.last >= end or any((use.shard, lane) in whole[step - start] for step in of_lanes for lane in lanes), "for too long"
    return count


@pytest.mark.long
@pytest.mark.slow
def test_shard_uses_are_those_of_the_batches() -> None:
    """Brute force, over the end of an epoch and from the middle of one."""
    seen = 0
    for order in make_orders(COMBINATIONS[::7]):
        total = 2 * order.steps_per_epoch + 1
        for ranks in ranks_for(order)[:4]:
            for start in {0, order.steps_per_epoch // 2 + 1}:
                seen += check_uses(order, ranks, start, max(total, start + 1))
    assert seen > 1000


def test_peak_bytes_of_ranks_that_span_two_copies() -> None:
    """With one sample per shard and no windows, the bound is exact, and in some epochs a rank with slots of two copies needs most."""
    order = SampleOrder(np.arange(41), seed=0, global_batch=12, lanes=4, window=1, repeats=3)
    shard_bytes = np.random.default_rng(0).integers(1, 1_000_000, 40)
    needed_most = set()
    for epoch in range(12):
        steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
        batches = [order.batch(*order.locate(step)).reshape(4, 3) for step in steps]
        needs = shard_bytes[np.stack(batches)].sum(axis=2)  # (steps, ranks)
        assert compute_peak_bytes(order, shard_bytes, 4, steps.start, steps.stop) == needs.max()
        needed_most.add(int(needs.max(axis=0).argmax()))
    assert needed_most == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"last": -1}, "not in use"),
        ({"first": -1}, "in use before"),
        ({"last": 9}, "more at once"),
        ({"reverse": True}, "order of first need"),
    ],
    ids=str,
)
def test_check_of_shard_uses_detects_faults(monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], message: str) -> None:
    right = plan_shard_uses

    def broken(*arguments: Any) -> Any:
        uses = [ShardUse(use.shard, use.first + change.get("first", 0), use.last + change.get("last", 0)) for use in right(*arguments)]
        return sorted(uses, key=lambda use: (use.first, -use.shard)) if "reverse" in change else uses

    monkeypatch.setitem(globals(), "plan_shard_uses", broken)
    with pytest.raises(AssertionError, match=message):
        check_uses(SampleOrder(shard_start(9, 9, 9, 9, 9), seed=1, global_batch=3, lanes=1, window=5), 1, 1, 20)


def test_peak_bytes_are_close_to_the_need() -> None:
    """At the size of ImageNet-22K: 4,096 shards of 3,466 samples, windows of 2,048, so two or three shards a lane."""
    order = SampleOrder(np.linspace(0, 14_197_122, 4097).astype(np.int64), seed=0, global_batch=8192)
    ones = np.ones(4096, np.int64)
    assert 64 * 2 <= compute_peak_bytes(order, ones, 1, 0, 3 * 1733) <= 64 * 3
    assert 2 * 2 <= compute_peak_bytes(order, ones, 32, 0, 1733) <= 2 * 3
    assert compute_peak_bytes(order, ones, 128, 0, 1733) <= 3
    thrice = SampleOrder(order.shard_start, seed=0, global_batch=3 * 8192, repeats=3)
    assert compute_peak_bytes(thrice, ones, 1, 0, 1733) == compute_peak_bytes(order, ones, 1, 0, 1733)
    assert compute_peak_bytes(thrice, ones, 3, 0, 1733) == compute_peak_bytes(order, ones, 1, 0, 1733)  # every rank has a copy of all
    assert compute_peak_bytes(thrice, ones, 96, 0, 1733) == compute_peak_bytes(order, ones, 32, 0, 1733)


@pytest.mark.parametrize("share", [1, 0.4])
def test_evaluation_uses_cover_every_read(share: float) -> None:
    """For all samples, and for a part of them."""
    random = np.random.default_rng(0)
    for sizes, micro_batch, ranks in itertools.product([(10,), (3, 1, 9), (1, 2, 3, 4, 5, 6, 7)], (1, 2, 5), (1, 2, 3)):
        starts = shard_start(*sizes)
        samples = np.flatnonzero(random.random(sum(sizes)) < share)
        uses = plan_evaluation_uses(np.searchsorted(samples, starts), micro_batch, ranks)
        assert [use.shard for use in uses] == np.unique(np.searchsorted(starts, samples, side="right") - 1).tolist()
        most = compute_evaluation_peak_bytes(uses, np.array(sizes))
        assert most <= sum(sizes)
        for rank in range(ranks):
            ids = samples[rank::ranks]
            for step in range(-(-len(ids) // micro_batch)):
                shards = np.searchsorted(starts, ids[step * micro_batch : (step + 1) * micro_batch], side="right") - 1
                active = {use.shard for use in uses if use.first <= step <= use.last}
                assert set(shards.tolist()) <= active
                assert sum(sizes[shard] for shard in active) <= most
