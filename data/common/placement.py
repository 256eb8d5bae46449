"""Where one rank stands in its job: its number, its device, and how many samples it takes at once.

Data loaders take a `Placement` to know which part of a global batch is theirs. A process that is alone needs only the first two values:

    Placement(torch.device("cpu"), micro_batch=64)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # settings and storage import this package, and start without torch
    import torch


@dataclass(frozen=True)
class Placement:
    """Describes one rank of a job.

    Args:
        device: receives this rank's batches.
        micro_batch: samples that a rank takes through the network at once.
        rank: number of this process in the job, from 0.
        ranks: processes in the job (the world size).
        ranks_on_node: processes of the job on this rank's node.
    """

    device: torch.device
    micro_batch: int
    rank: int = 0
    ranks: int = 1
    ranks_on_node: int = 1
