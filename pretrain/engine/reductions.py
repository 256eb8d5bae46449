"""The mean of the gradients over all ranks, bucket by bucket beside the backward pass, in ZeRO stages 0 and 1.

DeepSpeed runs some hundred lines of Python for each parameter of a backward pass: VAN-B3 has 862 and B6 2,402. Here a parameter costs
the host a count, and a bucket some operators (`python -m benchmarks.training.host`). In stages 2 and 3, which partition gradients, and with
offload, DeepSpeed reduces.

What DeepSpeed does with its own reductions was read in 0.19.8: runtime/engine.py (allreduce_gradients), runtime/zero/stage_1_and_2.py
(reduce_gradients, independent_gradient_partition_epilogue). Check again when its version moves.
"""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Reductions:
    """Of one engine's gradients, in a step's last backward pass; takes the place of DeepSpeed's own.

    Buckets are filled in the reverse of the model's order, and reduced in this one on every rank and in every step, whatever is ready
    first: so a run that goes on adds the same numbers in the same order.

    Args:
        size: elements that are reduced together, at most; a larger parameter is reduced by itself.
    """

    def __init__(self, engine: Any, size: int):
        from deepspeed.accelerator import get_accelerator

        self.engine, self.accelerator = engine, get_accelerator()
        self.stream = None if self.accelerator.is_synchronized_device() else self.accelerator.Stream()
        self.buckets = in_buckets(list(engine.module.parameters()), size)
        partitioned = engine.zero_optimization_stage() == 1
        own = set(map(id, chain(*engine.optimizer.params_in_partition) if partitioned else engine.module.parameters()))
        # Positions in each bucket whose means this rank needs.
        self.own = [[place for place, parameter in enumerate(bucket) if id(parameter) in own] for bucket in self.buckets]
        self._begin()
        self.number = {id(parameter): number for number, bucket in enumerate(self.buckets) for parameter in bucket}
        for parameter in engine.module.parameters():
            parameter.register_post_accumulate_grad_hook(self.ready)
        engine.allreduce_gradients = self._finish  # DeepSpeed calls it behind every backward pass

    def _begin(self) -> None:
        self.missing, self.next = [len(bucket) for bucket in self.buckets], 0

    def ready(self, *parameters: Tensor) -> None:
        """A backward pass has added to these parameters' gradients. Called by autograd for each, and for all of a graph, into which
        autograd does not see."""
        if self.engine.is_gradient_accumulation_boundary():
            for parameter in parameters:
                self.missing[self.number[id(parameter)]] -= 1
            while self.next < len(self.buckets) and not self.missing[self.next]:
                self._reduce(self.next)
                self.next += 1

    def _reduce(self, number: int) -> None:
        gradients = [parameter.grad.view(-1) for parameter in self.buckets[number] if parameter.grad is not None]
        if self.stream is not None:
            self.stream.wait_stream(self.accelerator.current_stream())
        with self.accelerator.stream(self.stream):
            together = torch.cat(gradients)
            together.div_(dist.get_world_size())
            dist.all_reduce(together)
            means = together.split([gradient.numel() for gradient in gradients])
            if self.own[number]:
                torch._foreach_copy_([gradients[place] for place in self.own[number]], [means[place] for place in self.own[number]])

    def _finish(self) -> None:
        if not self.engine.is_gradient_accumulation_boundary():
            return
        if any(self.missing):
            raise RuntimeError(
                f"{sum(self.missing)} parameters got no gradient in a step's last backward pass: each must have a part in the loss, once"
            )
        self._begin()
        if self.stream is not None:
            self.accelerator.current_stream().wait_stream(self.stream)
        if self.engine.zero_optimization_stage() == 1:
            self.engine.optimizer.set_gradient_accumulation_boundary(True)
            self.engine.optimizer.overlapping_partition_gradients_reduce_epilogue()  # takes this rank's part of them


def in_buckets(parameters: Sequence[Tensor], size: int) -> list[list[Tensor]]:
    """The parameters from the last to the first, in lists of at most `size` elements, or of one parameter."""
    buckets: list[list[Tensor]] = []
    room = 0
    for parameter in reversed(parameters):
        if parameter.numel() > room:
            buckets.append([])
            room = size
        buckets[-1].append(parameter)
        room -= parameter.numel()
    return buckets
