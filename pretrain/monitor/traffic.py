"""Counts the bytes that a training step sends between ranks, by collective, from the model's shapes.

The bytes are those of bandwidth-optimal algorithms, such as a ring: every other rank's part of the tensors, once for an all-gather or a
reduce-scatter, twice for an all-reduce (Patarasuk and Yuan, J. Parallel Distrib. Comput. 69, 2009). DeepSpeed 0.19.8 averages gradients by
all-reduce in stages 0 to 2, in stage 2 in every micro-step. Stage 3 gathers weights once in every micro-step. Stop and save requests,
log lines and SyncBatchNorm are not counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

FP32 = 4  # bytes of a weight, a gradient and a statistic
PASSES = {"all-reduce": 2, "all-gather": 1, "reduce-scatter": 1}


@dataclass(frozen=True)
class Collective:
    """Describes one kind of collective in a step. `bytes` is the size of the whole tensors, summed over all calls in the step."""

    content: Literal["gradients", "weights", "statistics", "norm"]
    kind: Literal["all-reduce", "all-gather", "reduce-scatter"]
    bytes: int

    def sent(self, ranks: int) -> float:
        """Returns the bytes that each rank sends, and receives."""
        return PASSES[self.kind] * self.bytes * (ranks - 1) / ranks


def list_collectives(parameters: Sequence[int], channels: int, *, stage: int, accumulation: int) -> list[Collective]:
    """Returns the collectives of one optimizer step, without padding.

    Args:
        parameters: elements of each of the model's parameters.
        channels: of all BatchNorms together.
        stage: of ZeRO, 0 to 3.
        accumulation: micro-batches a step.
    """
    total = FP32 * sum(parameters)
    gradients = Collective("gradients", "reduce-scatter" if stage == 3 else "all-reduce", (accumulation if stage >= 2 else 1) * total)
    weights = Collective("weights", "all-gather", (accumulation if stage == 3 else 1) * total)
    sharded = [weights, Collective("norm", "all-reduce", FP32)] if stage else []
    return [gradients, *sharded, Collective("statistics", "all-reduce", 2 * FP32 * channels)]
