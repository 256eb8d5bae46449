"""Depth-wise convolution as operators of torch.library, over the kernels of `depthwise.py`.

`van::depthwise_conv2d` has `van::depthwise_conv2d_backward` for its derivative, and both know their outputs' shapes, so autograd and
torch.compile take them whole. With `gelu` the operator is GELU of the convolution, and keeps nothing of what lies between: the backward
pass computes that again, nine multiply-adds for a 3x3, from the input that it reads anyway.

What that saves, for a value of the MLP's hidden map in bf16: forward, 4 of 8 bytes of traffic (the convolution's output is neither written nor
read) and 2 bytes held until backward; backward, nothing (it reads x where it would read the convolution's output). A VAN-B3 at 224 px has
15.9 M such values an image: 64 MB of traffic and 32 MB of memory.
"""

import torch
from torch import Tensor

from pretrain.kernels.depthwise import by_taps, conv, weight_gradient

TYPES = (torch.bfloat16, torch.float16, torch.float32)


def depthwise_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int = 1, gelu: bool = False) -> Tensor:
    """Convolution of each channel with a kernel of its own, with padding that keeps the map's size; with `gelu`, GELU of that.

    Under autocast the activations, and so the output, take its type; weight and bias are read as they are stored, and sums are fp32.

    Args:
        x: (N, C, H, W); copied unless it is channels-last.
        weight: (C, 1, K, K), K odd.
        bias: (C,).

    Raises:
        TypeError: `x` is neither bf16, fp16 nor fp32.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if x.dtype not in TYPES:
        raise TypeError(f"the Triton kernels take bf16, fp16 or fp32, not {x.dtype}; set model.kernels=torch")
    return _operator(x, weight, bias, dilation, gelu)


@torch.library.custom_op("van::depthwise_conv2d", mutates_args=())
def _operator(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int, gelu: bool) -> Tensor:
    return conv(channels_last(x), by_taps(weight), bias, dilation, gelu="after" if gelu else "")


@torch.library.custom_op("van::depthwise_conv2d_backward", mutates_args=())
def _backward_operator(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int, gelu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    grad, x, taps = channels_last(grad), channels_last(x), by_taps(weight)
    if gelu:
        grad = conv(x, taps, bias, dilation, gelu="derivative", grad=grad)
    return conv(grad, taps, None, dilation, flip=True), *weight_gradient(x, grad, weight, dilation)


@_operator.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int, gelu: bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


@_backward_operator.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int, gelu: bool) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x, memory_format=torch.channels_last), torch.empty_like(weight), weight.new_empty(x.shape[1])


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    x, weight, bias, ctx.dilation, ctx.gelu = inputs  # type: ignore[attr-defined]
    ctx.has_bias = bias is not None  # type: ignore[attr-defined]
    ctx.save_for_backward(x, weight, bias)


def _backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias = ctx.saved_tensors  # type: ignore[attr-defined]
    grads = _backward_operator(grad, x, weight, bias, ctx.dilation, ctx.gelu)  # type: ignore[attr-defined]
    return *grads[:2], grads[2] if bias is not None else None, None, None


_operator.register_autograd(_backward, setup_context=_setup_context)


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)
