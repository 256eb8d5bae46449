"""How well the sample order mixes, measured beside a full permutation of all samples.

    rows = compare(labels, shard_start, global_batch=8192, choices=[(64, 2048), (64, 8192)])
    print(*table(rows), sep="\\n")

What matters of a sample's place in the shards is the class that stands there: with shards in the order of classes this is the worst
case, with shards as `python -m data pack` writes them (a hash of the key decides the place) any order is a random one.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from data.loader.order import SampleOrder

_STEPS = 48  # that are looked at, each of another epoch: as many as they have lanes different parts of the dataset


@dataclass(frozen=True)
class Quality:
    """Means over steps.

    displacement: |place in the epoch - place in the shards|, both from 0 to 1; 1/3 for a full permutation. pairs: correlation of the
    places in the shards of the two samples of a pair (slots 2i and 2i + 1, which mixup and cutmix mix); alike: share of pairs of one
    class. classes: distinct ones in a global batch; bits: the entropy of their distribution in it.
    """

    displacement: float
    pairs: float
    alike: float
    classes: float
    bits: float


def quality(labels: np.ndarray, batches: Iterable[tuple[float, np.ndarray]]) -> Quality:
    """Of (place in the epoch, sample ids of a global batch); `labels` are those of all samples, in the order of the shards."""
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
    """An order's lanes and window, or neither for a full permutation, and what was measured of it."""

    lanes: int | None
    window: int | None
    quality: Quality


def compare(
    labels: np.ndarray, shard_start: np.ndarray, *, global_batch: int, choices: Sequence[tuple[int, int]], seed: int = 0
) -> list[Row]:
    """A row for each (lanes, window), and at the end one for a full permutation; all of the same random steps."""
    random = np.random.default_rng(seed)
    orders = [SampleOrder(shard_start, seed=seed, global_batch=global_batch, lanes=lanes, window=window) for lanes, window in choices]
    steps_per_epoch = orders[0].steps_per_epoch
    steps = random.integers(steps_per_epoch, size=_STEPS).tolist()
    places = [(step + 0.5) / steps_per_epoch for step in steps]
    rows = []
    for order in orders:
        batches = (order.batch(epoch, step) for epoch, step in enumerate(steps))
        rows.append(Row(order.lanes, order.window, quality(labels, zip(places, batches, strict=True))))
    drawn = (random.choice(len(labels), global_batch, replace=False) for _ in steps)
    return [*rows, Row(None, None, quality(labels, zip(places, drawn, strict=True)))]


def table(rows: Sequence[Row]) -> list[str]:
    """The rows as lines of text; displacements as shares of the full permutation's, the last row's."""
    full = rows[-1].quality
    lines = ["lanes  window  displacement  pairs: correlation  of one class  classes in a batch  their entropy"]
    for row in rows:
        order = "full permutation" if row.lanes is None else f"{row.lanes:>5}  {row.window:>6}"
        found = row.quality
        lines.append(
            f"{order:<16}{found.displacement / full.displacement:>11.1%}  {found.pairs:>18.2f}  {found.alike:>12.1%}"
            f"  {found.classes:>18.0f}  {found.bits:>8.2f} bits"
        )
    return lines
