"""Reports faults that concern all ranks: damaged data, on which all ranks must agree, and errors that several ranks raise."""

import itertools
import time
from collections.abc import Sequence

import torch.distributed as dist

from data.dataset.check import find_damaged_shards
from data.dataset.index import Index
from data.loader.quarantine import BadSample, Quarantine
from pretrain.engine import distributed
from pretrain.run.log import RunLog

NAMED_SHARDS = 5  # in an error
LINGER_S = 2.0  # ranks with the same fault fail within this time


def check_shards(datasets: Sequence[Index], *, checksums: bool) -> None:
    """Checks all shards of the data sets, divided among the ranks (data/dataset/check.py). Collective.

    Raises:
        ValueError: shards are damaged; the same error on all ranks.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for index in datasets:
        faults = _gather_lists(find_damaged_shards(index, range(rank, len(index.shards), ranks), checksums=checksums, quiet=rank > 0))
        if faults:
            more = f" and {len(faults) - NAMED_SHARDS} more" if len(faults) > NAMED_SHARDS else ""
            raise ValueError(
                f"{index.place}: {'; '.join(sorted(faults)[:NAMED_SHARDS])}{more}. Copy these shards again from the original dataset"
            )


def report_bad_images(quarantine: Quarantine, step: int, log: RunLog) -> None:
    """Shares new bad images between ranks, writes them to the log and the run's file; ValueError if there are too many. Collective."""
    new = share_bad_images(quarantine)
    if dist.get_rank() == 0:
        quarantine.record(new, step)
    for bad in new:
        log.line(f"bad image: {describe_bad_image(quarantine, bad)}")
    quarantine.check()


def share_bad_images(quarantine: Quarantine) -> list[BadSample]:
    """Shares the bad images of each rank; returns those that are new to the job. Collective."""
    return quarantine.merge(_gather_lists(quarantine.take_unreported()))


def describe_bad_image(quarantine: Quarantine, bad: BadSample) -> str:
    """Returns a phrase with the sample, its fault and its replacement."""
    replacement = quarantine.find_replacement(bad.sample)
    return f"{bad}; {'skipped' if replacement is None else f'replaced by sample {replacement}'}"


def _gather_lists(values: list) -> list:
    return list(itertools.chain.from_iterable(distributed.all_gather_objects(values)))


def is_first_to_report(message: str) -> bool:
    """Returns whether this rank is the first to fail with this message; True before the ranks are connected."""
    if not dist.is_initialized():
        return True
    store = dist.distributed_c10d._get_default_store()
    try:
        count = store.add(message, 1)
        # The store ends with rank 0, so rank 0 waits for the ranks that are about to call this.
        deadline = time.monotonic() + LINGER_S
        while dist.get_rank() == 0 and store.add(message, 0) < dist.get_world_size() and time.monotonic() < deadline:
            time.sleep(0.02)
    except dist.DistError:  # rank 0 ended earlier, with another error
        return True
    return count == 1
