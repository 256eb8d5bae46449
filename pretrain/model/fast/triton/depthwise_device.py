"""Triton kernels of `depthwise.py`, which mypy does not check (see pyproject.toml).

One kernel computes the output and the input gradient, two compute the gradients of weight and bias. Padding keeps the map's size;
convolution kernels are odd and square. `tiling.py` describes how the work is divided. Only the final sums, of the weight gradient and of
`partial`, go through shared memory; neighboring strips share values through the L1 cache.

Activations are (N, H, W, C) in bf16, fp16 or fp32, of any size; sums are fp32. Pixel indices are 64-bit, as a batch may hold more than
2**31 values; offsets within an image are 32-bit. Tuples hold values that must stay in registers, so loops over them are unrolled.

H, W and C are constants: a kernel is compiled per layer shape, not per batch size. So row offsets are immediates of the load instructions;
computing them would cost as many instructions as converting the loaded values.
"""

import triton
import triton.language as tl


@triton.jit
def _place(strip, H: tl.constexpr, W: tl.constexpr, D: tl.constexpr, R: tl.constexpr, STRIPS: tl.constexpr):
    """Returns the first pixel of a strip in its batch (64 bits), and the row and column of that pixel."""
    column = strip % W
    rest = strip // W
    phase = rest % D
    rest = rest // D
    top = rest % STRIPS * (R * D) + phase
    image = (rest // STRIPS).to(tl.int64)
    return (image * H + top) * W + column, top, column


@triton.jit
def _normal(z):
    """Returns the standard normal CDF at z, and exp(-z * z / 2).

    Formula 7.1.26 of Abramowitz and Stegun, to within 1e-7, with its factors combined. libdevice's erf takes twice the instructions and
    would make a memory-bound kernel compute-bound.
    """
    bell = tl.exp2(z * z * -0.7213475204444817)
    v = 1.0 + 0.23164188826 * tl.abs(z)
    t = tl.rsqrt(v * v)  # 1 / v in fewer instructions than a division, which first scales its operands
    tail = bell * t * (0.127414796 + t * (-0.142248368 + t * (0.7107068705 + t * (-0.7265760135 + t * 0.5307027145))))
    return tl.where(z < 0, tail, 1.0 - tail), bell


@triton.jit
def _gelu(z):
    return z * _normal(z)[0]


@triton.jit
def _gelu_derivative(z):
    cdf, bell = _normal(z)
    return cdf + z * bell * 0.3989422804014327


@triton.jit
def _add_rows(
    sums, factors, pointers, inside, top,
    H: tl.constexpr, W: tl.constexpr, C: tl.constexpr, K: tl.constexpr, D: tl.constexpr, R: tl.constexpr, STRIPS: tl.constexpr,
):  # fmt: skip
    """Returns `sums` with factors[t - i] * (input row t) added to sums[i], for each input row t of the strip.

    The convolution has a sum per output row and a factor per kernel row, the weight gradient a sum per kernel row and a factor per output
    row. `pointers` lead to the strip's first pixel, in the input column; `inside` masks lanes whose column is outside of the map.
    """
    # If a single strip covers the phase, all other rows are padding.
    first: tl.constexpr = K // 2 if STRIPS == 1 else 0
    rows: tl.constexpr = R if STRIPS == 1 else R + K - 1
    for t in tl.static_range(first, first + rows):
        row = top + (t - K // 2) * D
        exists = inside & ((row >= 0) & (row < H))[:, None]
        values = tl.load(pointers + (t - K // 2) * D * W * C, mask=exists, other=0.0).to(tl.float32)
        added = ()
        for i in tl.static_range(len(sums)):
            if (i <= t) and (t < i + len(factors)):
                added = added + (sums[i] + values * factors[t - i],)
            else:
                added = added + (sums[i],)
        sums = added
    return sums


@triton.jit(do_not_specialize=["total", "reach"])
def conv_kernel(
    x, taps, bias, grad, inner, y, partial, total, reach,
    H: tl.constexpr, W: tl.constexpr, C: tl.constexpr, K: tl.constexpr, D: tl.constexpr, R: tl.constexpr, STRIPS: tl.constexpr,
    FLIP: tl.constexpr, GELU: tl.constexpr, LANES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Computes a tile of strips of the output.

    Args:
        x, y: (N, H, W, C).
        taps: (K * K, C) fp32.
        bias: (C,) or None.
        grad, inner: as GELU requires, in y's layout, else None.
        partial: (tiles of strips, C) fp32, the tile's sum of y before rounding, or None.
        total: number of strips.
        reach: number of kernel columns on either side of the middle one that overlap the map.
        FLIP: rotate the kernel by 180 degrees.
        GELU: "after" applies GELU to the sums; "gradient" multiplies `grad` by GELU's derivative at the sums; "gradient before" adds `grad`
            to the sums and multiplies by the derivative at `inner`.
    """
    # Consecutive programs process the channels of the same pixels, which share memory pages.
    channel_tiles: tl.constexpr = (C + CHANNELS - 1) // CHANNELS
    tile = tl.program_id(0)
    c = tile % channel_tiles * CHANNELS + tl.arange(0, CHANNELS)
    strip = tile // channel_tiles * LANES + tl.arange(0, LANES)
    pixel, top, column = _place(strip, H, W, D, R, STRIPS)
    at = (pixel * C)[:, None] + c[None, :]
    channel_exists = c < C
    inside = (strip < total)[:, None]
    if C % CHANNELS != 0:
        inside = inside & channel_exists[None, :]

    sums = (tl.zeros((LANES, CHANNELS), tl.float32),) * R
    # `reach` follows from K, W and D, but with a constant the compiler would unroll this loop and run out of registers.
    for j in range(K // 2 - reach, K // 2 + reach + 1):
        weights = ()
        for i in tl.static_range(K):
            tap = K * K - 1 - (i * K + j) if FLIP else i * K + j
            weights = weights + (tl.load(taps + tap * C + c, mask=channel_exists)[None, :],)
        shift = (j - K // 2) * D
        shifted = x + at + shift * C
        column_exists = inside & ((column + shift >= 0) & (column + shift < W))[:, None]
        sums = _add_rows(sums, weights, shifted, column_exists, top, H, W, C, K, D, R, STRIPS)

    offset = tl.zeros((1, CHANNELS), tl.float32)
    if bias is not None:
        offset = tl.load(bias + c, mask=channel_exists).to(tl.float32)[None, :]
    if partial is not None:
        tile_sum = tl.zeros((LANES, CHANNELS), tl.float32)
    for r in tl.static_range(R):
        exists = inside & (top + r * D < H)[:, None]
        result = sums[r] + offset
        if GELU == "after":
            result = _gelu(result)
        elif GELU == "gradient":
            result = tl.load(grad + at + r * D * W * C, mask=exists).to(tl.float32) * _gelu_derivative(result)
        elif GELU == "gradient before":
            result += tl.load(grad + at + r * D * W * C, mask=exists).to(tl.float32)
            result *= _gelu_derivative(tl.load(inner + at + r * D * W * C, mask=exists).to(tl.float32))
        tl.store(y + at + r * D * W * C, result.to(y.dtype.element_ty), mask=exists)
        if partial is not None:
            tile_sum += tl.where(exists, result, 0.0)
    if partial is not None:
        tl.store(partial + tile // channel_tiles * C + c, tl.sum(tile_sum, 0), mask=channel_exists)


@triton.jit(do_not_specialize=["total", "per_run"])
def weight_gradient_kernel(
    x, grad, partial, total, per_run,
    H: tl.constexpr, W: tl.constexpr, C: tl.constexpr, K: tl.constexpr, D: tl.constexpr, R: tl.constexpr, STRIPS: tl.constexpr,
    LANES: tl.constexpr, CHANNELS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Computes the sums of one run of `per_run` strips, for a tile of channels.

    x and grad (of the output): (N, H, W, C). partial: (runs, K * K + 1, C) fp32; its last row is the bias's. A lane handles a strip and one
    of COLUMNS kernel columns, of which those beyond K are idle, and keeps a sum per kernel row.
    """
    channel_tiles: tl.constexpr = (C + CHANNELS - 1) // CHANNELS
    tile = tl.program_id(0)
    c = tile % channel_tiles * CHANNELS + tl.arange(0, CHANNELS)
    run = tile // channel_tiles
    lane = tl.arange(0, LANES)
    kernel_column = lane % COLUMNS
    shift = (kernel_column - K // 2) * D
    channel_exists = (c < C)[None, :]
    used = (kernel_column < K)[:, None]
    if C % CHANNELS != 0:
        used = used & channel_exists

    sums = (tl.zeros((LANES, CHANNELS), tl.float32),) * K
    bias_sum = tl.zeros((LANES, CHANNELS), tl.float32)
    end = tl.minimum((run + 1) * per_run, total)
    for first in range(run * per_run, end, LANES // COLUMNS):
        strip = first + lane // COLUMNS
        pixel, top, column = _place(strip, H, W, D, R, STRIPS)
        at = (pixel * C)[:, None] + c[None, :]
        inside = used & (strip < end)[:, None]
        gradients = ()
        for r in tl.static_range(R):
            exists = inside & (top + r * D < H)[:, None]
            gradients = gradients + (tl.load(grad + at + r * D * W * C, mask=exists, other=0.0).to(tl.float32),)
            bias_sum += gradients[r]
        shifted = x + at + (shift * C)[:, None]
        column_exists = inside & ((column + shift >= 0) & (column + shift < W))[:, None]
        sums = _add_rows(sums, gradients, shifted, column_exists, top, H, W, C, K, D, R, STRIPS)

    j = tl.arange(0, COLUMNS)
    out = partial + run * (K * K + 1) * C + c[None, :]
    tap_exists = (j < K)[:, None] & channel_exists
    for i in tl.static_range(K):
        over_strips = tl.sum(tl.reshape(sums[i], (LANES // COLUMNS, COLUMNS, CHANNELS)), 0)
        tl.store(out + (i * K + j)[:, None] * C, over_strips, mask=tap_exists)
    # All kernel columns hold the same bias sums; store one.
    over_strips = tl.sum(tl.reshape(bias_sum, (LANES // COLUMNS, COLUMNS, CHANNELS)), 0)
    tl.store(out + (K * K + j)[:, None] * C, over_strips, mask=tap_exists & (j == 0)[:, None])


@triton.jit(do_not_specialize=["runs"])
def sum_runs_kernel(
    partial, weight_grad, bias_grad, runs, channels, TAPS: tl.constexpr, RUNS: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    """Sums partial (runs, TAPS + 1, C) over the runs, in their order, into weight_grad (C, TAPS) and bias_grad (C,)."""
    tap = tl.program_id(0)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    channel_exists = c < channels
    sums = tl.zeros((RUNS, CHANNELS), tl.float32)
    for first in range(0, runs, RUNS):
        run = first + tl.arange(0, RUNS)
        at = (run * (TAPS + 1) + tap)[:, None] * channels + c[None, :]
        sums += tl.load(partial + at, mask=(run < runs)[:, None] & channel_exists[None, :], other=0.0)
    total = tl.sum(sums, 0)
    if tap < TAPS:
        tl.store(weight_grad + c * TAPS + tap, total.to(weight_grad.dtype.element_ty), mask=channel_exists)
    else:
        tl.store(bias_grad + c, total.to(bias_grad.dtype.element_ty), mask=channel_exists)
