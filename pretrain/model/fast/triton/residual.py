"""What stands between two branches of a stage, in one operator: the end of one branch and the BatchNorm before the next.

    y = scaled_residual(x, branch, shortcut, scale, keep)                  x + keep * scale * (branch + shortcut)
    y, normed, found = residual_norm(x, branch, shortcut, scale, keep, norm, expected)      and the BatchNorm of that, as a `Normed`,
    move_statistics([norm], [found])                                       whose running statistics move by what was found of y

Layer scale, stochastic depth, shortcut and norm are one pass, in which the norm's statistics are taken. They are known only behind it,
so it norms by what is `expected`, which are the running statistics; the convolution behind it takes along what this is off, with the
norm's weight and bias (`norm.py`). The sum is fp32, as the scale is; what is normed goes straight to the type that autocast gives that
convolution, and is as exact in it as ever while the means are not many deviations apart.

Backward, one pass goes through the norm, adds the sum's gradient, and computes the branch's from both; it also sums the branch's for the
bias of the convolution at the branch's end, and reads in place what the next shortcut gives this norm. The sums that the norm's
gradient takes come from the convolution behind it. docs/performance.md counts the bytes.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.model.fast.triton.depthwise import channels_last, multiprocessors
from pretrain.model.fast.triton.norm import SUMS, Normed
from pretrain.model.fast.triton.residual_device import (
    branch_sums_kernel,
    residual_backward_kernel,
    residual_kernel,
    statistics_kernel,
)
from pretrain.model.fast.triton.tiling import CHANNELS, WARPS, tiles

# Eight values a thread of four warps, as in the convolutions.
PIXELS = 32
TILE = {"PIXELS": PIXELS, "CHANNELS": CHANNELS, "num_warps": WARPS}
PROGRAMS_PER_MULTIPROCESSOR = 8


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
    x: Tensor, branch: Tensor, shortcut: Tensor | Normed | None, scale: Tensor, keep: Tensor | None, norm: nn.BatchNorm2d,
    expected: Tensor, branch_bias: Tensor | None = None,
) -> tuple[Tensor, Normed, tuple[Tensor, Tensor]]:  # fmt: skip
    """`scaled_residual` and the training BatchNorm of it, the latter in autocast's type, if that is on; and for `move_statistics` mean and
    variance of the sum, (C,). expected: (2, C), of `expected_statistics`.

    Raises:
        ValueError: there is one value a channel, which has no variance.
    """
    if x.numel() == x.shape[1]:
        raise ValueError(f"expected more than one value a channel in training, got {tuple(x.shape)}")
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else _promoted(x, branch, scale)
    passed = affine = None
    if isinstance(shortcut, Normed):  # whose gradient goes to what stands for the values; theirs would be added to another one, by a pass
        passed, affine, shortcut = shortcut.passed, shortcut.affine, shortcut.values.detach()
    y, values, of_norm, to_pass, _, mean, variance = _residual_norm_operator(
        x, branch, shortcut, passed, affine, scale, keep, norm.weight, norm.bias, expected, norm.eps, dtype, branch_bias
    )
    return y, Normed(values, of_norm, to_pass), (mean, variance)


def expected_statistics(norms: Sequence[Any]) -> Tensor:
    """Running means and variances of BatchNorms of C channels, as they are now, (norms, 2, C): to be taken before they move, also where
    `residual_norm` will be computed again after that."""
    return torch.stack([statistic for norm in norms for statistic in (norm.running_mean, norm.running_var)]).unflatten(0, (-1, 2))


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
    return _residual(x, branch, shortcut, None, scale, keep, None, None, None, 0.0)


@torch.library.custom_op("van::scaled_residual_backward", mutates_args=())
def _residual_backward_operator(
    grad: Tensor, branch: Tensor, shortcut: Tensor | None, scale: Tensor, keep: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of branch, and (2, C) in fp32, of scale and branch_bias."""
    return _residual_backward(channels_last(grad), branch, shortcut, None, scale, keep, {})[:2]


@torch.library.custom_op("van::residual_norm", mutates_args=())
def _residual_norm_operator(
    x: Tensor, branch: Tensor, shortcut: Tensor | None, passed: Tensor | None, affine: Tensor | None, scale: Tensor, keep: Tensor | None,
    weight: Tensor, bias: Tensor, expected: Tensor, eps: float, dtype: torch.dtype, branch_bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The sum; a `Normed`; moments as `statistics_kernel` has them; mean of the sum, and the variance as BatchNorm keeps it."""
    runs, per_run = runs_of_pixels(x)
    channels, pixels = x.shape[1], x.numel() // x.shape[1]
    partial = torch.empty(runs, 2, channels, device=x.device)
    (values, of_norm, to_pass), (moments, mean, variance) = _normed_like(x, dtype), _statistics_like(x)
    y = _residual(x, branch, shortcut, affine, scale, keep, expected, values, partial, eps)
    statistics_kernel[(tiles(channels, SUMS["CHANNELS"]),)](
        partial, expected, weight, bias, mean, variance, moments, of_norm, eps, runs, pixels, per_run, channels, **SUMS
    )
    return y, values, of_norm, to_pass, moments, mean, variance


@torch.library.custom_op("van::residual_norm_backward", mutates_args=())
def _residual_norm_backward_operator(
    grad: Tensor, values_grad: Tensor, norm_grad: Tensor, passed_grad: Tensor | None, values: Tensor, moments: Tensor, norm_affine: Tensor,
    branch: Tensor, shortcut: Tensor | None, affine: Tensor | None, scale: Tensor, keep: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, of the norm's weight, of branch, (2, C) in fp32 of scale and branch_bias, and of affine, where there is one."""
    x_grad, weight_grad = _like(grad, grad.dtype), torch.empty_like(norm_affine[0])
    behind = {
        "values_grad": channels_last(values_grad), "passed_grad": passed_grad if passed_grad is None else channels_last(passed_grad),
        "values": values, "moments": moments, "norm_affine": norm_affine, "norm_grad": norm_grad.contiguous(),
        "x_grad": x_grad, "weight_grad": weight_grad,
    }  # fmt: skip
    return x_grad, weight_grad, *_residual_backward(channels_last(grad), branch, shortcut, affine, scale, keep, behind)


BEHIND = ("values_grad", "passed_grad", "values", "moments", "norm_affine", "norm_grad", "x_grad", "weight_grad")  # of a norm


def _residual(
    x: Tensor, branch: Tensor, shortcut: Tensor | None, affine: Tensor | None, scale: Tensor, keep: Tensor | None,
    expected: Tensor | None, values: Tensor | None, partial: Tensor | None, eps: float,
) -> Tensor:  # fmt: skip
    x, branch, shortcut = channels_last(x), channels_last(branch), shortcut if shortcut is None else channels_last(shortcut)
    y = _like(x, _promoted(x, branch, scale))
    runs, per_run = runs_of_pixels(x)
    pixels, channels = x.numel() // x.shape[1], x.shape[1]
    residual_kernel[grid(runs, channels)](
        x, branch, shortcut, affine, scale, keep, y, expected, values, partial, eps,
        pixels, per_run, pixels // len(x), channels, **TILE,
    )  # fmt: skip
    return y


def _residual_backward(
    grad: Tensor, branch: Tensor, shortcut: Tensor | None, affine: Tensor | None, scale: Tensor, keep: Tensor | None,
    behind: dict[str, Tensor | None],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of branch, (2, C) in fp32, of scale and of the branch's bias, and of affine; with what is known of a norm behind the sum,
    that of x is written too."""
    branch, shortcut = channels_last(branch), shortcut if shortcut is None else channels_last(shortcut)
    runs, per_run = runs_of_pixels(branch)
    pixels, channels = branch.numel() // branch.shape[1], branch.shape[1]
    branch_grad, partial = _like(branch, branch.dtype), torch.empty(runs, 3, channels, device=grad.device)
    residual_backward_kernel[grid(runs, channels)](
        grad, branch, shortcut, affine, scale, keep, branch_grad, partial, *(behind.get(name) for name in BEHIND),
        pixels, per_run, pixels // len(branch), channels, **TILE,
    )  # fmt: skip
    vectors, affine_grad = _vectors(scale), _affine_grad_like(scale, affine)
    branch_sums_kernel[(tiles(channels, SUMS["CHANNELS"]),)](partial, affine, vectors, affine_grad, runs, channels, **SUMS)
    return branch_grad, vectors, affine_grad


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
    x: Tensor, branch: Tensor, shortcut: Tensor | None, passed: Tensor | None, affine: Tensor | None, scale: Tensor, keep: Tensor | None,
    weight: Tensor, bias: Tensor, expected: Tensor, eps: float, dtype: torch.dtype, branch_bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _like(x, _promoted(x, branch, scale)), *_normed_like(x, dtype), *_statistics_like(x)


@_residual_norm_backward_operator.register_fake
def _(
    grad: Tensor, values_grad: Tensor, norm_grad: Tensor, passed_grad: Tensor | None, values: Tensor, moments: Tensor, norm_affine: Tensor,
    branch: Tensor, shortcut: Tensor | None, affine: Tensor | None, scale: Tensor, keep: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    branch_grad, vectors, affine_grad = _like(branch, branch.dtype), _vectors(scale), _affine_grad_like(scale, affine)
    return _like(grad, grad.dtype), torch.empty_like(norm_affine[0]), branch_grad, vectors, affine_grad


def _normed_like(y: Tensor, dtype: torch.dtype) -> Normed:
    values = _like(y, dtype)
    return Normed(values, torch.empty(4, y.shape[1], device=y.device), values.new_empty(1).expand_as(values))


def _statistics_like(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    mean, variance = (torch.empty(x.shape[1], device=x.device) for _ in range(2))
    return torch.empty(3, x.shape[1], device=x.device), mean, variance


def _vectors(scale: Tensor) -> Tensor:
    return torch.empty(2, len(scale), device=scale.device)


def _affine_grad_like(scale: Tensor, affine: Tensor | None) -> Tensor:
    return scale.new_empty(0) if affine is None else torch.empty_like(affine)


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
    x, branch, shortcut, passed, affine, scale, keep, weight, bias, _, _, _, branch_bias = inputs
    y, values, of_norm, _, *statistics = output
    ctx.types = [None if t is None else t.dtype for t in (x, y, passed, weight, bias, branch_bias)]
    ctx.mark_non_differentiable(*statistics)
    ctx.set_materialize_grads(False)  # or zeros would be made for the gradient of each of these
    ctx.save_for_backward(values, statistics[0], of_norm, branch, shortcut, affine, scale, keep)


def _residual_norm_gradients(
    ctx: Any, grad: Tensor | None, values_grad: Tensor | None, norm_grad: Tensor | None, passed_grad: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # once: what is computed again is given once
    values, _, of_norm, _, shortcut, affine, scale, _ = saved
    x_type, y_type, passed_type, weight_type, bias_type, branch_bias_type = ctx.types
    grad = torch.zeros_like(values, dtype=y_type) if grad is None else grad
    values_grad = torch.zeros_like(values) if values_grad is None else values_grad
    norm_grad = torch.zeros_like(of_norm) if norm_grad is None else norm_grad
    x_grad, weight_grad, branch_grad, vectors, affine_grad = _residual_norm_backward_operator(
        grad, values_grad, norm_grad, passed_grad, *saved
    )
    scale_grad, branch_bias_grad = _typed(vectors, scale.dtype, branch_bias_type)
    shortcut_grads = (
        (_of_shortcut(branch_grad, shortcut), None, None) if affine is None else (None, branch_grad.to(passed_type), affine_grad)
    )
    norm_grads = (weight_grad.to(weight_type), norm_grad[1].to(bias_type))
    return x_grad.to(x_type), branch_grad, *shortcut_grads, scale_grad, None, *norm_grads, None, None, None, branch_bias_grad


def _typed(vectors: Tensor, scale_type: torch.dtype, bias_type: torch.dtype | None) -> tuple[Tensor, Tensor | None]:
    return vectors[0].to(scale_type), None if bias_type is None else vectors[1].to(bias_type)


def _of_shortcut(branch_grad: Tensor, shortcut: Tensor | None) -> Tensor | None:
    return None if shortcut is None else branch_grad.to(shortcut.dtype)


_residual_operator.register_autograd(_residual_gradients, setup_context=_setup_residual)
_residual_norm_operator.register_autograd(_residual_norm_gradients, setup_context=_setup_residual_norm)
