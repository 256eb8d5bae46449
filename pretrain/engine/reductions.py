"""Averages gradients over all ranks, in buckets and during the backward pass, in ZeRO stages 0 and 1.

DeepSpeed runs about a hundred lines of Python per parameter in a backward pass, and VAN-B6 has 2,402 parameters. Here the host updates one
counter per parameter: a step of VAN-B3 takes 238 ms of host time instead of 378 ms (docs/performance.md). In stages 2 and 3, which
partition gradients, DeepSpeed reduces them.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.engine import deepspeed_compat


class Reductions:
    """Reduces an engine's gradients during the last backward pass of each step, instead of DeepSpeed.

    Buckets of at most `size` elements are filled in the reverse order of the model's parameters. Every rank reduces the buckets in this
    order in every step, whichever is ready first, so a resumed run adds the same numbers in the same order. `engine` has stage 0 or 1.
    """

    def __init__(self, engine: Any, size: int):
        from deepspeed.accelerator import get_accelerator

        self.engine, self.accelerator = engine, get_accelerator()
        self.stream = None if self.accelerator.is_synchronized_device() else self.accelerator.Stream()
        self.buckets = fill_buckets(list(engine.module.parameters()), size)
        needed = {id(parameter) for parameter in deepspeed_compat.list_updated_parameters(engine)}
        # By bucket, the positions of the parameters whose mean gradients this rank needs.
        self.needed = [[index for index, parameter in enumerate(bucket) if id(parameter) in needed] for bucket in self.buckets]
        self.bucket_of = {id(parameter): number for number, bucket in enumerate(self.buckets) for parameter in bucket}
        self._begin_step()
        for parameter in engine.module.parameters():
            parameter.register_post_accumulate_grad_hook(self.mark_ready)
        deepspeed_compat.replace_reduction(engine, self._finish)

    def _begin_step(self) -> None:
        self.missing, self.next = [len(bucket) for bucket in self.buckets], 0

    def mark_ready(self, *parameters: Tensor) -> None:
        """Counts parameters whose gradients are complete, and reduces the buckets that are complete.

        Autograd calls this for each parameter. The replay of a CUDA graph, which autograd does not see, calls it with all its parameters.
        """
        if self.engine.is_gradient_accumulation_boundary():
            for parameter in parameters:
                self.missing[self.bucket_of[id(parameter)]] -= 1
            while self.next < len(self.buckets) and not self.missing[self.next]:
                self._reduce(self.next)
                self.next += 1

    def _reduce(self, number: int) -> None:
        gradients = [parameter.grad.view(-1) for parameter in self.buckets[number] if parameter.grad is not None]
        if self.stream is not None:
            self.stream.wait_stream(self.accelerator.current_stream())
        with self.accelerator.stream(self.stream):
            flat = torch.cat(gradients)
            flat.div_(dist.get_world_size())
            dist.all_reduce(flat)
            means = flat.split([gradient.numel() for gradient in gradients])
            if self.needed[number]:
                torch._foreach_copy_([gradients[index] for index in self.needed[number]], [means[index] for index in self.needed[number]])

    def _finish(self) -> None:
        if not self.engine.is_gradient_accumulation_boundary():
            return
        if any(self.missing):
            unused = [name for name, parameter in self.engine.module.named_parameters() if parameter.grad is None]
            raise RuntimeError(
                f"{sum(self.missing)} parameters got no gradient in a step's last backward pass: each must have a part in the loss, once. "
                f"Parameters without a gradient: {', '.join(unused) or 'none'}"
            )
        self._begin_step()
        if self.stream is not None:
            self.accelerator.current_stream().wait_stream(self.stream)
        deepspeed_compat.partition_gradients(self.engine)


def fill_buckets(parameters: Sequence[Tensor], size: int) -> list[list[Tensor]]:
    """Groups the parameters, last first, into buckets of at most `size` elements; a larger parameter has its own bucket."""
    buckets: list[list[Tensor]] = []
    room = 0
    for parameter in reversed(parameters):
        if parameter.numel() > room:
            buckets.append([])
            room = size
        buckets[-1].append(parameter)
        room -= parameter.numel()
    return buckets
