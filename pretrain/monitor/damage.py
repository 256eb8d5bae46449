"""Damaged data, as the ranks of a job find it: what one has found all are told, and all draw the same conclusion."""

from collections.abc import Sequence
from itertools import chain

import torch.distributed as dist

from data.dataset.check import find_damaged_shards
from data.dataset.index import Index
from data.loader.quarantine import BadSample, Quarantine
from pretrain.engine.distributed import all_gather_objects
from pretrain.run.metrics import RunLog

_NAMED = 5


def check_shards(datasets: Sequence[Index], *, checksums: bool) -> None:
    """Looks at all shards, which the ranks share out among them (data/dataset/check.py). Collective.

    Raises ValueError, the same on all ranks, naming the damaged ones.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for index in datasets:
        faults = _gather(find_damaged_shards(index, range(rank, len(index.shards), ranks), checksums=checksums, quiet=rank > 0))
        if faults:
            more = f" and {len(faults) - _NAMED} more" if len(faults) > _NAMED else ""
            raise ValueError(
                f"{index.place}: {'; '.join(sorted(faults)[:_NAMED])}{more}. Copy these shards again from where the dataset was packed"
            )


def tell_all(quarantine: Quarantine, step: int, log: RunLog) -> None:
    """Tells all ranks, the log and the run's file of the bad images that each rank has found. Collective.

    Raises ValueError, the same on all ranks, when there are too many.
    """
    new = share(quarantine)
    if dist.get_rank() == 0:
        quarantine.record(new, step)
    for bad in new:
        log.line(f"bad image: {describe(quarantine, bad)}")
    quarantine.check()


def share(quarantine: Quarantine) -> list[BadSample]:
    """Tells all ranks of the bad images that each has found; returns what is new. Collective."""
    return quarantine.merge(_gather(quarantine.take_unreported()))


def describe(quarantine: Quarantine, bad: BadSample) -> str:
    other = quarantine.find_replacement(bad.sample)
    return f"{bad}; {'left out' if other is None else f'sample {other} takes its place'}"


def _gather(values: list) -> list:
    """Returns the values of all ranks in one list, in rank order. Collective."""
    return list(chain.from_iterable(all_gather_objects(values)))
