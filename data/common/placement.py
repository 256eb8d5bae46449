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
    """Describes one rank of a job, among `ranks` processes (the world size), of which `ranks_on_node` run on its node.

    `device` receives the rank's batches, of `micro_batch` samples.
    """

    device: torch.device
    micro_batch: int
    rank: int = 0
    ranks: int = 1
    ranks_on_node: int = 1
