import numpy as np
import pytest

from benchmarks.loader.shuffle import compare, quality, rows
from data.loader.order import SampleOrder

SAMPLES, CLASSES, BATCH = 40_000, 400, 256
LABELS = np.arange(SAMPLES) * CLASSES // SAMPLES
SHARD_START = np.arange(0, SAMPLES + 1, 200)


def test_no_shuffling() -> None:
    starts = range(0, SAMPLES - BATCH, BATCH)
    measured = quality(LABELS, (((first + BATCH / 2) / SAMPLES, np.arange(first, first + BATCH)) for first in starts))
    assert measured.displacement < 0.002
    assert measured.pair_correlation > 0.999
    assert measured.pairs_of_one_class == 1
    assert measured.classes < 4


def test_full_permutation() -> None:
    ids = np.random.default_rng(0).permutation(SAMPLES)[: SAMPLES // BATCH * BATCH].reshape(-1, BATCH)
    measured = quality(LABELS, (((step + 0.5) / len(ids), batch) for step, batch in enumerate(ids)))
    assert measured.displacement == pytest.approx(1 / 3, abs=0.005)
    assert abs(measured.pair_correlation) < 0.02
    assert measured.pairs_of_one_class == pytest.approx(1 / CLASSES, abs=0.002)
    assert measured.classes == pytest.approx(CLASSES * (1 - (1 - 1 / CLASSES) ** BATCH), abs=3)
    full = compare(LABELS, SHARD_START, global_batch=BATCH, choices=[(8, 64)])["full permutation"]
    assert full.classes == pytest.approx(measured.classes, abs=3)
    assert full.entropy_bits == pytest.approx(measured.entropy_bits, abs=0.05)


def test_entropy_of_classes() -> None:
    labels, ids = np.array([0, 0, 0, 0, 1, 1, 2, 3]), np.arange(8)
    measured = quality(labels, [(0.5, ids)])
    assert (measured.entropy_bits, measured.classes, measured.pairs_of_one_class) == (1.75, 4, 0.75)  # 1/2, 1/4, 1/8, 1/8


def test_more_lanes_and_larger_windows_mix_more() -> None:
    choices = [(1, 64), (8, 64), (64, 64), (8, 1024)]
    measured = compare(LABELS, SHARD_START, global_batch=BATCH, choices=choices)
    one, few, many, wide, full = measured.values()
    assert one.classes < few.classes < many.classes
    assert few.classes < wide.classes < full.classes
    assert wide.pair_correlation < few.pair_correlation
    assert wide.pairs_of_one_class < few.pairs_of_one_class
    assert [row["order"] for row in rows(measured)][1::3] == ["8 lanes, windows of 64", "full permutation"]
    assert all(row["displacement"] == pytest.approx(1, rel=0.15) for row in rows(measured))


def test_displacement_of_unpermuted_shards_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the displacement's limit in index_at_scale."""
    random_labels = np.random.default_rng(0).permutation(LABELS)

    def displacement() -> float:
        return rows(compare(random_labels, SHARD_START, global_batch=BATCH, choices=[(64, 64)]))[0]["displacement"]

    assert displacement() > 0.95
    monkeypatch.setattr(SampleOrder, "batch", lambda order, epoch, step: np.arange(step * BATCH, (step + 1) * BATCH))
    assert displacement() < 0.05
