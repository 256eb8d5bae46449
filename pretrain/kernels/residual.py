"""What stands between two branches of a stage, in one operator: the end of one branch and the BatchNorm before the next.

    y = scaled_residual(x, branch, shortcut, scale, keep)                  x + keep * scale * (branch + shortcut)
    y, normed, found = residual_norm(x, branch, shortcut, scale, keep, norm)      and the BatchNorm of that,
    move_statistics([norm], [found])                                       whose running statistics move by what was found of y

Layer scale, stochastic depth and shortcut are one pass, in which the norm's statistics are taken; applying the norm is another one. The
sum is fp32, as the scale is, and what is normed goes straight to the type that autocast gives the convolution behind it. Backward, the
norm's gradient is added to the sum's in the pass that computes the branch's from both, and the branch's is summed for the bias of the
convolution at the branch's end. docs/performance.md counts the bytes.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.kernels.depthwise import channels_last, multiprocessors
from pretrain.kernels.depthwise_device import sum_runs_kernel
from pretrain.kernels.residual_device import (
    norm_kernel,
    norm_sums_kernel,
    residual_backward_kernel,
    residual_kernel,
    statistics_kernel,
)
from pretrain.kernels.tiling import CHANNELS, WARPS, tiles

# Eight values a thread of four warps, as in the convolutions.
PIXELS = 32
TILE = {"PIXELS": PIXELS, "CHANNELS": CHANNELS, "num_warps": WARPS}
PROGRAMS_PER_MULTIPROCESSOR = 8
# Of what adds runs up: hundreds of them for the few channels of the first stage, so many at once, of few channels.
SUMS = {"RUNS": 256, "CHANNELS": 8, "num_warps": WARPS}


def scaled_residual(
    x: Tensor, branch: Tensor, shortcut: Tensor | None, scale: Tensor, keep: Tensor | None, branch_bias: Tensor | None = None
) -> Tensor:
    """x + keep * scale * (branch + shortcut), in the type that PyTorch's promotion gives it.

    Args:
        x, branch, shortcut: (N, C, H, W); copied unless they are channels-last. Without a shortcut, None.
        scale: (C,), of the layer scale.
        keep: (N,) in fp32, 0 for a dropped sample and 1 / (1 - drop path) for others; None to keep all as they are.
        branch_bias: (C,), which is in the branch already, without autograd's knowledge; its gradient comes from here.
    """
    return _residual_operator(x, branch, shortcut, scale, keep, branch_bias)


def residual_norm(
    x: Tensor, branch: Tensor, shortcut: Tensor | None, scale: Tensor, keep: Tensor | None, norm: nn.BatchNorm2d,
    branch_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:  # fmt: skip
    """`scaled_residual` and the training BatchNorm of it, the latter in autocast's type, if that is on; and for `move_statistics` mean and
    variance of the sum, (C,).

    Raises:
        ValueError: there is one value a channel, which has no variance.
    """
    if x.numel() == x.shape[1]:
        raise ValueError(f"expected more than one value a channel in training, got {tuple(x.shape)}")
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else _promoted(x, branch, scale)
    y, normed, mean, _, variance = _residual_norm_operator(
        x, branch, shortcut, scale, keep, norm.weight, norm.bias, norm.eps, dtype, branch_bias
    )
    return y, normed, (mean, variance)


@torch.no_grad()
def move_statistics(norms: Sequence[Any], found: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Moves the running statistics of BatchNorms, of one momentum, by what `residual_norm` found for each: all at once, as such small
    kernels take longer to launch than to run."""
    if norms:
        running = [statistic for norm in norms for statistic in (norm.running_mean, norm.running_var)]
        torch._foreach_lerp_(running, [statistic for both in found for statistic in both], norms[0].momentum)
        torch._foreach_add_([norm.num_batches_tracked for norm in norms], 1)


@torch.library.custom_op("van::scaled_residual", mutates_args=())
def _residual_operator(
    x: Tensor, branch: Tensor, shortcut: Tensor | None, scale: Tensor, keep: Tensor | None, branch_bias: Tensor | None
) -> Tensor:
    return _residual(x, branch, shortcut, scale, keep, None, *runs_of_pixels(x))


@torch.library.custom_op("van::scaled_residual_backward", mutates_args=())
def _residual_backward_operator(
    grad: Tensor, branch: Tensor, shortcut: Tensor | None, scale: Tensor, keep: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of branch, and (2, C) in fp32, of scale and branch_bias."""
    return _residual_backward(channels_last(grad), branch, shortcut, scale, keep, {})


@torch.library.custom_op("van::residual_norm", mutates_args=())
def _residual_norm_operator(
    x: Tensor, branch: Tensor, shortcut: Tensor | None, scale: Tensor, keep: Tensor | None,
    weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype, branch_bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The sum, what is normed, and of the sum's values mean, 1 / sqrt(variance + eps), and the variance as BatchNorm keeps it."""
    runs, per_run = runs_of_pixels(x)
    channels, pixels = x.shape[1], x.numel() // x.shape[1]
    partial = torch.empty(runs, 2, channels, device=x.device)
    y = _residual(x, branch, shortcut, scale, keep, partial, runs, per_run)
    mean, rstd, variance = (torch.empty(channels, device=x.device) for _ in range(3))
    statistics_kernel[(tiles(channels, SUMS["CHANNELS"]),)](partial, mean, rstd, variance, eps, runs, pixels, per_run, channels, **SUMS)
    normed = torch.empty_like(y, dtype=dtype, memory_format=torch.channels_last)
    norm_kernel[grid(runs, channels)](y, mean, rstd, weight, bias, normed, pixels, per_run, channels, **TILE)
    return y, normed, mean, rstd, variance


@torch.library.custom_op("van::residual_norm_backward", mutates_args=())
def _residual_norm_backward_operator(
    grad: Tensor, normed_grad: Tensor, y: Tensor, mean: Tensor, rstd: Tensor,
    branch: Tensor, shortcut: Tensor | None, scale: Tensor, keep: Tensor | None, weight: Tensor, bias: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x and branch, (2, C) in fp32 of scale and branch_bias, and of weight and bias."""
    grad, normed_grad = channels_last(grad), channels_last(normed_grad)
    runs, per_run = runs_of_pixels(y)
    channels, pixels = y.shape[1], y.numel() // y.shape[1]
    partial = torch.empty(runs, 2, channels, device=y.device)
    norm_sums_kernel[grid(runs, channels)](normed_grad, y, mean, rstd, partial, pixels, per_run, channels, **TILE)
    weight_grad, bias_grad = torch.empty(channels, device=y.device), torch.empty(channels, device=y.device)
    sum_runs_kernel[(2, tiles(channels, SUMS["CHANNELS"]))](partial, weight_grad, bias_grad, runs, channels, TAPS=1, **SUMS)
    x_grad = torch.empty_like(y, memory_format=torch.channels_last)
    behind = {
        "normed_grad": normed_grad, "y": y, "mean": mean, "rstd": rstd, "weight": weight,
        "weight_grad": weight_grad, "bias_grad": bias_grad, "x_grad": x_grad,
    }  # fmt: skip
    branch_grad, vectors = _residual_backward(grad, branch, shortcut, scale, keep, behind)
    return x_grad, branch_grad, vectors, weight_grad.to(weight.dtype), bias_grad.to(bias.dtype)


BEHIND = ("normed_grad", "y", "mean", "rstd", "weight", "weight_grad", "bias_grad", "x_grad")  # what the kernel takes of a norm


def _residual(
    x: Tensor, branch: Tensor, shortcut: Tensor | None, scale: Tensor, keep: Tensor | None,
    partial: Tensor | None, runs: int, per_run: int,
) -> Tensor:  # fmt: skip
    x, branch, shortcut = channels_last(x), channels_last(branch), shortcut if shortcut is None else channels_last(shortcut)
    y = torch.empty_like(x, dtype=_promoted(x, branch, scale), memory_format=torch.channels_last)
    pixels, channels = x.numel() // x.shape[1], x.shape[1]
    residual_kernel[grid(runs, channels)](x, branch, shortcut, scale, keep, y, partial, pixels, per_run, pixels // len(x), channels, **TILE)
    return y


def _residual_backward(
    grad: Tensor, branch: Tensor, shortcut: Tensor | None, scale: Tensor, keep: Tensor | None, behind: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Gradients of branch, and (2, C) in fp32, of scale and of the branch's bias; with what is known of a norm behind the sum, that of
    x is written too."""
    branch, shortcut = channels_last(branch), shortcut if shortcut is None else channels_last(shortcut)
    runs, per_run = runs_of_pixels(branch)
    pixels, channels = branch.numel() // branch.shape[1], branch.shape[1]
    branch_grad = torch.empty_like(branch, memory_format=torch.channels_last)
    partial = torch.empty(runs, 2, channels, device=grad.device)
    residual_backward_kernel[grid(runs, channels)](
        grad, branch, shortcut, scale, keep, branch_grad, partial, *(behind.get(name) for name in BEHIND),
        pixels, per_run, pixels // len(branch), channels, **TILE,
    )  # fmt: skip
    return branch_grad, partial.sum(0)


def runs_of_pixels(x: Tensor) -> tuple[int, int]:
    """How many runs of pixels, and how many pixels in each: one program to a run and a tile of channels, as many as fit on the GPU at
    once. So what is summed in which order follows from the shape and the kind of GPU."""
    pixels, channel_tiles = x.numel() // x.shape[1], tiles(x.shape[1], CHANNELS)
    runs = max(1, min(PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(x.device) // channel_tiles, tiles(pixels, PIXELS)))
    per_run = tiles(tiles(pixels, runs), PIXELS) * PIXELS
    return tiles(pixels, per_run), per_run


def grid(runs: int, channels: int) -> tuple[int]:
    return (runs * tiles(channels, CHANNELS),)


def _promoted(x: Tensor, branch: Tensor, scale: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.promote_types(branch.dtype, scale.dtype))


def _like(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(x, dtype=dtype, memory_format=torch.channels_last)


@_residual_operator.register_fake
def _(x: Tensor, branch: Tensor, shortcut: Tensor | None, scale: Tensor, keep: Tensor | None, branch_bias: Tensor | None) -> Tensor:
    return _like(x, _promoted(x, branch, scale))


@_residual_backward_operator.register_fake
def _(grad: Tensor, branch: Tensor, shortcut: Tensor | None, scale: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    return _like(branch, branch.dtype), _vectors(scale)


@_residual_norm_operator.register_fake
def _(
    x: Tensor, branch: Tensor, shortcut: Tensor | None, scale: Tensor, keep: Tensor | None,
    weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype, branch_bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    statistics = (torch.empty(x.shape[1], device=x.device) for _ in range(3))
    return _like(x, _promoted(x, branch, scale)), _like(x, dtype), *statistics  # type: ignore[return-value]


@_residual_norm_backward_operator.register_fake
def _(
    grad: Tensor, normed_grad: Tensor, y: Tensor, mean: Tensor, rstd: Tensor,
    branch: Tensor, shortcut: Tensor | None, scale: Tensor, keep: Tensor | None, weight: Tensor, bias: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _like(y, y.dtype), _like(branch, branch.dtype), _vectors(scale), torch.empty_like(weight), torch.empty_like(bias)


def _vectors(scale: Tensor) -> Tensor:
    return torch.empty(2, len(scale), device=scale.device)


def _setup_residual(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, *others, branch_bias = inputs
    ctx.x_dtype, ctx.bias_dtype = x.dtype, None if branch_bias is None else branch_bias.dtype
    ctx.save_for_backward(*others)


def _residual_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    branch, shortcut, scale, keep = ctx.saved_tensors
    branch_grad, vectors = _residual_backward_operator(grad, branch, shortcut, scale, keep)
    scale_grad, branch_bias_grad = _typed(vectors, scale.dtype, ctx.bias_dtype)
    return grad.to(ctx.x_dtype), branch_grad, _of_shortcut(branch_grad, shortcut), scale_grad, None, branch_bias_grad


def _setup_residual_norm(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    x, branch, shortcut, scale, keep, weight, bias, _, _, branch_bias = inputs
    y, _, mean, rstd, variance = output
    ctx.x_dtype, ctx.bias_dtype = x.dtype, None if branch_bias is None else branch_bias.dtype
    ctx.mark_non_differentiable(mean, rstd, variance)
    ctx.set_materialize_grads(False)  # or zeros would be made for the gradient of each of these
    ctx.save_for_backward(y, mean, rstd, branch, shortcut, scale, keep, weight, bias)


def _residual_norm_gradients(ctx: Any, grad: Tensor | None, normed_grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    grad = torch.zeros_like(saved[0]) if grad is None else grad
    normed_grad = torch.zeros_like(saved[0]) if normed_grad is None else normed_grad
    x_grad, branch_grad, vectors, weight_grad, bias_grad = _residual_norm_backward_operator(grad, normed_grad, *saved)
    scale_grad, branch_bias_grad = _typed(vectors, saved[5].dtype, ctx.bias_dtype)
    shortcut_grad = _of_shortcut(branch_grad, saved[4])
    vector_grads = (scale_grad, None, weight_grad, bias_grad, None, None, branch_bias_grad)
    return x_grad.to(ctx.x_dtype), branch_grad, shortcut_grad, *vector_grads


def _typed(vectors: Tensor, scale_type: torch.dtype, bias_type: torch.dtype | None) -> tuple[Tensor, Tensor | None]:
    return vectors[0].to(scale_type), None if bias_type is None else vectors[1].to(bias_type)


def _of_shortcut(branch_grad: Tensor, shortcut: Tensor | None) -> Tensor | None:
    return None if shortcut is None else branch_grad.to(shortcut.dtype)


_residual_operator.register_autograd(_residual_gradients, setup_context=_setup_residual)
_residual_norm_operator.register_autograd(_residual_norm_gradients, setup_context=_setup_residual_norm)
