"""Blocks that keep their input alone and are computed again in the backward pass (gradient checkpointing), with their BatchNorms."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint


def recomputed(function: Callable[..., Any], norms: Sequence[Any], *arguments: Any) -> Any:
    """`function`, of whose tensors the arguments alone are kept for the backward pass. It trains these BatchNorms."""
    return checkpoint(function, *arguments, use_reentrant=False, context_fn=lambda: (nullcontext(), _RunningStatisticsKept(norms)))


class _RunningStatisticsKept:
    """While entered, these BatchNorms update copies of their running statistics, which are then thrown away.

    One training step must move them once, though checkpointing runs the forward pass twice. The copies stand in for the
    statistics, rather than nothing, because checkpointing demands that both passes save the same tensors. May be entered again
    after it was left.
    """

    def __init__(self, norms: Sequence[nn.Module]) -> None:
        self.norms = norms

    def __enter__(self) -> None:
        self.kept = [(norm, name, buffer) for norm in self.norms for name, buffer in norm.named_buffers()]
        for norm, name, buffer in self.kept:
            setattr(norm, name, buffer.clone())

    def __exit__(self, *exception: object) -> None:
        for norm, name, buffer in self.kept:
            setattr(norm, name, buffer)
