"""Compiles each block of a VAN by torch.compile as one graph, when it first runs.

compile_blocks(model)
restore_reference(model)
"""

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from pretrain.model import van
from pretrain.model.fast.swap import swap_class


class CompilableDropPath(DropPath):
    """Stochastic depth that compares uniform draws: with bernoulli_, torch.compile would compile a block for each rate."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, C, H, W) to (N, C, H, W)."""
        if not self.training:
            return x
        keep = 1 - self.drop_prob
        drawn = (torch.rand(len(x), device=x.device) < keep) / keep
        return x * drawn[:, None, None, None].to(x.dtype)


def compile_blocks(model: nn.Module) -> None:
    """Compiles the blocks of a VAN, with a stochastic depth whose draws differ from the reference's."""
    for module in model.modules():
        if isinstance(module, van.Block):
            module.compile()
        elif isinstance(module, DropPath):
            swap_class(module, CompilableDropPath)


def restore_reference(model: nn.Module) -> None:
    """Undoes `compile_blocks`."""
    for module in model.modules():
        if isinstance(module, van.Block):
            module._compiled_call_impl = None
        elif isinstance(module, CompilableDropPath):
            swap_class(module, DropPath)
