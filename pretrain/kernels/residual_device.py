"""What runs on the GPU of `residual.py`, in Triton's dialect of Python: not called from here, nor checked by mypy (see pyproject.toml).

All maps are (N * H * W, C), pixels by channels. A program takes a tile of CHANNELS channels and a run of `per_run` pixels, PIXELS at once;
what it sums over them is one row of a partial (runs, …, C) in fp32, added up by another kernel in the order of the runs, so no bit depends
on who comes first. `shortcut`, `keep`, `partial` and `normed_grad` may be None: then nothing of theirs is compiled. `keep` may be a row of
what was drawn for many, and so begin anywhere.
"""

import triton
import triton.language as tl


@triton.jit
def run_of_pixels(per_run, pixels, channels, CHANNELS: tl.constexpr):
    """This program's run, its first pixel and the one behind its last, its channels, and which of these there are."""
    channel_tiles = tl.cdiv(channels, CHANNELS)
    tile = tl.program_id(0)
    run = tile // channel_tiles
    c = tile % channel_tiles * CHANNELS + tl.arange(0, CHANNELS)
    return run, run * per_run, tl.minimum((run + 1) * per_run, pixels), c, c < channels


@triton.jit
def places(pixel, end, c, some_channel, channels):
    """Where these pixels' channels lie, in 64 bits, and which are there."""
    return (pixel.to(tl.int64) * channels)[:, None] + c[None, :], (pixel < end)[:, None] & some_channel[None, :]


@triton.jit
def _branch(branch, shortcut, at, here):
    values = tl.load(branch + at, mask=here, other=0.0).to(tl.float32)
    if shortcut is not None:
        values += tl.load(shortcut + at, mask=here, other=0.0).to(tl.float32)
    return values


@triton.jit
def _kept(values, keep, pixel, end, map_pixels):
    if keep is not None:
        values *= tl.load(keep + pixel // map_pixels, mask=pixel < end, other=0.0)[:, None]
    return values


@triton.jit
def _sum(x, branch, shortcut, scales, keep, pixel, end, map_pixels, at, here):
    added = _kept(_branch(branch, shortcut, at, here) * scales, keep, pixel, end, map_pixels)
    return tl.load(x + at, mask=here, other=0.0).to(tl.float32) + added


@triton.jit(do_not_specialize=["pixels", "per_run", "map_pixels"], do_not_specialize_on_alignment=["keep"])
def residual_kernel(
    x, branch, shortcut, scale, keep, y, partial, pixels, per_run, map_pixels, channels, PIXELS: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    """y = x + keep * scale * (branch + shortcut), and with `partial` (runs, 2, C) the mean of a run's pixels and the sum of their squared
    distances from it. scale: (C,); keep: (N,). map_pixels: H * W."""
    run, begin, end, c, some_channel = run_of_pixels(per_run, pixels, channels, CHANNELS)
    scales = tl.load(scale + c, mask=some_channel).to(tl.float32)[None, :]
    # Distances are taken from the run's first pixel: from zero, squares would cancel out where the mean is far from it.
    if partial is not None:
        first_pixel = begin + tl.arange(0, 1)
        its_place, is_here = places(first_pixel, end, c, some_channel, channels)
        pivot = _sum(x, branch, shortcut, scales, keep, first_pixel, end, map_pixels, its_place, is_here)
        sums = tl.zeros((PIXELS, CHANNELS), tl.float32)
        squares = tl.zeros((PIXELS, CHANNELS), tl.float32)
    for first in range(begin, end, PIXELS):
        pixel = first + tl.arange(0, PIXELS)
        at, here = places(pixel, end, c, some_channel, channels)
        total = _sum(x, branch, shortcut, scales, keep, pixel, end, map_pixels, at, here)
        tl.store(y + at, total.to(y.dtype.element_ty), mask=here)
        if partial is not None:
            distance = tl.where(here, total - pivot, 0.0)
            sums += distance
            squares += distance * distance
    if partial is not None:
        count = end - begin
        offset = tl.sum(sums, 0) / count
        out = partial + run * 2 * channels + c
        tl.store(out, tl.sum(pivot, 0) + offset, mask=some_channel)
        tl.store(out + channels, tl.sum(squares, 0) - offset * offset * count, mask=some_channel)


@triton.jit(do_not_specialize=["runs", "pixels", "per_run"])
def statistics_kernel(
    partial, mean, rstd, variance, eps, runs, pixels, per_run, channels, RUNS: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    """From partial (runs, 2, C) of `residual_kernel`: mean, 1 / sqrt(variance of these values + eps), and the variance that they let
    expect of others, which BatchNorm keeps; each (C,)."""
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    some_channel = (c < channels)[None, :]
    weighted = tl.zeros((RUNS, CHANNELS), tl.float32)
    for first in range(0, runs, RUNS):
        run = first + tl.arange(0, RUNS)
        here = (run < runs)[:, None] & some_channel
        counts = tl.minimum(per_run, pixels - run * per_run).to(tl.float32)[:, None]
        weighted += tl.load(partial + (run * 2 * channels)[:, None] + c[None, :], mask=here, other=0.0) * counts
    center = tl.sum(weighted, 0) / pixels
    squares = tl.zeros((RUNS, CHANNELS), tl.float32)
    for first in range(0, runs, RUNS):
        run = first + tl.arange(0, RUNS)
        here = (run < runs)[:, None] & some_channel
        counts = tl.minimum(per_run, pixels - run * per_run).to(tl.float32)[:, None]
        at = (run * 2 * channels)[:, None] + c[None, :]
        distance = tl.load(partial + at, mask=here, other=0.0) - center[None, :]
        squares += tl.load(partial + channels + at, mask=here, other=0.0) + tl.where(here, distance * distance * counts, 0.0)
    total = tl.sum(squares, 0)
    tl.store(mean + c, center, mask=c < channels)
    tl.store(rstd + c, 1.0 / tl.sqrt(total / pixels + eps), mask=c < channels)
    tl.store(variance + c, total / (pixels - 1), mask=c < channels)


@triton.jit(do_not_specialize=["pixels", "per_run"])
def norm_kernel(y, mean, rstd, weight, bias, normed, pixels, per_run, channels, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):
    """normed = (y - mean) * rstd * weight + bias. mean, rstd, weight and bias: (C,)."""
    _, begin, end, c, some_channel = run_of_pixels(per_run, pixels, channels, CHANNELS)
    factor = tl.load(rstd + c, mask=some_channel) * tl.load(weight + c, mask=some_channel).to(tl.float32)
    center = tl.load(mean + c, mask=some_channel)
    offset = tl.load(bias + c, mask=some_channel).to(tl.float32)
    for first in range(begin, end, PIXELS):
        at, here = places(first + tl.arange(0, PIXELS), end, c, some_channel, channels)
        values = (tl.load(y + at, mask=here).to(tl.float32) - center[None, :]) * factor[None, :] + offset[None, :]
        tl.store(normed + at, values.to(normed.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["pixels", "per_run"])
def norm_sums_kernel(
    normed_grad, y, mean, rstd, partial, pixels, per_run, channels, PIXELS: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    """A run's part of the gradients of weight and bias: partial (runs, 2, C)."""
    run, begin, end, c, some_channel = run_of_pixels(per_run, pixels, channels, CHANNELS)
    center, factor = tl.load(mean + c, mask=some_channel)[None, :], tl.load(rstd + c, mask=some_channel)[None, :]
    products = tl.zeros((PIXELS, CHANNELS), tl.float32)
    sums = tl.zeros((PIXELS, CHANNELS), tl.float32)
    for first in range(begin, end, PIXELS):
        at, here = places(first + tl.arange(0, PIXELS), end, c, some_channel, channels)
        grad = tl.load(normed_grad + at, mask=here, other=0.0).to(tl.float32)
        products += tl.where(here, grad * ((tl.load(y + at, mask=here).to(tl.float32) - center) * factor), 0.0)
        sums += grad
    out = partial + run * 2 * channels + c
    tl.store(out, tl.sum(products, 0), mask=some_channel)
    tl.store(out + channels, tl.sum(sums, 0), mask=some_channel)


@triton.jit(do_not_specialize=["pixels", "per_run", "map_pixels"], do_not_specialize_on_alignment=["keep"])
def residual_backward_kernel(
    grad, branch, shortcut, scale, keep, branch_grad, partial,
    normed_grad, y, mean, rstd, weight, weight_grad, bias_grad, x_grad,
    pixels, per_run, map_pixels, channels, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """branch_grad = keep * scale * grad, and a run's part of the scale's gradient and of branch_grad's sum: partial (runs, 2, C).

    With `normed_grad`, of the norm behind y, `grad` is first made whole, and written to x_grad:
    grad + weight * rstd * (normed_grad - mean of it - normalised y * mean of their product), means over all pixels.
    """
    run, begin, end, c, some_channel = run_of_pixels(per_run, pixels, channels, CHANNELS)
    scales = tl.load(scale + c, mask=some_channel).to(tl.float32)[None, :]
    if normed_grad is not None:
        center, deviation = tl.load(mean + c, mask=some_channel)[None, :], tl.load(rstd + c, mask=some_channel)[None, :]
        factor = tl.load(weight + c, mask=some_channel).to(tl.float32)[None, :] * deviation
        mean_product = tl.load(weight_grad + c, mask=some_channel)[None, :] / pixels
        mean_grad = tl.load(bias_grad + c, mask=some_channel)[None, :] / pixels
    products = tl.zeros((PIXELS, CHANNELS), tl.float32)
    sums = tl.zeros((PIXELS, CHANNELS), tl.float32)
    for first in range(begin, end, PIXELS):
        pixel = first + tl.arange(0, PIXELS)
        at, here = places(pixel, end, c, some_channel, channels)
        whole = tl.load(grad + at, mask=here, other=0.0).to(tl.float32)
        if normed_grad is not None:
            normalised = (tl.load(y + at, mask=here, other=0.0).to(tl.float32) - center) * deviation
            whole += factor * (tl.load(normed_grad + at, mask=here, other=0.0).to(tl.float32) - mean_grad - normalised * mean_product)
            tl.store(x_grad + at, whole.to(x_grad.dtype.element_ty), mask=here)
        kept = _kept(whole, keep, pixel, end, map_pixels)
        products += tl.where(here, kept * _branch(branch, shortcut, at, here), 0.0)
        sums += tl.where(here, kept, 0.0)
        tl.store(branch_grad + at, (kept * scales).to(branch_grad.dtype.element_ty), mask=here)
    out = partial + run * 2 * channels + c
    tl.store(out, tl.sum(products, 0), mask=some_channel)
    tl.store(out + channels, tl.sum(sums * scales, 0), mask=some_channel)
