"""The end of a block's branch in one pass: x + keep * scale * branch, for layer scale, stochastic depth and shortcut.

The scale is fp32, so PyTorch's product and all that follows it are, each written out and read again. Bytes of traffic for a value:

                                                                 forward        backward
    MLP, whose branch is bf16                                    26, here 10    36, here 8
    attention, whose branch is fp32 (its own shortcut is)        28, here 12    32, here 12

44 and 36 bytes saved. A VAN-B3 has 2.87 M values of each an image of 224 px: 230 MB.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from pretrain.kernels.depthwise import channels_last, multiprocessors
from pretrain.kernels.device import residual_backward_kernel, residual_kernel
from pretrain.kernels.tiling import CHANNELS, WARPS

# Eight values a thread of four warps, as in the convolutions.
PIXELS = 32
TILE = {"PIXELS": PIXELS, "CHANNELS": CHANNELS, "num_warps": WARPS}
PROGRAMS_PER_MULTIPROCESSOR = 8


@torch.library.custom_op("van::scaled_residual", mutates_args=())
def scaled_residual(x: Tensor, branch: Tensor, scale: Tensor, keep: Tensor | None) -> Tensor:
    """x + keep * scale * branch, in the type that PyTorch's promotion gives it.

    Args:
        x, branch: (N, C, H, W); copied unless they are channels-last.
        scale: (C,), of the layer scale.
        keep: (N,) in fp32, 0 for a dropped sample and 1 / (1 - drop path) for others; None to keep all as they are.
    """
    x, branch = channels_last(x), channels_last(branch)
    n, channels, height, width = x.shape
    y = torch.empty_like(x, dtype=_promoted(x, branch, scale), memory_format=torch.channels_last)
    pixels = n * height * width
    residual_kernel[(triton.cdiv(pixels, PIXELS) * triton.cdiv(channels, CHANNELS),)](
        x, branch, scale, keep, y, pixels, height * width, channels, **TILE
    )
    return y


@torch.library.custom_op("van::scaled_residual_backward", mutates_args=())
def _backward_operator(grad: Tensor, branch: Tensor, scale: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    grad, branch = channels_last(grad), channels_last(branch)
    n, channels, height, width = branch.shape
    pixels, channel_tiles = n * height * width, triton.cdiv(channels, CHANNELS)
    # One program to a run, as many as fit on the GPU at once: each leaves one partial sum.
    runs = max(1, min(PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(grad.device) // channel_tiles, triton.cdiv(pixels, PIXELS)))
    per_run = triton.cdiv(triton.cdiv(pixels, runs), PIXELS) * PIXELS
    runs = triton.cdiv(pixels, per_run)
    branch_grad = torch.empty_like(branch, memory_format=torch.channels_last)
    partial = torch.empty(runs, channels, dtype=torch.float32, device=grad.device)
    residual_backward_kernel[(runs * channel_tiles,)](
        grad, branch, scale, keep, branch_grad, partial, pixels, per_run, height * width, channels, **TILE
    )
    return branch_grad, partial.sum(0).to(scale.dtype)


@scaled_residual.register_fake
def _(x: Tensor, branch: Tensor, scale: Tensor, keep: Tensor | None) -> Tensor:
    return torch.empty_like(x, dtype=_promoted(x, branch, scale), memory_format=torch.channels_last)


@_backward_operator.register_fake
def _(grad: Tensor, branch: Tensor, scale: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    return torch.empty_like(branch, memory_format=torch.channels_last), torch.empty_like(scale)


def _promoted(x: Tensor, branch: Tensor, scale: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.promote_types(branch.dtype, scale.dtype))


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, branch, scale, keep = inputs
    ctx.x_dtype = x.dtype
    ctx.save_for_backward(branch, scale, keep)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    branch_grad, scale_grad = _backward_operator(grad, *ctx.saved_tensors)
    return grad.to(ctx.x_dtype), branch_grad, scale_grad, None


scaled_residual.register_autograd(_backward, setup_context=_setup_context)
