"""Describes a rank: its number, its device and its micro-batch size.

A `Placement` tells a data loader which part of a global batch to load. A single process needs only the first two values:

    Placement(torch.device("cpu"), micro_batch=64)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a slow import
    import torch


@dataclass(frozen=True)
class Placement:
    """One rank of a job with `ranks` processes (the world size), of which `ranks_on_node` run on the rank's node.

    `device` receives the rank's batches, of `micro_batch` samples.
    """

    device: torch.device
    micro_batch: int
    rank: int = 0
    ranks: int = 1
    ranks_on_node: int = 1
