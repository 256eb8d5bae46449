"""A BatchNorm that is finished in the convolution behind it, on Triton's kernels.

    y, normed, _ = residual_norm(…)                          # a Normed: what is normed, but for a factor and an offset
    weight, bias, low_bias = fold_norm(conv.weight, conv.bias, normed.affine, normed.values.dtype)
    z = F.linear(values, weight, low_bias)                   # a 1x1 convolution of the normed map, its pixels as rows

Both are matrix products, so (values * a + b) W' + c is values (W a)' + (W b + c): the norm's weight and bias, and statistics that were not
known when the values were written, cost no pass over the map. And backward it gives for nothing what a BatchNorm's gradient else takes
a pass over two maps for: the sum of the values' gradient, and of that times the values, are sums over the gradients of this product's
bias and weight, which are at hand:

    z = values V' + d,  G the gradient of z:    sum of (G V) = V' (sum of G)    sum of (values * G V) = sum over outputs of V * (G' values)

They are taken with V as it was rounded for the product, so that they are the sums of that gradient and of no other.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pretrain.model.fast.triton.norm_device import fold_kernel, unfold_kernel
from pretrain.model.fast.triton.tiling import WARPS, tiles

# Of what adds up rows: hundreds of them, so many at once, of few channels.
SUMS = {"RUNS": 256, "CHANNELS": 8, "num_warps": WARPS}
FOLD = {"ROWS": 16, "CHANNELS": 64, "num_warps": WARPS}


class Normed(NamedTuple):
    """What `values` * affine[0] + affine[1] is, channel by channel, to whatever reads it."""

    values: Tensor  # (N, C, H, W): about of mean 0 and variance 1
    # (4, C). Two rows are nothing, but their gradients are what the gradient of the norm takes: the sum of that of `values`, and of that
    # times `values`.
    affine: Tensor
    passed: Tensor  # shaped as `values`, of no memory: its gradient is that of values * affine[0] + affine[1] from where it is added


def fold_norm(weight: Tensor, bias: Tensor, affine: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Of a 1x1 convolution that takes a `Normed`'s values: weight (O, C) in `dtype`, bias (O,) in fp32, and that bias in `dtype`, without a
    gradient. weight: (O, C, 1, 1), as the convolution has it for the normed map."""
    return _fold_operator(weight, bias, affine, dtype)


@torch.library.custom_op("van::fold_norm", mutates_args=())
def _fold_operator(weight: Tensor, bias: Tensor, affine: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    rows, channels = weight.shape[:2]
    folded, folded_bias, low_bias = _folded_like(weight, dtype)
    grid = (tiles(rows, FOLD["ROWS"]),)
    fold_kernel[grid](weight, bias, affine, folded, folded_bias, low_bias, rows, channels, **FOLD)
    return folded, folded_bias, low_bias


@torch.library.custom_op("van::fold_norm_backward", mutates_args=())
def _unfold_operator(grad: Tensor, bias_grad: Tensor, weight: Tensor, affine: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of weight and affine."""
    rows, channels = weight.shape[:2]
    weight_grad, affine_grad = torch.empty_like(weight), torch.empty_like(affine)
    grid = (tiles(channels, SUMS["CHANNELS"]),)
    unfold_kernel[grid](grad.contiguous(), bias_grad, weight, affine, weight_grad, affine_grad, rows, channels, **SUMS)
    return weight_grad, affine_grad


@_fold_operator.register_fake
def _(weight: Tensor, bias: Tensor, affine: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return _folded_like(weight, dtype)


@_unfold_operator.register_fake
def _(grad: Tensor, bias_grad: Tensor, weight: Tensor, affine: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(weight), torch.empty_like(affine)


def _folded_like(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    rows = weight.shape[0]
    folded_bias = torch.empty(rows, device=weight.device)
    return torch.empty(weight.shape[:2], dtype=dtype, device=weight.device), folded_bias, torch.empty_like(folded_bias, dtype=dtype)


def _setup(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    weight, bias, affine, _ = inputs
    ctx.bias_type = bias.dtype
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)  # or zeros would be made for the gradient of the last
    ctx.save_for_backward(weight, affine)


def _gradients(ctx: Any, grad: Tensor, bias_grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
    weight_grad, affine_grad = _unfold_operator(grad, bias_grad, *ctx.saved_tensors)
    return weight_grad, bias_grad.to(ctx.bias_type), affine_grad, None


_fold_operator.register_autograd(_gradients, setup_context=_setup)
