"""Activation checkpointing of models with BatchNorm: updates running statistics once per step.

Activation checkpointing runs the forward pass of its blocks twice, and BatchNorm would update its running statistics in both. timm leaves
that to its users. These hooks work for any model and for both variants of torch.utils.checkpoint.
"""

from typing import Any

import torch
from torch import nn


def update_statistics_once(model: nn.Module) -> None:
    """Makes the BatchNorms of a model update copies of their running statistics while a backward pass recomputes them."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            hook = _KeepStatistics()
            module.register_forward_pre_hook(hook.set_aside)
            # Once the backward pass has all it needs, checkpointing may end the recomputation by an exception inside a forward pass.
            module.register_forward_hook(hook.restore, always_call=True)


class _KeepStatistics:
    """Replaces the buffers of one BatchNorm by copies during a recomputed forward pass.

    Copies rather than None: checkpointing requires that both passes save the same tensors.
    """

    def __init__(self) -> None:
        self.buffers: dict[str, torch.Tensor | None] = {}

    def set_aside(self, module: nn.Module, _inputs: Any) -> None:
        if torch._C._current_graph_task_id() != -1:  # inside a backward pass
            self.buffers = dict(module._buffers)
            for name, buffer in self.buffers.items():
                module._buffers[name] = None if buffer is None else buffer.clone()

    def restore(self, module: nn.Module, _inputs: Any, _output: Any) -> None:
        module._buffers.update(self.buffers)
        self.buffers = {}
