"""Triton kernels of `residual.py`, which mypy does not check (see pyproject.toml).

Maps are matrices (N * H * W, C) of pixels by channels. A program processes a tile of CHANNELS channels and a run of `per_run` pixels,
PIXELS at a time. Its sums over the run are one row of a partial result (runs, …, C) in fp32. The rows are added up afterwards, so the
result does not depend on the order in which programs end. If `shortcut` or `keep` is None, its code is not compiled.
"""

import triton
import triton.language as tl


@triton.jit
def run_of_pixels(per_run, pixels, channels, CHANNELS: tl.constexpr):
    """Returns this program's run, the run's first pixel and the pixel after its last, its channels, and the mask of existing channels."""
    channel_tiles = tl.cdiv(channels, CHANNELS)
    tile = tl.program_id(0)
    run = tile // channel_tiles
    c = tile % channel_tiles * CHANNELS + tl.arange(0, CHANNELS)
    return run, run * per_run, tl.minimum((run + 1) * per_run, pixels), c, c < channels


@triton.jit
def places(pixel, end, c, channel_exists, channels):
    """Returns the 64-bit offsets of these pixels' channels, and the mask of those that exist."""
    return (pixel.to(tl.int64) * channels)[:, None] + c[None, :], (pixel < end)[:, None] & channel_exists[None, :]


@triton.jit
def _times_keep(values, keep, pixel, end, map_pixels):
    if keep is not None:
        values *= tl.load(keep + pixel // map_pixels, mask=pixel < end, other=0.0)[:, None]
    return values


@triton.jit(do_not_specialize=["pixels", "per_run", "map_pixels"])
def residual_kernel(
    x, branch, shortcut, scale, keep, y, pixels, per_run, map_pixels, channels, PIXELS: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    """Computes y = x + keep * scale * (branch + shortcut). scale: (C,); keep: (N,); map_pixels: H * W."""
    _, begin, end, c, channel_exists = run_of_pixels(per_run, pixels, channels, CHANNELS)
    scales = tl.load(scale + c, mask=channel_exists, other=0.0).to(tl.float32)[None, :]
    for first in range(begin, end, PIXELS):
        pixel = first + tl.arange(0, PIXELS)
        at, exists = places(pixel, end, c, channel_exists, channels)
        added = tl.load(branch + at, mask=exists, other=0.0).to(tl.float32)
        if shortcut is not None:
            added += tl.load(shortcut + at, mask=exists, other=0.0).to(tl.float32)
        total = tl.load(x + at, mask=exists, other=0.0).to(tl.float32) + _times_keep(added * scales, keep, pixel, end, map_pixels)
        tl.store(y + at, total.to(y.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=["pixels", "per_run", "map_pixels"])
def residual_backward_kernel(
    grad, branch, shortcut, scale, keep, branch_grad, partial, pixels, per_run, map_pixels, channels,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Computes branch_grad = keep * scale * grad, and this run's sums of the scale's gradient and branch_grad: partial (runs, 2, C)."""
    run, begin, end, c, channel_exists = run_of_pixels(per_run, pixels, channels, CHANNELS)
    scales = tl.load(scale + c, mask=channel_exists, other=0.0).to(tl.float32)[None, :]
    sums = tl.zeros((PIXELS, CHANNELS), tl.float32)
    products = tl.zeros((PIXELS, CHANNELS), tl.float32)
    for first in range(begin, end, PIXELS):
        pixel = first + tl.arange(0, PIXELS)
        at, exists = places(pixel, end, c, channel_exists, channels)
        kept = tl.load(grad + at, mask=exists, other=0.0).to(tl.float32)
        kept = tl.where(exists, _times_keep(kept, keep, pixel, end, map_pixels), 0.0)
        added = tl.load(branch + at, mask=exists, other=0.0).to(tl.float32)
        if shortcut is not None:
            added += tl.load(shortcut + at, mask=exists, other=0.0).to(tl.float32)
        sums += kept
        products += kept * added
        tl.store(branch_grad + at, (kept * scales).to(branch_grad.dtype.element_ty), mask=exists)
    out = partial + run * 2 * channels + c
    tl.store(out, tl.sum(products, 0), mask=channel_exists)
    tl.store(out + channels, tl.sum(sums * scales, 0), mask=channel_exists)
