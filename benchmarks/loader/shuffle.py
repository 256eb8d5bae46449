"""Mixing quality of the sample order, beside a full permutation of all samples.

    rows = compare(labels, shard_start, global_batch=8192, choices=[(64, 2048), (64, 8192)])

The class of a sample's place in the shards is what matters. Shards in the order of classes are the worst case; in shards as `python -m data
pack` writes them (a hash of the key decides the place) every order is random.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from data.loader.order import SampleOrder

_STEPS = 48  # each of another epoch


@dataclass(frozen=True)
class Quality:
    """Means over steps.

    Attributes:
        displacement: |place in the epoch - place in the shards|, both from 0 to 1; 1/3 for a full permutation.
        pair_correlation: of the places in the shards of the samples in slots 2i and 2i + 1, which mixup and cutmix mix.
        pairs_of_one_class: share of these pairs.
        classes: distinct classes in a global batch.
        entropy_bits: entropy of the distribution of classes in a global batch.
    """

    displacement: float
    pair_correlation: float
    pairs_of_one_class: float
    classes: float
    entropy_bits: float


def quality(labels: np.ndarray, batches: Iterable[tuple[float, np.ndarray]]) -> Quality:
    """Returns the quality of an order.

    Args:
        labels: of all samples (N,), in the order of the shards.
        batches: (place in the epoch from 0 to 1, sample ids of a global batch).
    """
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


def compare(
    labels: np.ndarray, shard_start: np.ndarray, *, global_batch: int, choices: Sequence[tuple[int, int]], seed: int = 0
) -> dict[str, Quality]:
    """Measures several orders and a full permutation on the same random steps.

    Args:
        labels: of all samples (N,), in the order of the shards.
        shard_start: first sample of each shard, and N at the end.
        global_batch: samples per step.
        choices: lanes and window of each order.
        seed: of the orders and steps.

    Returns:
        Quality by the name of the order; the full permutation is the last.
    """
    random = np.random.default_rng(seed)
    orders = [SampleOrder(shard_start, seed=seed, global_batch=global_batch, lanes=lanes, window=window) for lanes, window in choices]
    steps_per_epoch = orders[0].steps_per_epoch
    steps = random.integers(steps_per_epoch, size=_STEPS).tolist()
    places = [(step + 0.5) / steps_per_epoch for step in steps]
    measured = {}
    for order in orders:
        batches = (order.batch(epoch, step) for epoch, step in enumerate(steps))
        measured[f"{order.lanes} lanes, windows of {order.window}"] = quality(labels, zip(places, batches, strict=True))
    drawn = (random.choice(len(labels), global_batch, replace=False) for _ in steps)
    return measured | {"full permutation": quality(labels, zip(places, drawn, strict=True))}


def rows(measured: dict[str, Quality]) -> list[dict[str, Any]]:
    """Returns a row for each order, with displacements relative to the full permutation's."""
    full = measured["full permutation"].displacement
    return [{"order": order, **asdict(one), "displacement": one.displacement / full} for order, one in measured.items()]
