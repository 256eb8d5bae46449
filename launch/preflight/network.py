"""Times the network: an all-reduce over all ranks, and exchanges between neighboring nodes, which show a slow node.

Every rank calls `time_network`, which uses NCCL on GPUs and gloo on CPUs.

An all-reduce takes equally long on every rank, whichever node is slow. Therefore the nodes form a ring, and the first rank of each node
exchanges data with one neighbor at a time. The faster of a node's two exchanges counts: only a slow node has two slow exchanges.
"""

import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

BYTES = {"cuda": 256 << 20, "cpu": 4 << 20}  # of a buffer; takes a few hundredths of a second on either
TRIES = 3  # of which the fastest counts
TIMEOUT_S = 10  # of a collective; less than PATIENCE_S of a preflight step, so that a rank that waits for another reports it


def time_network(device: str, join_s: float, report_progress: Callable[..., None]) -> dict[str, Any]:
    """Times this rank's part of the network. Collective.

    Args:
        device: engine.device; "auto" uses GPUs if torch sees any.
        join_s: seconds for all ranks to join.
        report_progress: called before each operation that can hang, with a phrase and, if not the default, the seconds it may take.

    Returns:
        `bytes`: the size of a buffer; `all_reduce_s`: seconds of an all-reduce over all ranks; `exchange_s`: (rank of the peer, seconds)
        for each exchange of a buffer in both directions.
    """
    kind = "cuda" if device == "cuda" or (device == "auto" and torch.cuda.is_available()) else "cpu"
    rank, ranks, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    report_progress("waiting for all ranks to join", join_s + TIMEOUT_S)
    if kind == "cuda":
        torch.cuda.set_device(local_rank)
        os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"  # NCCL's watchdog would end all waiting ranks and so hide the cause
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), ranks, rank == 0, timedelta(seconds=join_s))
    backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=TIMEOUT_S))
    report_progress("all-reducing over all ranks")
    outgoing, incoming = (torch.ones(BYTES[kind] // 4, device=kind) for _ in range(2))
    all_reduce_s = _fastest(lambda: dist.all_reduce(outgoing), kind)
    local_ranks = [torch.zeros(1, dtype=torch.int64) for _ in range(ranks)]
    dist.all_gather(local_ranks, torch.tensor([local_rank]))
    first_ranks = [other for other in range(ranks) if local_ranks[other] == 0]
    exchange_s: list[tuple[int, float]] = []
    for pairs in ring_rounds(len(first_ranks)):
        dist.all_reduce(torch.zeros(1))  # on the host: separates the rounds
        for pair in pairs:
            one, other = (first_ranks[node] for node in pair)
            if rank in (one, other):
                peer = one + other - rank
                report_progress(f"exchanging data with rank {peer}")
                exchange_s.append((peer, _fastest(lambda peer=peer: _exchange(outgoing, incoming, peer), kind)))  # type: ignore[misc]
    dist.all_reduce(torch.zeros(1))  # rank 0 has the store and must be the last to leave
    dist.destroy_process_group()
    return {"bytes": BYTES[kind], "all_reduce_s": all_reduce_s, "exchange_s": exchange_s}


def ring_rounds(nodes: int) -> list[list[tuple[int, int]]]:
    """Returns rounds of pairs of neighbors in a ring of nodes; each node is in at most one pair of a round."""
    if nodes < 3:
        return [[(0, 1)]] if nodes == 2 else []
    ring = [(node, (node + 1) % nodes) for node in range(nodes)]
    last = [[ring.pop()]] if nodes % 2 else []
    return [ring[::2], ring[1::2], *last]


def _exchange(outgoing: torch.Tensor, incoming: torch.Tensor, peer: int) -> None:
    for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, outgoing, peer), dist.P2POp(dist.irecv, incoming, peer)]):
        work.wait()


def _fastest(action: Callable[[], object], kind: str) -> float:
    """Returns the seconds of the fastest try, after one more that sets up connections."""
    times = []
    for _ in range(1 + TRIES):
        began = time.perf_counter()
        action()
        if kind == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return min(times[1:])
