import numpy as np
import pytest

from data.inspect.shuffle import Quality, compare_orders, measure_quality
from data.loader.order import SampleOrder

SAMPLES, CLASSES, BATCH = 40_000, 400, 256
LABELS = np.arange(SAMPLES) * CLASSES // SAMPLES
SHARD_START = np.arange(0, SAMPLES + 1, 200)


def in_order(labels: np.ndarray) -> Quality:
    """Of batches that follow each other as the samples do."""
    return measure_quality(
        labels, (((first + BATCH / 2) / SAMPLES, np.arange(first, first + BATCH)) for first in range(0, SAMPLES - BATCH, BATCH))
    )


def test_no_shuffling_at_all() -> None:
    found = in_order(LABELS)
    assert found.displacement < 0.002
    assert found.pairs > 0.999
    assert found.alike == 1
    assert found.classes < 4


def test_a_full_permutation() -> None:
    ids = np.random.default_rng(0).permutation(SAMPLES)[: SAMPLES // BATCH * BATCH].reshape(-1, BATCH)
    found = measure_quality(LABELS, (((step + 0.5) / len(ids), batch) for step, batch in enumerate(ids)))
    assert found.displacement == pytest.approx(1 / 3, abs=0.005)
    assert abs(found.pairs) < 0.02
    assert found.alike == pytest.approx(1 / CLASSES, abs=0.002)
    assert found.classes == pytest.approx(CLASSES * (1 - (1 - 1 / CLASSES) ** BATCH), abs=3)
    full = compare_orders(LABELS, SHARD_START, global_batch=BATCH, choices=[(8, 64)])[-1]
    assert (full.lanes, full.window) == (None, None)
    assert full.quality.classes == pytest.approx(found.classes, abs=3)
    assert full.quality.bits == pytest.approx(found.bits, abs=0.05)


def test_entropy_of_classes() -> None:
    (labels, ids) = np.array([0, 0, 0, 0, 1, 1, 2, 3]), np.arange(8)
    found = measure_quality(labels, [(0.5, ids)])
    assert (found.bits, found.classes, found.alike) == (1.75, 4, 0.75)  # 1/2, 1/4, 1/8, 1/8


def test_more_lanes_and_larger_windows_mix_more() -> None:
    choices = [(1, 64), (8, 64), (64, 64), (8, 1024)]
    one, few, many, wide, full = (row.quality for row in compare_orders(LABELS, SHARD_START, global_batch=BATCH, choices=choices))
    assert one.classes < few.classes < many.classes
    assert few.classes < wide.classes < full.classes
    assert wide.pairs < few.pairs
    assert wide.alike < few.alike
    for found in (one, few, many, wide):
        assert found.displacement == pytest.approx(full.displacement, rel=0.15)


def test_an_order_that_does_not_permute_shards_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: of the figure that `benchmarks.loader.index_at_scale` promises something of."""
    random_labels = np.random.default_rng(0).permutation(LABELS)

    def displacement() -> float:
        order, full = compare_orders(random_labels, SHARD_START, global_batch=BATCH, choices=[(64, 64)])
        return order.quality.displacement / full.quality.displacement

    assert displacement() > 0.95
    monkeypatch.setattr(SampleOrder, "batch", lambda order, epoch, step: np.arange(step * BATCH, (step + 1) * BATCH))
    assert displacement() < 0.05
