"""What stands around LKA's convolutions, in the kernels: the GELU in front of the first one, and the gate behind the last.

    x, near = gelu_conv2d(z, weight, bias, z_bias)      # x = GELU(z), near = the depth-wise convolution of x
    y = gated(x, attention, attention_bias)             # x * attention

x takes two ways, so its gradient comes in two parts. The gate's backward pass computes its part and the attention map's gradient at once;
the convolution's input gradient adds that part where it is made, and goes on through GELU. On the way both sum what they write for the
biases of the 1x1 convolutions in front of them, which are in z and in the attention map already.

For a value of x in 16 bits that is 18 bytes of traffic, where one operator after the other takes 32: a VAN-B3 at 224 px has 2.9 M such
values an image, so 40 MB. Forward, GELU and product are PyTorch's.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.model.fast.triton.attention_device import gate_backward_kernel
from pretrain.model.fast.triton.depthwise import by_taps, channels_last, conv, conv_tiles, in_autocasts_type, weight_gradient
from pretrain.model.fast.triton.residual import TILE, grid, runs_of_pixels


def gelu_conv2d(z: Tensor, weight: Tensor, bias: Tensor, z_bias: Tensor) -> tuple[Tensor, Tensor]:
    """GELU of z, and of that `depthwise_conv2d`.

    Args:
        z: (N, C, H, W); copied unless it is channels-last.
        weight: (C, 1, K, K), K odd.
        bias: (C,).
        z_bias: (C,), which is in z already, without autograd's knowledge; its gradient comes from here.

    Raises:
        TypeError: `z` is neither bf16, fp16 nor fp32.
    """
    return _conv_operator(in_autocasts_type(z), weight, bias, z_bias)[:2]


def gated(x: Tensor, attention: Tensor, attention_bias: Tensor) -> Tensor:
    """x * attention, both (N, C, H, W) and copied unless they are channels-last. attention_bias: (C,), which is in the attention map
    already, without autograd's knowledge; its gradient comes from here."""
    return _gate_operator(x, attention, attention_bias)


@torch.library.custom_op("van::gelu_conv2d", mutates_args=())
def _conv_operator(z: Tensor, weight: Tensor, bias: Tensor, z_bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """GELU, the convolution, and the weight `by_taps` for the backward pass."""
    x, taps = F.gelu(channels_last(z)), by_taps(weight)
    return x, conv(x, taps, bias, 1), taps


@torch.library.custom_op("van::gelu_conv2d_backward", mutates_args=())
def _conv_backward_operator(
    grad: Tensor, x_grad: Tensor, z: Tensor, x: Tensor, weight: Tensor, taps: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of z, weight and bias, and the sum of that of z. grad: of the convolution; x_grad: of x, but for the convolution's part."""
    grad, x_grad, z = channels_last(grad), channels_last(x_grad), channels_last(z)
    partial = torch.empty(conv_tiles(x, taps, 1), x.shape[1], device=x.device)
    z_grad = conv(grad, taps, None, 1, flip=True, gelu="gradient before", grad=x_grad, inner=z, partial=partial)
    return z_grad, *weight_gradient(x, grad, weight, 1), partial.sum(0)


@torch.library.custom_op("van::gate", mutates_args=())
def _gate_operator(x: Tensor, attention: Tensor, attention_bias: Tensor) -> Tensor:
    return channels_last(x) * channels_last(attention)


@torch.library.custom_op("van::gate_backward", mutates_args=())
def _gate_backward_operator(grad: Tensor, x: Tensor, attention: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x and attention, and the sum of the latter."""
    grad, x, attention = channels_last(grad), channels_last(x), channels_last(attention)
    x_grad, attention_grad = torch.empty_like(x), torch.empty_like(attention)
    runs, per_run = runs_of_pixels(x)
    pixels, channels = x.numel() // x.shape[1], x.shape[1]
    partial = torch.empty(runs, channels, device=x.device)
    gate_backward_kernel[grid(runs, channels)](grad, x, attention, x_grad, attention_grad, partial, pixels, per_run, channels, **TILE)
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
    ctx.set_materialize_grads(False)  # or a tensor of zeros would be made for the taps' gradient
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
