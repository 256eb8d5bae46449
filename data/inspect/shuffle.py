"""Measures how well the sample order mixes a dataset, compared with a full permutation.

    rows = compare_orders(labels, shard_start, global_batch=8192, choices=[(64, 2048), (64, 8192)])
    print(*format_table(rows), sep="\\n")

The measures depend on the classes along the shards. Shards sorted by class are the worst case. In shards that `python -m data pack`
writes, a hash of the key decides a sample's place, so any order of them is random.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from data.loader.order import SampleOrder

_STEPS = 48  # measured steps, each of another epoch: so each lane is seen in as many ranges of the dataset


@dataclass(frozen=True)
class Quality:
    """Means over steps.

    Attributes:
        displacement: |place in the epoch - place in the shards|, with places from 0 to 1; 1/3 for a full permutation.
        pairs: correlation of the places in the shards of the samples in slots 2i and 2i + 1, which mixup and cutmix mix.
        alike: share of these pairs whose samples have the same class.
        classes: distinct classes in a global batch.
        bits: entropy of the classes in a global batch.
    """

    displacement: float
    pairs: float
    alike: float
    classes: float
    bits: float


def measure_quality(labels: np.ndarray, batches: Iterable[tuple[float, np.ndarray]]) -> Quality:
    """Measures global batches, each given as its place in the epoch, 0 to 1, and its sample ids; `labels` are in shard order."""
    displacement, alike, classes, bits, pairs = [], [], [], [], []
    for place, ids in batches:
        displacement.append(np.abs(ids / len(labels) - place).mean())
        pairs.append(ids.reshape(-1, 2))
        alike.append((labels[pairs[-1][:, 0]] == labels[pairs[-1][:, 1]]).mean())
        share = np.unique(labels[ids], return_counts=True)[1] / len(ids)
        classes.append(len(share))
        bits.append(-(share * np.log2(share)).sum())
    correlation = np.corrcoef(np.concatenate(pairs), rowvar=False)[0, 1]
    return Quality(*(float(np.mean(values)) for values in (displacement, correlation, alike, classes, bits)))


@dataclass(frozen=True)
class Row:
    """The quality of an order with these lanes and this window, or, with None for both, of a full permutation."""

    lanes: int | None
    window: int | None
    quality: Quality


def compare_orders(
    labels: np.ndarray, shard_start: np.ndarray, *, global_batch: int, choices: Sequence[tuple[int, int]], seed: int = 0
) -> list[Row]:
    """Measures sample orders on the same random steps.

    Args:
        labels: of all samples, in shard order.
        shard_start: int64 (shards + 1,), of the index.
        global_batch: samples per step.
        choices: the (lanes, window) of each order.
        seed: of the orders and of the steps.

    Returns:
        One row per choice, then one for a full permutation.
    """
    random = np.random.default_rng(seed)
    orders = [SampleOrder(shard_start, seed=seed, global_batch=global_batch, lanes=lanes, window=window) for lanes, window in choices]
    steps_per_epoch = orders[0].steps_per_epoch
    steps = random.integers(steps_per_epoch, size=_STEPS).tolist()
    places = [(step + 0.5) / steps_per_epoch for step in steps]
    rows = []
    for order in orders:
        batches = (order.batch(epoch, step) for epoch, step in enumerate(steps))
        rows.append(Row(order.lanes, order.window, measure_quality(labels, zip(places, batches, strict=True))))
    drawn = (random.choice(len(labels), global_batch, replace=False) for _ in steps)
    return [*rows, Row(None, None, measure_quality(labels, zip(places, drawn, strict=True)))]


def format_table(rows: Sequence[Row]) -> list[str]:
    """Formats the rows as lines of text; displacements are shares of the full permutation's, the last row's."""
    full = rows[-1].quality
    lines = ["lanes  window  displacement  pairs: correlation  of one class  classes in a batch  their entropy"]
    for row in rows:
        order = "full permutation" if row.lanes is None else f"{row.lanes:>5}  {row.window:>6}"
        quality = row.quality
        lines.append(
            f"{order:<16}{quality.displacement / full.displacement:>11.1%}  {quality.pairs:>18.2f}  {quality.alike:>12.1%}"
            f"  {quality.classes:>18.0f}  {quality.bits:>8.2f} bits"
        )
    return lines
