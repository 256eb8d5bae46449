"""Errors that several ranks of a job raise alike: one rank reports each of them."""

import time

import torch.distributed as dist

LINGER_S = 2.0  # ranks that fail alike do so within this time


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
