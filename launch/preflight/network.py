"""How fast the nodes' network is: an all-reduce over all ranks, and pairs of neighbours, by which a slow node is told from the others.

    measure(Meeting(rank, ranks, firsts, device, address, port), doing)

On GPUs by NCCL, on CPUs by gloo. An all-reduce takes as long on every rank, however fast its own node is; so the nodes, in a ring, also
exchange with one neighbour at a time, and a node's figure is the better of its two.
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

BYTES = {"cuda": 256 << 20, "cpu": 4 << 20}  # of a buffer; a few hundredths of a second on either
TRIES = 3  # of which the quickest counts
TIMEOUT = timedelta(seconds=10)  # less than rank 0 waits: a rank that waited in vain says so, and one that hangs is told from it


@dataclass(frozen=True)
class Meeting:
    """`firsts` are the first rank of each node, which exchange with one another; `port` is free on the host of rank 0."""

    rank: int
    ranks: int
    firsts: Sequence[int]
    device: str
    local_rank: int
    address: str
    port: int


def measure(meeting: Meeting, doing: Callable[[str], None]) -> tuple[float, dict[int, float]]:
    """Seconds of an all-reduce of BYTES and, by the other's rank, of each exchange of BYTES, both ways, that this rank had a part in.
    Collective."""
    doing("joining the others")
    cuda = meeting.device == "cuda"
    if cuda:
        torch.cuda.set_device(meeting.local_rank)
        os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"  # its watchdog would kill all that wait, and who was waited for stays unknown
    store = dist.TCPStore(meeting.address, meeting.port, meeting.ranks, meeting.rank == 0, TIMEOUT)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(backend, store=store, rank=meeting.rank, world_size=meeting.ranks, timeout=TIMEOUT)
    there, back = (torch.ones(BYTES[meeting.device] // 4, device=meeting.device) for _ in range(2))
    doing("waiting in an all-reduce of all ranks")
    reduced = _quickest(lambda: dist.all_reduce(there), cuda)
    exchanged: dict[int, float] = {}
    for pairs in rounds(len(meeting.firsts)):
        # On the host, so that one round's traffic is over before the next one's begins.
        dist.all_reduce(torch.zeros(1))
        for pair in pairs:
            one, other = (meeting.firsts[node] for node in pair)
            if meeting.rank in (one, other):
                peer = one + other - meeting.rank
                doing(f"exchanging with rank {peer}")

                def exchange(peer: int = peer) -> None:
                    sending = [dist.P2POp(dist.isend, there, peer), dist.P2POp(dist.irecv, back, peer)]
                    for work in dist.batch_isend_irecv(sending):
                        work.wait()

                exchanged[peer] = _quickest(exchange, cuda)
    dist.all_reduce(torch.zeros(1))  # rank 0 has the store: it leaves last
    dist.destroy_process_group()
    return reduced, exchanged


def rounds(nodes: int) -> list[list[tuple[int, int]]]:
    """Neighbours in a ring of nodes, each with both of its neighbours once, and in one pair at a time: three rounds for an odd ring."""
    if nodes < 3:
        return [[(0, 1)]] if nodes == 2 else []
    ring = [(node, (node + 1) % nodes) for node in range(nodes)]
    last = [[ring.pop()]] if nodes % 2 else []
    return [ring[::2], ring[1::2], *last]


def _quickest(action: Callable[[], object], cuda: bool) -> float:
    """Seconds; the first try, which sets up connections, doesn't count."""
    times = []
    for _ in range(1 + TRIES):
        began = time.perf_counter()
        action()
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return min(times[1:])
