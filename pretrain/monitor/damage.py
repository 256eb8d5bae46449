"""Reports faults that concern all ranks: damaged data, of which all ranks draw the same conclusion, and errors that several ranks raise."""

import itertools
import time
from collections.abc import Sequence

import torch.distributed as dist

from data.dataset.check import find_damaged_shards
from data.dataset.index import Index
from data.loader.quarantine import BadSample, Quarantine
from pretrain.engine import distributed
from pretrain.run.metrics import RunLog

NAMED_SHARDS = 5  # in an error
LINGER_S = 2.0  # ranks that fail alike do so within this time


def check_shards(datasets: Sequence[Index], *, checksums: bool) -> None:
    """Checks all shards of the data sets, which the ranks divide among them (data/dataset/check.py). Collective.

    Raises:
        ValueError: some shards are damaged; the same error on all ranks.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for index in datasets:
        faults = _gather_lists(find_damaged_shards(index, range(rank, len(index.shards), ranks), checksums=checksums, quiet=rank > 0))
        if faults:
            more = f" and {len(faults) - NAMED_SHARDS} more" if len(faults) > NAMED_SHARDS else ""
            raise ValueError(
                f"{index.place}: {'; '.join(sorted(faults)[:NAMED_SHARDS])}{more}. "
                "Copy these shards again from where the dataset was packed"
            )


def report_bad_images(quarantine: Quarantine, step: int, log: RunLog) -> None:
    """Shares the bad images of each rank, and writes them to the log and the run's file. Collective; ValueError if there are too many."""
    new = share_bad_images(quarantine)
    if dist.get_rank() == 0:
        quarantine.record(new, step)
    for bad in new:
        log.line(f"bad image: {describe_bad_image(quarantine, bad)}")
    quarantine.check()


def share_bad_images(quarantine: Quarantine) -> list[BadSample]:
    """Shares the bad images that each rank has found; returns those that are new to the job. Collective."""
    return quarantine.merge(_gather_lists(quarantine.take_unreported()))


def describe_bad_image(quarantine: Quarantine, bad: BadSample) -> str:
    """Returns the sample, its fault, and its replacement."""
    replacement = quarantine.find_replacement(bad.sample)
    return f"{bad}; {'skipped' if replacement is None else f'replaced by sample {replacement}'}"


def _gather_lists(values: list) -> list:
    return list(itertools.chain.from_iterable(distributed.all_gather_objects(values)))


def is_first_to_report(message: str) -> bool:
    """Returns whether no other rank has failed with the very same message so far; True before the ranks are connected."""
    if not dist.is_initialized():
        return True
    store = dist.distributed_c10d._get_default_store()
    try:
        count = store.add(message, 1)
        # The store ends with rank 0, so rank 0 waits for the ranks that are about to ask.
        deadline = time.monotonic() + LINGER_S
        while dist.get_rank() == 0 and store.add(message, 0) < dist.get_world_size() and time.monotonic() < deadline:
            time.sleep(0.02)
    except dist.DistError:  # rank 0 ended earlier, with another error
        return True
    return count == 1
