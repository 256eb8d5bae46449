"""The end of a residual branch as one operator: layer scale, stochastic depth and the residual add.

    y = scaled_residual(x, branch, shortcut, scale, keep)        # x + keep * scale * (branch + shortcut)

PyTorch runs an operator for each of these, which reads and writes whole maps. The sum is fp32, as the layer scale is. The backward pass
also sums the branch's gradient for the bias of the branch's last convolution, which saves another pass over the map.
"""

from typing import Any

import torch
from torch import Tensor

from pretrain.model.fast.triton.depthwise import channels_last, multiprocessors
from pretrain.model.fast.triton.residual_device import residual_backward_kernel, residual_kernel
from pretrain.model.fast.triton.tiling import CHANNELS, WARPS, tiles

PIXELS = 32  # in a tile: with CHANNELS, eight values per thread, as in the convolutions
TILE = {"PIXELS": PIXELS, "CHANNELS": CHANNELS, "num_warps": WARPS}
PROGRAMS_PER_MULTIPROCESSOR = 8


def scaled_residual(x: Tensor, branch: Tensor, shortcut: Tensor | None, scale: Tensor, keep: Tensor | None, branch_bias: Tensor) -> Tensor:
    """Returns x + keep * scale * (branch + shortcut), in the type that PyTorch's promotion gives the sum.

    Args:
        x, branch, shortcut: (N, C, H, W); copied unless they are channels-last. `shortcut` may be None.
        scale: (C,), the layer scale.
        keep: (N,) in fp32: 0 for a dropped sample, 1 / (1 - drop path rate) for the others; None keeps all samples unscaled.
        branch_bias: (C,), already added to `branch` outside of autograd. Its gradient is computed here.
    """
    return _operator(x, branch, shortcut, scale, keep, branch_bias)


def divide_map(x: Tensor) -> tuple[tuple[int], int, int, int]:
    """Divides a map into runs of pixels and tiles of channels; returns the launch grid, runs, pixels and pixels per run.

    A program processes a run and a tile of channels; there are as many programs as fit on the GPU at once. So the order of summation
    depends only on the shape and the GPU model.
    """
    pixels, channel_tiles = x.numel() // x.shape[1], tiles(x.shape[1], CHANNELS)
    most_runs = max(1, min(PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(x.device) // channel_tiles, tiles(pixels, PIXELS)))
    per_run = tiles(tiles(pixels, most_runs), PIXELS) * PIXELS
    runs = tiles(pixels, per_run)
    return (runs * channel_tiles,), runs, pixels, per_run


@torch.library.custom_op("van::scaled_residual", mutates_args=())
def _operator(x: Tensor, branch: Tensor, shortcut: Tensor | None, scale: Tensor, keep: Tensor | None, branch_bias: Tensor) -> Tensor:
    x, branch, shortcut = channels_last(x), channels_last(branch), None if shortcut is None else channels_last(shortcut)
    y = _sum_like(x, branch, scale)
    grid, _, pixels, per_run = divide_map(x)
    residual_kernel[grid](x, branch, shortcut, scale, keep, y, pixels, per_run, pixels // len(x), x.shape[1], **TILE)
    return y


@torch.library.custom_op("van::scaled_residual_backward", mutates_args=())
def _backward_operator(grad: Tensor, branch: Tensor, shortcut: Tensor | None, scale: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns the gradient of `branch`, and (2, C) in fp32: the gradients of `scale` and `branch_bias`."""
    grad, branch, shortcut = channels_last(grad), channels_last(branch), None if shortcut is None else channels_last(shortcut)
    grid, runs, pixels, per_run = divide_map(branch)
    channels = branch.shape[1]
    branch_grad, partial = torch.empty_like(branch), torch.empty(runs, 2, channels, device=grad.device)
    residual_backward_kernel[grid](
        grad, branch, shortcut, scale, keep, branch_grad, partial, pixels, per_run, pixels // len(branch), channels, **TILE
    )
    return branch_grad, partial.sum(0)


def _sum_like(x: Tensor, branch: Tensor, scale: Tensor) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.promote_types(branch.dtype, scale.dtype))
    return torch.empty_like(x, dtype=dtype, memory_format=torch.channels_last)


@_operator.register_fake
def _(x: Tensor, branch: Tensor, shortcut: Tensor | None, scale: Tensor, keep: Tensor | None, branch_bias: Tensor) -> Tensor:
    return _sum_like(x, branch, scale)


@_backward_operator.register_fake
def _(grad: Tensor, branch: Tensor, shortcut: Tensor | None, scale: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    return torch.empty_like(branch, memory_format=torch.channels_last), torch.empty(2, len(scale), device=scale.device)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, *others, branch_bias = inputs
    ctx.x_dtype, ctx.bias_dtype = x.dtype, branch_bias.dtype
    ctx.save_for_backward(*others)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    branch, shortcut, scale, keep = ctx.saved_tensors
    branch_grad, (scale_grad, bias_grad) = _backward_operator(grad, branch, shortcut, scale, keep)
    shortcut_grad = None if shortcut is None else branch_grad.to(shortcut.dtype)
    return grad.to(ctx.x_dtype), branch_grad, shortcut_grad, scale_grad.to(scale.dtype), None, bias_grad.to(ctx.bias_dtype)


_operator.register_autograd(_gradients, setup_context=_setup_context)
