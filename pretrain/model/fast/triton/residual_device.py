"""What runs on the GPU of `residual.py`, in Triton's dialect of Python: not called from here, nor checked by mypy (see pyproject.toml).

All maps are (N * H * W, C), pixels by channels. A program takes a tile of CHANNELS channels and a run of `per_run` pixels, PIXELS at once;
what it sums over them is one row of a partial (runs, …, C) in fp32, added up by another kernel in the order of the runs, so no bit depends
on who comes first. `shortcut`, `affine`, `keep`, `partial`, `values_grad` and `passed_grad` may be None: then nothing of theirs is
compiled. `keep` may be a row of what was drawn for many, and so begin anywhere. With `affine` (4, C), the shortcut is
shortcut * affine[0] + affine[1].
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
def _row(vectors, row, channels, c, some_channel):
    """A row of (…, C), to be multiplied with pixels."""
    return tl.load(vectors + row * channels + c, mask=some_channel, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _kept(values, keep, pixel, end, map_pixels):
    if keep is not None:
        values *= tl.load(keep + pixel // map_pixels, mask=pixel < end, other=0.0)[:, None]
    return values


@triton.jit
def _sum(x, branch, shortcut, affine, factor, offset, scales, keep, pixel, end, map_pixels, at, here):
    added = tl.load(branch + at, mask=here, other=0.0).to(tl.float32)
    if shortcut is not None:
        own = tl.load(shortcut + at, mask=here, other=0.0).to(tl.float32)
        added += own * factor + offset if affine is not None else own
    return tl.load(x + at, mask=here, other=0.0).to(tl.float32) + _kept(added * scales, keep, pixel, end, map_pixels)


@triton.jit(do_not_specialize=["pixels", "per_run", "map_pixels"], do_not_specialize_on_alignment=["keep"])
def residual_kernel(
    x, branch, shortcut, affine, scale, keep, y, expected, values, partial, eps, pixels, per_run, map_pixels, channels,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """y = x + keep * scale * (branch + shortcut). With `partial` (runs, 2, C), into this the mean of a run's pixels and the sum of their
    squared distances from it, and values = y normed by the mean and variance that are `expected` (2, C). scale: (C,); keep: (N,).
    map_pixels: H * W."""
    run, begin, end, c, some_channel = run_of_pixels(per_run, pixels, channels, CHANNELS)
    scales = _row(scale, 0, channels, c, some_channel)
    factor, offset = scales, scales  # which nothing reads where there is no `affine`
    if affine is not None:
        factor, offset = _row(affine, 0, channels, c, some_channel), _row(affine, 1, channels, c, some_channel)
    # Distances are taken from the run's first pixel: from zero, squares would cancel out where the mean is far from it.
    if partial is not None:
        center = _row(expected, 0, channels, c, some_channel)
        deviation = 1.0 / tl.sqrt(_row(expected, 1, channels, c, some_channel) + eps)
        first_pixel = begin + tl.arange(0, 1)
        its_place, is_here = places(first_pixel, end, c, some_channel, channels)
        pivot = _sum(x, branch, shortcut, affine, factor, offset, scales, keep, first_pixel, end, map_pixels, its_place, is_here)
        sums = tl.zeros((PIXELS, CHANNELS), tl.float32)
        squares = tl.zeros((PIXELS, CHANNELS), tl.float32)
    for first in range(begin, end, PIXELS):
        pixel = first + tl.arange(0, PIXELS)
        at, here = places(pixel, end, c, some_channel, channels)
        total = _sum(x, branch, shortcut, affine, factor, offset, scales, keep, pixel, end, map_pixels, at, here)
        tl.store(y + at, total.to(y.dtype.element_ty), mask=here)
        if partial is not None:
            tl.store(values + at, ((total - center) * deviation).to(values.dtype.element_ty), mask=here)
            distance = tl.where(here, total - pivot, 0.0)
            sums += distance
            squares += distance * distance
    if partial is not None:
        count = end - begin
        distance = tl.sum(sums, 0) / count
        out = partial + run * 2 * channels + c
        tl.store(out, tl.sum(pivot, 0) + distance, mask=some_channel)
        tl.store(out + channels, tl.sum(squares, 0) - distance * distance * count, mask=some_channel)


@triton.jit(do_not_specialize=["runs", "pixels", "per_run"])
def statistics_kernel(
    partial, expected, weight, bias, mean, variance, moments, affine, eps, runs, pixels, per_run, channels,
    RUNS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """From partial (runs, 2, C) of `residual_kernel` the sum's mean, and the variance that its values let expect of others, which BatchNorm
    keeps, (C,). moments (3, C): mean and 1 / deviation of `values`, which is normed as was `expected`, and 1 / that deviation. affine
    (4, C): what makes of `values` the norm's output, a factor and an offset; and twice zero."""
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
    there = c < channels
    tl.store(mean + c, center, mask=there)
    tl.store(variance + c, total / (pixels - 1), mask=there)
    expected_deviation = tl.sqrt(tl.load(expected + channels + c, mask=there) + eps)
    own_center = (center - tl.load(expected + c, mask=there)) / expected_deviation
    own_deviation = expected_deviation / tl.sqrt(total / pixels + eps)
    tl.store(moments + c, own_center, mask=there)
    tl.store(moments + channels + c, own_deviation, mask=there)
    tl.store(moments + 2 * channels + c, 1.0 / expected_deviation, mask=there)
    factor = tl.load(weight + c, mask=there).to(tl.float32) * own_deviation
    tl.store(affine + c, factor, mask=there)
    tl.store(affine + channels + c, tl.load(bias + c, mask=there).to(tl.float32) - factor * own_center, mask=there)
    nothing = tl.zeros((CHANNELS,), tl.float32)
    tl.store(affine + 2 * channels + c, nothing, mask=there)
    tl.store(affine + 3 * channels + c, nothing, mask=there)


@triton.jit(do_not_specialize=["pixels", "per_run", "map_pixels"], do_not_specialize_on_alignment=["keep"])
def residual_backward_kernel(
    grad, branch, shortcut, affine, scale, keep, branch_grad, partial,
    values_grad, passed_grad, values, moments, norm_affine, norm_grad, x_grad, weight_grad,
    pixels, per_run, map_pixels, channels, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """branch_grad = keep * scale * grad, and a run's part of three sums: of the scale's gradient, of branch_grad, and with `affine` of
    branch_grad * shortcut; partial (runs, 3, C).

    With `values_grad`, of what is normed behind the sum, `grad` is first made whole, and written to x_grad. To it is added, times the
    last of `moments`, the gradient of the values, values_grad + norm_affine[0] * passed_grad, less its mean, and less the normed values
    times the mean of its product with these. The sums for the two means are the last rows of norm_grad (4, C). weight_grad: (C,), of
    the norm.
    """
    run, begin, end, c, some_channel = run_of_pixels(per_run, pixels, channels, CHANNELS)
    scales = _row(scale, 0, channels, c, some_channel)
    if values_grad is not None:
        center, deviation = _row(moments, 0, channels, c, some_channel), _row(moments, 1, channels, c, some_channel)
        of_factor, of_offset = _row(norm_grad, 0, channels, c, some_channel), _row(norm_grad, 1, channels, c, some_channel)
        if run == 0:
            tl.store(weight_grad + c[None, :], deviation * (of_factor - center * of_offset), mask=some_channel[None, :])
        sum_, product = _row(norm_grad, 2, channels, c, some_channel), _row(norm_grad, 3, channels, c, some_channel)
        # Of values, their gradient and what is passed: all that the loop takes, in few registers.
        by_values_grad = _row(moments, 2, channels, c, some_channel)
        by_passed = by_values_grad * _row(norm_affine, 0, channels, c, some_channel)
        by_values = -by_values_grad * deviation * deviation * (product - center * sum_) / pixels
        added = -by_values_grad * sum_ / pixels - by_values * center
    sums = tl.zeros((PIXELS, CHANNELS), tl.float32)
    of_branch = tl.zeros((PIXELS, CHANNELS), tl.float32)
    of_shortcut = tl.zeros((PIXELS, CHANNELS), tl.float32)
    for first in range(begin, end, PIXELS):
        pixel = first + tl.arange(0, PIXELS)
        at, here = places(pixel, end, c, some_channel, channels)
        whole = tl.load(grad + at, mask=here, other=0.0).to(tl.float32)
        if values_grad is not None:
            whole += by_values_grad * tl.load(values_grad + at, mask=here, other=0.0).to(tl.float32) + added
            whole += by_values * tl.load(values + at, mask=here, other=0.0).to(tl.float32)
            if passed_grad is not None:
                whole += by_passed * tl.load(passed_grad + at, mask=here, other=0.0).to(tl.float32)
            tl.store(x_grad + at, whole.to(x_grad.dtype.element_ty), mask=here)
        kept = tl.where(here, _kept(whole, keep, pixel, end, map_pixels), 0.0)
        sums += kept
        of_branch += kept * tl.load(branch + at, mask=here, other=0.0).to(tl.float32)
        if shortcut is not None:
            of_shortcut += kept * tl.load(shortcut + at, mask=here, other=0.0).to(tl.float32)
        tl.store(branch_grad + at, (kept * scales).to(branch_grad.dtype.element_ty), mask=here)
    out = partial + run * 3 * channels + c
    total, of_scale, products = tl.sum(sums, 0), tl.sum(of_branch, 0), tl.sum(of_shortcut, 0)
    if affine is not None:
        factor, offset = tl.load(affine + c, mask=some_channel), tl.load(affine + channels + c, mask=some_channel)
        of_scale += products * factor + total * offset
    else:
        of_scale += products
    tl.store(out, of_scale, mask=some_channel)
    scaled = tl.load(scale + c, mask=some_channel).to(tl.float32)
    tl.store(out + channels, total * scaled, mask=some_channel)
    if affine is not None:
        tl.store(out + 2 * channels, products * scaled, mask=some_channel)


@triton.jit
def _over_runs(partial, row, runs, channels, c, some_channel, RUNS: tl.constexpr, CHANNELS: tl.constexpr):
    sums = tl.zeros((RUNS, CHANNELS), tl.float32)
    for first in range(0, runs, RUNS):
        run = first + tl.arange(0, RUNS)
        at = ((run * 3 + row) * channels)[:, None] + c[None, :]
        sums += tl.load(partial + at, mask=(run < runs)[:, None] & some_channel[None, :], other=0.0)
    return tl.sum(sums, 0)


@triton.jit(do_not_specialize=["runs"])
def branch_sums_kernel(partial, affine, vectors, affine_grad, runs, channels, RUNS: tl.constexpr, CHANNELS: tl.constexpr):
    """Adds up partial (runs, 3, C) of `residual_backward_kernel`: into vectors (2, C) its first rows, and into affine_grad (4, C) what the
    shortcut gives each row of `affine`: sums of its gradient times what is multiplied, of its gradient, and of that of what is
    multiplied by itself and times that."""
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    some_channel = c < channels
    of_branch = _over_runs(partial, 1, runs, channels, c, some_channel, RUNS, CHANNELS)
    tl.store(vectors + c, _over_runs(partial, 0, runs, channels, c, some_channel, RUNS, CHANNELS), mask=some_channel)
    tl.store(vectors + channels + c, of_branch, mask=some_channel)
    if affine is not None:
        products = _over_runs(partial, 2, runs, channels, c, some_channel, RUNS, CHANNELS)
        factor = tl.load(affine + c, mask=some_channel)
        tl.store(affine_grad + c, products, mask=some_channel)
        tl.store(affine_grad + channels + c, of_branch, mask=some_channel)
        tl.store(affine_grad + 2 * channels + c, factor * of_branch, mask=some_channel)
        tl.store(affine_grad + 3 * channels + c, factor * products, mask=some_channel)
