"""Depthwise convolution: launches the kernels of `depthwise_device.py` and registers the torch.library operators.

Autograd and torch.compile treat `van::depthwise_conv2d` and its derivative `van::depthwise_conv2d_backward` as single operators. With
`gelu` the operator computes GELU of the convolution and does not store the convolution's output. The backward pass recomputes that output
from the input, which it reads anyway, at nine multiply-adds for a 3x3. In VAN-B3 at 224 px this saves 64 MB of traffic and 32 MB of memory
per image.

The gradient of the bias of a preceding 1x1 convolution is the sum of the input gradient. It is computed here, as the gradient of `x_bias`,
which saves another pass over the map.
"""

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from pretrain.model.fast.triton.depthwise_device import conv_kernel, sum_runs_kernel, weight_gradient_kernel
from pretrain.model.fast.triton.tiling import (
    CHANNELS,
    LANES,
    MOST_ROWS,
    MOST_ROWS_WEIGHT_GRADIENT,
    PROGRAMS_PER_MULTIPROCESSOR,
    REGISTERS,
    WARPS,
    column_lanes,
    splits,
    strips,
    tiles,
)

TYPES = (torch.bfloat16, torch.float16, torch.float32)


def depthwise_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int = 1, gelu: bool = False, x_bias: Tensor | None = None
) -> Tensor:
    """Returns the depthwise convolution of a map, padded to keep its size; with `gelu`, GELU of the convolution.

    Under autocast, activations and output have autocast's type. Weight and bias are read in their stored type, and sums are fp32.

    Args:
        x: (N, C, H, W); copied unless it is channels-last.
        weight: (C, 1, K, K), K odd.
        bias: (C,).
        x_bias: (C,), already added to x outside of autograd. Its gradient is computed here.

    Raises:
        TypeError: `x` is neither bf16, fp16 nor fp32.
    """
    return _operator(cast_like_autocast(x), weight, bias, dilation, gelu, x_bias)[0]


def cast_like_autocast(x: Tensor) -> Tensor:
    """Returns x in autocast's type if autocast is on, otherwise x; raises TypeError if the type is neither bf16, fp16 nor fp32."""
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if x.dtype not in TYPES:
        raise TypeError(f"the Triton kernels take bf16, fp16 or fp32, not {x.dtype}; set model.kernels=torch")
    return x


@torch.library.custom_op("van::depthwise_conv2d", mutates_args=())
def _operator(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int, gelu: bool, x_bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns the convolution, and the weight by taps for the backward pass."""
    taps = by_taps(weight)
    return conv(channels_last(x), taps, bias, dilation, gelu="after" if gelu else ""), taps


@torch.library.custom_op("van::depthwise_conv2d_backward", mutates_args=())
def _backward_operator(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, taps: Tensor, dilation: int, gelu: bool, with_sum: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of x, weight and bias, and the sum of x's gradient, which is empty unless `with_sum`."""
    grad, x = channels_last(grad), channels_last(x)
    if gelu:
        grad = conv(x, taps, bias, dilation, gelu="gradient", grad=grad)
    partial = torch.empty(conv_tiles(x, taps, dilation), x.shape[1], device=x.device) if with_sum else None
    x_grad = conv(grad, taps, None, dilation, flip=True, partial=partial)
    x_sum = weight.new_empty(0) if partial is None else partial.sum(0)
    return x_grad, *weight_gradient(x, grad, weight, dilation), x_sum


@_operator.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int, gelu: bool, x_bias: Tensor | None) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, memory_format=torch.channels_last), by_taps(weight)


@_backward_operator.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, taps: Tensor, dilation: int, gelu: bool, with_sum: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x_sum = torch.empty(x.shape[1], device=x.device) if with_sum else weight.new_empty(0)
    return torch.empty_like(x, memory_format=torch.channels_last), torch.empty_like(weight), weight.new_empty(x.shape[1]), x_sum


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, ctx.dilation, ctx.gelu, x_bias = inputs
    ctx.x_bias_type = None if x_bias is None else x_bias.dtype
    taps = output[1]
    ctx.mark_non_differentiable(taps)
    ctx.set_materialize_grads(False)  # otherwise autograd allocates zeros as the taps' gradient
    ctx.save_for_backward(x, weight, bias, taps)


def _backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 6
    x, weight, bias, taps = ctx.saved_tensors
    with_sum = ctx.x_bias_type is not None
    x_grad, weight_grad, bias_grad, x_sum = _backward_operator(grad, x, weight, bias, taps, ctx.dilation, ctx.gelu, with_sum)
    x_bias_grad = x_sum.to(ctx.x_bias_type) if with_sum else None
    return x_grad, weight_grad, bias_grad if bias is not None else None, None, None, x_bias_grad


_operator.register_autograd(_backward, setup_context=_setup_context)


def by_taps(weight: Tensor) -> Tensor:
    """Maps a weight (C, 1, K, K) of the model to (K * K, C) in fp32 for the kernel.

    So a tap of eight channels is 32 adjacent bytes; in the model's layout each value would take a cache line of 128 bytes.
    """
    return weight.new_empty((weight[0].numel(), len(weight)), dtype=torch.float32).copy_(weight.flatten(1).t())


def launch_options(bytes_per_value: int) -> dict[str, int]:
    """Returns the launch options of `conv_kernel` and `weight_gradient_kernel`, for activations of this size."""
    return {"num_warps": WARPS, "maxnreg": REGISTERS[bytes_per_value]}


def conv_constants(shape: Sequence[int], k: int, dilation: int, flip: bool = False, gelu: str = "") -> dict[str, Any]:
    """Returns the constants of `conv_kernel` for maps of a shape (C, H, W)."""
    return _constants(shape, k, dilation, MOST_ROWS[k]) | {"FLIP": flip, "GELU": gelu}


def weight_gradient_constants(shape: Sequence[int], k: int, dilation: int) -> dict[str, Any]:
    """Returns the constants of `weight_gradient_kernel` for maps of a shape (C, H, W)."""
    return _constants(shape, k, dilation, MOST_ROWS_WEIGHT_GRADIENT[k]) | {"COLUMNS": column_lanes(k)}


def _constants(shape: Sequence[int], k: int, dilation: int, most_rows: int) -> dict[str, Any]:
    channels, height, width = shape
    cut = strips(height, dilation, most_rows)
    constants = {"H": height, "W": width, "C": channels, "K": k, "D": dilation, "R": cut.rows, "STRIPS": cut.strips}
    return constants | {"LANES": LANES, "CHANNELS": CHANNELS}


def conv(
    x: Tensor, taps: Tensor, bias: Tensor | None, dilation: int, *,
    flip: bool = False, gelu: str = "", grad: Tensor | None = None, inner: Tensor | None = None, partial: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Maps (N, C, H, W) to the same shape, channels-last.

    `taps` is (K * K, C), from `by_taps`, and `partial` (`conv_tiles`, C). The others are arguments of `conv_kernel`.
    """
    constants = conv_constants(x.shape[1:], math.isqrt(taps.shape[0]), dilation, flip, gelu)
    total = _strips_of_all(len(x), constants)
    reach = min(constants["K"] // 2, (constants["W"] - 1) // dilation)
    y = torch.empty_like(x, memory_format=torch.channels_last)
    grid = (tiles(total, LANES) * tiles(constants["C"], CHANNELS),)
    conv_kernel[grid](x, taps, bias, grad, inner, y, partial, total, reach, **constants, **launch_options(x.element_size()))
    return y


def conv_tiles(x: Tensor, taps: Tensor, dilation: int) -> int:
    """Returns the number of tiles of strips of `conv`."""
    return tiles(_strips_of_all(len(x), conv_constants(x.shape[1:], math.isqrt(taps.shape[0]), dilation)), LANES)


def _strips_of_all(images: int, constants: dict[str, Any]) -> int:
    return images * constants["STRIPS"] * constants["D"] * constants["W"]


def weight_gradient(x: Tensor, grad: Tensor, weight: Tensor, dilation: int) -> tuple[Tensor, Tensor]:
    """Returns the gradients of weight (C, 1, K, K) and bias (C,), in the weight's type; x and grad are (N, C, H, W), channels-last."""
    channels, k = x.shape[1], weight.shape[-1]
    constants = weight_gradient_constants(x.shape[1:], k, dilation)
    total = _strips_of_all(len(x), constants)
    runs, per_run = splits(total, channels, k, PROGRAMS_PER_MULTIPROCESSOR[x.element_size()] * multiprocessors(x.device))
    channel_tiles = tiles(channels, CHANNELS)
    partial = torch.empty(runs, k * k + 1, channels, dtype=torch.float32, device=x.device)
    options = launch_options(x.element_size())
    weight_gradient_kernel[(runs * channel_tiles,)](x, grad, partial, total, per_run, **constants, **options)
    weight_grad, bias_grad = torch.empty_like(weight), weight.new_empty(channels)
    sum_runs_kernel[(k * k + 1, channel_tiles)](
        partial, weight_grad, bias_grad, runs, channels, TAPS=k * k, RUNS=32, CHANNELS=CHANNELS, num_warps=WARPS
    )
    return weight_grad, bias_grad


@cache
def multiprocessors(device: torch.device) -> int:
    """Returns the number of multiprocessors of a GPU; for the interpreter on a CPU 4, so that small maps have several runs."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)
