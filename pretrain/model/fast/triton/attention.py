"""Operators around LKA's convolutions: the GELU before the first one and the gate after the last one.

    x, near = gelu_conv2d(z, weight, bias, z_bias)      # x = GELU(z), near = the depthwise convolution of x
    y = gate(x, attention, attention_bias)             # x * attention

The convolution and the gate both read x, so its gradient has two parts. The gate's backward pass computes its part together with the
attention map's gradient. The convolution's input gradient adds that part and applies GELU's derivative. Both passes also compute the
gradients of the biases of the preceding 1x1 convolutions, which are already added to z and to the attention map.

This takes 18 bytes of traffic per 16-bit value of x instead of the 32 of separate operators: 40 MB per image in VAN-B3 at 224 px. In the
forward pass, GELU and the product are PyTorch's.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.model.fast.triton.attention_device import gate_backward_kernel
from pretrain.model.fast.triton.depthwise import by_taps, cast_like_autocast, channels_last, conv, conv_tiles, weight_gradient
from pretrain.model.fast.triton.residual import TILE, divide_map


def gelu_conv2d(z: Tensor, weight: Tensor, bias: Tensor, z_bias: Tensor) -> tuple[Tensor, Tensor]:
    """Returns GELU(z), and `depthwise_conv2d` of GELU(z).

    Args:
        z: (N, C, H, W); copied unless it is channels-last.
        weight: (C, 1, K, K), K odd.
        bias: (C,).
        z_bias: (C,), already added to z outside of autograd. Its gradient is computed here.

    Raises:
        TypeError: `z` is neither bf16, fp16 nor fp32.
    """
    return _conv_operator(cast_like_autocast(z), weight, bias, z_bias)[:2]


def gate(x: Tensor, attention: Tensor, attention_bias: Tensor) -> Tensor:
    """Returns x * attention, both (N, C, H, W) and copied unless they are channels-last.

    `attention_bias`, (C,), is already added to the attention map outside of autograd. Its gradient is computed here.
    """
    return _gate_operator(x, attention, attention_bias)


@torch.library.custom_op("van::gelu_conv2d", mutates_args=())
def _conv_operator(z: Tensor, weight: Tensor, bias: Tensor, z_bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns GELU(z), its convolution, and the weight by taps for the backward pass."""
    x, taps = F.gelu(channels_last(z)), by_taps(weight)
    return x, conv(x, taps, bias, 1), taps


@torch.library.custom_op("van::gelu_conv2d_backward", mutates_args=())
def _conv_backward_operator(
    grad: Tensor, x_grad: Tensor, z: Tensor, x: Tensor, weight: Tensor, taps: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of z, weight and bias, and the sum of z's gradient.

    `grad` is the gradient of the convolution's output, `x_grad` the gate's part of the gradient of x.
    """
    grad, x_grad, z = channels_last(grad), channels_last(x_grad), channels_last(z)
    partial = torch.empty(conv_tiles(x, taps, 1), x.shape[1], device=x.device)
    z_grad = conv(grad, taps, None, 1, flip=True, gelu="gradient before", grad=x_grad, inner=z, partial=partial)
    return z_grad, *weight_gradient(x, grad, weight, 1), partial.sum(0)


@torch.library.custom_op("van::gate", mutates_args=())
def _gate_operator(x: Tensor, attention: Tensor, attention_bias: Tensor) -> Tensor:
    return channels_last(x) * channels_last(attention)


@torch.library.custom_op("van::gate_backward", mutates_args=())
def _gate_backward_operator(grad: Tensor, x: Tensor, attention: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of x and of the attention map, and the sum of the latter."""
    grad, x, attention = channels_last(grad), channels_last(x), channels_last(attention)
    x_grad, attention_grad = torch.empty_like(x), torch.empty_like(attention)
    grid, runs, pixels, per_run = divide_map(x)
    partial = torch.empty(runs, x.shape[1], device=x.device)
    gate_backward_kernel[grid](grad, x, attention, x_grad, attention_grad, partial, pixels, per_run, x.shape[1], **TILE)
    return x_grad, attention_grad, partial.sum(0)


@_conv_operator.register_fake
def _(z: Tensor, weight: Tensor, bias: Tensor, z_bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _like(z), _like(z), by_taps(weight)


@_conv_backward_operator.register_fake
def _(grad: Tensor, x_grad: Tensor, z: Tensor, x: Tensor, weight: Tensor, taps: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _like(z), torch.empty_like(weight), weight.new_empty(len(weight)), _vector(z)


@_gate_operator.register_fake
def _(x: Tensor, attention: Tensor, attention_bias: Tensor) -> Tensor:
    return _like(x, torch.promote_types(x.dtype, attention.dtype))


@_gate_backward_operator.register_fake
def _(grad: Tensor, x: Tensor, attention: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _like(x), _like(attention), _vector(x)


def _like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty_like(x, dtype=dtype, memory_format=torch.channels_last)


def _vector(x: Tensor) -> Tensor:
    return torch.empty(x.shape[1], device=x.device)


def _setup_conv(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    z, weight, _, z_bias = inputs
    x, _, taps = output
    ctx.bias_type = z_bias.dtype
    ctx.mark_non_differentiable(taps)
    ctx.set_materialize_grads(False)  # otherwise autograd allocates zeros as the taps' gradient
    ctx.save_for_backward(z, x, weight, taps)


def _conv_gradients(ctx: Any, x_grad: Tensor | None, grad: Tensor | None, _: None) -> tuple[Tensor, ...]:
    z, x, weight, taps = ctx.saved_tensors
    x_grad, grad = (torch.zeros_like(x) if given is None else given for given in (x_grad, grad))
    z_grad, weight_grad, bias_grad, z_sum = _conv_backward_operator(grad, x_grad, z, x, weight, taps)
    return z_grad, weight_grad, bias_grad, z_sum.to(ctx.bias_type)


def _setup_gate(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, attention, attention_bias = inputs
    ctx.bias_type = attention_bias.dtype
    ctx.save_for_backward(x, attention)


def _gate_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
    x_grad, attention_grad, attention_sum = _gate_backward_operator(grad, *ctx.saved_tensors)
    return x_grad, attention_grad, attention_sum.to(ctx.bias_type)


_conv_operator.register_autograd(_conv_gradients, setup_context=_setup_conv)
_gate_operator.register_autograd(_gate_gradients, setup_context=_setup_gate)
