"""Whether a kernel runs on this device and agrees with PyTorch's operators, asked before a job relies on it.

Each question compiles what the first training step would compile, so it costs a job little: Triton keeps what it has compiled.
"""

from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.model.fast.triton.attention import gated, gelu_conv2d
from pretrain.model.fast.triton.depthwise import depthwise_conv2d
from pretrain.model.fast.triton.norm import fold_norm
from pretrain.model.fast.triton.residual import residual_norm

# Of the largest value. Rounding to bf16 is 2**-9 of a value, of which the gradients sum some; a wrong kernel is wrong by much more.
TOLERANCE = 0.03


@cache
def convolution_fault(channels: int, size: int, k: int, dilation: int, gelu: bool, dtype: torch.dtype, device: torch.device) -> str | None:
    """What is wrong with `depthwise_conv2d` on maps of this size; None if nothing is."""

    def by_pytorch(x: Tensor, weight: Tensor, bias: Tensor, x_bias: Tensor) -> Tensor:
        y = F.conv2d(x + x_bias[:, None, None], weight, bias, padding=dilation * (k // 2), dilation=dilation, groups=channels)
        return F.gelu(y) if gelu else y

    def own(x: Tensor, weight: Tensor, bias: Tensor, x_bias: Tensor) -> Tensor:
        summed = x_bias if gelu else None  # the layer with GELU stands behind a 1x1 convolution
        x = x + (x_bias if summed is None else x_bias.detach())[:, None, None]
        return depthwise_conv2d(x.to(dtype), weight, bias, dilation, gelu, summed).float()

    shapes = [(2, channels, size, size), (channels, 1, k, k), (channels,), (channels,)]
    return _fault(own, by_pytorch, shapes, device)


@cache
def attention_fault(channels: int, size: int, k: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """What is wrong with `gelu_conv2d` and `gated` on maps of this size; None if nothing is."""

    def by_pytorch(z: Tensor, weight: Tensor, bias: Tensor, attention: Tensor, z_bias: Tensor, attention_bias: Tensor) -> Tensor:
        x = F.gelu(z + z_bias[:, None, None])
        near = F.conv2d(x, weight, bias, padding=k // 2, groups=channels)
        return torch.cat([x * (attention + attention_bias[:, None, None]), near])

    def own(z: Tensor, weight: Tensor, bias: Tensor, attention: Tensor, z_bias: Tensor, attention_bias: Tensor) -> Tensor:
        z, attention = (t + b.detach()[:, None, None] for t, b in ((z, z_bias), (attention, attention_bias)))
        x, near = gelu_conv2d(z.to(dtype), weight, bias, z_bias)
        return torch.cat([gated(x, attention.to(dtype), attention_bias), near]).float()

    shapes = [(2, channels, size, size), (channels, 1, k, k), (channels,), (2, channels, size, size), (channels,), (channels,)]
    return _fault(own, by_pytorch, shapes, device)


@cache
def joint_fault(channels: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """What is wrong with `residual_norm` and `fold_norm`, whose code is the same for maps of any size; None if nothing is. Tried is a
    joint, a convolution behind it, and another joint that adds both."""
    keep = torch.tensor([1.25, 0.0], device=device)
    expected = torch.stack([torch.full((channels,), 0.5, device=device), torch.full((channels,), 2.0, device=device)])

    def by_pytorch(x: Tensor, branch: Tensor, weight: Tensor, *vectors: Tensor) -> Tensor:
        scale, branch_bias, bias, norm_weight, norm_bias = (vector[:, None, None] for vector in vectors)
        y = x + keep[:, None, None, None] * scale * (branch + branch_bias + branch)
        normed = F.batch_norm(y, None, None, norm_weight.flatten(), norm_bias.flatten(), training=True)
        return y + keep[:, None, None, None] * scale * (F.conv2d(normed, weight[:, :, None, None] / channels) + bias + normed)

    def own(x: Tensor, branch: Tensor, weight: Tensor, *vectors: Tensor) -> Tensor:
        scale, branch_bias, bias, norm_weight, norm_bias = vectors
        norm = cast(nn.BatchNorm2d, SimpleNamespace(weight=norm_weight, bias=norm_bias, eps=1e-5))
        biased = branch + branch_bias.detach()[:, None, None]
        with torch.autocast(device.type, dtype, enabled=dtype is not torch.float32):  # which says how what is normed is stored
            y, normed, _ = residual_norm(x, biased.to(dtype), branch.to(dtype), scale, keep, norm, expected, branch_bias)
            folded, bias, low_bias = fold_norm(weight[:, :, None, None] / channels, bias, normed.affine, dtype)
            z = F.conv2d(normed.values, folded[:, :, None, None], low_bias)
            return residual_norm(y, z, normed, scale, keep, norm, expected, bias)[0]

    return _fault(own, by_pytorch, [(2, channels, 8, 8)] * 2 + [(channels, channels)] + [(channels,)] * 5, device)


def _fault(own: Callable[..., Tensor], reference: Callable[..., Tensor], shapes: list[tuple[int, ...]], device: torch.device) -> str | None:
    """Compares values and gradients for drawn inputs, of which maps are channels-last."""
    generator = torch.Generator(device).manual_seed(0)
    inputs = [torch.randn(shape, generator=generator, device=device) / shape[-1] ** (len(shape) == 4 and shape[1] == 1) for shape in shapes]
    try:
        found, expected = (_values_and_gradients(function, inputs) for function in (own, reference))
    except Exception as error:  # of the compiler, the driver or the kernel's launch: whatever it is, the layer can do without
        return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
    distances = [float((one - other).abs().max() / other.abs().max()) for one, other in zip(found, expected, strict=True)]
    wrong = [distance for distance in distances if not distance <= TOLERANCE]  # what is not a number is wrong
    return f"differs from PyTorch's by {wrong[0]:.0%}" if wrong else None


def _values_and_gradients(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    leaves = [t.to(memory_format=torch.channels_last) if t.ndim == 4 else t for t in inputs]
    leaves = [t.detach().requires_grad_() for t in leaves]
    y = function(*leaves)
    # A drawn gradient, of values near 1: smaller ones have no digits in fp16, and one along y itself would vanish in a norm.
    grad = torch.randn(y.shape, generator=torch.Generator(y.device).manual_seed(1), device=y.device)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]
