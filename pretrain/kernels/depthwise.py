"""Triton kernels of depth-wise convolution: output and input gradient by one kernel, weight and bias gradient by two.

All take activations as (N, C, H, W), channels-last, in bf16, fp16 or fp32, of any size, and sum in fp32. Padding keeps the map's size;
kernels are odd and square. `tiling.py` says how the work is cut. Offsets of images are 64 bits wide, as a batch may hold more
than 2**31 values; those within one image are 32 bits.

Nothing goes through shared memory but the last sums of the weight gradient: what neighbouring strips share comes from the L1 cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pretrain.kernels.tiling import (
    CHANNELS,
    LANES,
    MOST_ROWS,
    MOST_ROWS_WEIGHT_GRADIENT,
    REGISTERS,
    WARPS,
    column_lanes,
    splits,
    strips,
)

# Triton compiles a kernel anew for each value of these that is 1 or a multiple of 16; they are only counted with.
_COUNTS = ["total", "height", "width", "strips"]
LAUNCH = {"num_warps": WARPS, "maxnreg": REGISTERS}


@triton.jit
def _place(strip, height, width, strips, D: tl.constexpr, R: tl.constexpr):
    """The first pixel of a strip in its batch (64 bits), and that pixel's row and column."""
    column = strip % width
    rest = strip // width
    phase = rest % D
    rest = rest // D
    top = rest % strips * (R * D) + phase
    image = (rest // strips).to(tl.int64)
    return (image * height + top) * width + column, top, column


@triton.jit
def _gelu(z):
    return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))


@triton.jit
def _gelu_derivative(z):
    return 0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)


@triton.jit(do_not_specialize=[*_COUNTS, "reach"])
def conv_kernel(
    x, taps, bias, grad, y, total, height, width, channels, strips, reach,
    K: tl.constexpr, D: tl.constexpr, R: tl.constexpr, WHOLE: tl.constexpr, FLIP: tl.constexpr, GELU: tl.constexpr,
    LANES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """A tile of strips of the output.

    x and y: (N, H, W, C); taps: (K * K, C) fp32; bias: (C,) or None. FLIP turns the kernel round. GELU "after" applies it to the
    sums; "derivative" multiplies `grad`, which lies as y, by its derivative at the sums. `reach`: the columns of the kernel on
    either side of its middle that meet the map at all. WHOLE: a strip covers its phase.
    """
    # Programs that follow one another take the channels of the same pixels, which lie in the same pages of memory.
    channel_tiles = tl.cdiv(channels, CHANNELS)
    tile = tl.program_id(0)
    c = tile % channel_tiles * CHANNELS + tl.arange(0, CHANNELS)
    strip = tile // channel_tiles * LANES + tl.arange(0, LANES)
    pixel, top, column = _place(strip, height, width, strips, D, R)
    at = (pixel * channels)[:, None] + c[None, :]
    some_channel = c < channels
    inside = (strip < total)[:, None] & some_channel[None, :]
    row_step = D * width * channels

    sums = (tl.zeros((LANES, CHANNELS), tl.float32),) * R
    for j in range(K // 2 - reach, K // 2 + reach + 1):
        weights = ()
        for i in tl.static_range(K):
            tap = K * K - 1 - (i * K + j) if FLIP else i * K + j
            weights = weights + (tl.load(taps + tap * channels + c, mask=some_channel, other=0.0)[None, :],)
        shift = (j - K // 2) * D
        shifted = x + at + shift * channels
        some_column = inside & ((column + shift >= 0) & (column + shift < width))[:, None]
        for t in tl.static_range(K // 2 if WHOLE else 0, K // 2 + R if WHOLE else R + K - 1):
            row = top + (t - K // 2) * D
            here = some_column & ((row >= 0) & (row < height))[:, None]
            values = tl.load(shifted + (t - K // 2) * row_step, mask=here, other=0.0).to(tl.float32)
            added = ()
            for r in tl.static_range(R):
                if (r <= t) and (t < r + K):
                    added = added + (sums[r] + values * weights[t - r],)
                else:
                    added = added + (sums[r],)
            sums = added

    offset = tl.zeros((1, CHANNELS), tl.float32)
    if bias is not None:
        offset = tl.load(bias + c, mask=some_channel, other=0.0).to(tl.float32)[None, :]
    for r in tl.static_range(R):
        here = inside & (top + r * D < height)[:, None]
        result = sums[r] + offset
        if GELU == "after":
            result = _gelu(result)
        elif GELU == "derivative":
            result = tl.load(grad + at + r * row_step, mask=here, other=0.0).to(tl.float32) * _gelu_derivative(result)
        tl.store(y + at + r * row_step, result.to(y.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=[*_COUNTS, "per_run"])
def weight_gradient_kernel(
    x, grad, partial, total, per_run, height, width, channels, strips,
    K: tl.constexpr, D: tl.constexpr, R: tl.constexpr, WHOLE: tl.constexpr,
    LANES: tl.constexpr, CHANNELS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The sums of one run of strips, for a tile of channels.

    x and grad (of the output): (N, H, W, C). partial: (runs, K * K + 1, C) fp32, of which the last row is the bias's. A lane is a
    strip and a column of the kernel (COLUMNS of them, the last ones idle), and keeps a sum for each row of the kernel.
    """
    channel_tiles = tl.cdiv(channels, CHANNELS)
    tile = tl.program_id(0)
    c = tile % channel_tiles * CHANNELS + tl.arange(0, CHANNELS)
    run = tile // channel_tiles
    lane = tl.arange(0, LANES)
    kernel_column = lane % COLUMNS
    shift = (kernel_column - K // 2) * D
    some_channel = (c < channels)[None, :]
    used = (kernel_column < K)[:, None] & some_channel
    row_step = D * width * channels

    sums = (tl.zeros((LANES, CHANNELS), tl.float32),) * K
    bias_sum = tl.zeros((LANES, CHANNELS), tl.float32)
    end = tl.minimum((run + 1) * per_run, total)
    for first in range(run * per_run, end, LANES // COLUMNS):
        strip = first + lane // COLUMNS
        pixel, top, column = _place(strip, height, width, strips, D, R)
        at = (pixel * channels)[:, None] + c[None, :]
        inside = used & (strip < end)[:, None]
        gradients = ()
        for r in tl.static_range(R):
            here = inside & (top + r * D < height)[:, None]
            gradients = gradients + (tl.load(grad + at + r * row_step, mask=here, other=0.0).to(tl.float32),)
            bias_sum += gradients[r]
        shifted = x + at + (shift * channels)[:, None]
        some_column = inside & ((column + shift >= 0) & (column + shift < width))[:, None]
        for t in tl.static_range(K // 2 if WHOLE else 0, K // 2 + R if WHOLE else R + K - 1):
            row = top + (t - K // 2) * D
            here = some_column & ((row >= 0) & (row < height))[:, None]
            values = tl.load(shifted + (t - K // 2) * row_step, mask=here, other=0.0).to(tl.float32)
            added = ()
            for i in tl.static_range(K):
                if (i <= t) and (t < i + R):
                    added = added + (sums[i] + values * gradients[t - i],)
                else:
                    added = added + (sums[i],)
            sums = added

    j = tl.arange(0, COLUMNS)
    out = partial + run * (K * K + 1) * channels + c[None, :]
    some_tap = (j < K)[:, None] & some_channel
    for i in tl.static_range(K):
        over_strips = tl.sum(tl.reshape(sums[i], (LANES // COLUMNS, COLUMNS, CHANNELS)), 0)
        tl.store(out + (i * K + j)[:, None] * channels, over_strips, mask=some_tap)
    # Every column of the kernel added up the same gradients; one is kept.
    over_strips = tl.sum(tl.reshape(bias_sum, (LANES // COLUMNS, COLUMNS, CHANNELS)), 0)
    tl.store(out + (K * K + j)[:, None] * channels, over_strips, mask=some_tap & (j == 0)[:, None])


@triton.jit(do_not_specialize=["runs"])
def sum_runs_kernel(
    partial, weight_grad, bias_grad, runs, channels, TAPS: tl.constexpr, RUNS: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    """Adds up partial (runs, TAPS + 1, C), in the order of the runs, into weight_grad (C, TAPS) and bias_grad (C,)."""
    tap = tl.program_id(0)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    some_channel = c < channels
    sums = tl.zeros((RUNS, CHANNELS), tl.float32)
    for first in range(0, runs, RUNS):
        run = first + tl.arange(0, RUNS)
        at = (run * (TAPS + 1) + tap)[:, None] * channels + c[None, :]
        sums += tl.load(partial + at, mask=(run < runs)[:, None] & some_channel[None, :], other=0.0)
    total = tl.sum(sums, 0)
    if tap < TAPS:
        tl.store(weight_grad + c * TAPS + tap, total.to(weight_grad.dtype.element_ty), mask=some_channel)
    else:
        tl.store(bias_grad + c, total.to(bias_grad.dtype.element_ty), mask=some_channel)


def by_taps(weight: Tensor) -> Tensor:
    """(C, 1, K, K), as the model stores it, to (K * K, C) in fp32, as the kernel reads it: a tap of eight channels is 32 bytes in a row.

    Taken from the model's layout, each of them would be a line of the cache of its own, 4 bytes used of 128.
    """
    return weight.flatten(1).t().float().contiguous()


def conv(
    x: Tensor, taps: Tensor, bias: Tensor | None, dilation: int, *, flip: bool = False, gelu: str = "", grad: Tensor | None = None
) -> Tensor:
    """(N, C, H, W) to the same, channels-last. taps: (K * K, C) of `by_taps`; `flip`, `gelu` and `grad` as in `conv_kernel`."""
    n, channels, height, width = x.shape
    k = round(taps.shape[0] ** 0.5)
    cut = strips(height, dilation, MOST_ROWS[k])
    total = n * cut.strips * dilation * width
    y = torch.empty_like(x, memory_format=torch.channels_last)
    grid = (triton.cdiv(total, LANES) * triton.cdiv(channels, CHANNELS),)
    conv_kernel[grid](
        x, taps, bias, grad, y, total, height, width, channels, cut.strips, min(k // 2, (width - 1) // dilation),
        K=k, D=dilation, R=cut.rows, WHOLE=cut.strips == 1, FLIP=flip, GELU=gelu, LANES=LANES, CHANNELS=CHANNELS, **LAUNCH,
    )  # fmt: skip
    return y


def weight_gradient(x: Tensor, grad: Tensor, weight: Tensor, dilation: int) -> tuple[Tensor, Tensor]:
    """Gradients of weight (C, 1, K, K) and bias (C,), in the weight's type. x and grad: (N, C, H, W), channels-last."""
    n, channels, height, width = x.shape
    k = weight.shape[-1]
    cut = strips(height, dilation, MOST_ROWS_WEIGHT_GRADIENT[k])
    total = n * cut.strips * dilation * width
    runs, per_run = splits(total, channels, k, multiprocessors(x.device))
    channel_tiles = triton.cdiv(channels, CHANNELS)
    partial = torch.empty(runs, k * k + 1, channels, dtype=torch.float32, device=x.device)
    weight_gradient_kernel[(runs * channel_tiles,)](
        x, grad, partial, total, per_run, height, width, channels, cut.strips,
        K=k, D=dilation, R=cut.rows, WHOLE=cut.strips == 1, LANES=LANES, CHANNELS=CHANNELS, COLUMNS=column_lanes(k), **LAUNCH,
    )  # fmt: skip
    weight_grad, bias_grad = torch.empty_like(weight), weight.new_empty(channels)
    sum_runs_kernel[(k * k + 1, channel_tiles)](
        partial, weight_grad, bias_grad, runs, channels, TAPS=k * k, RUNS=32, CHANNELS=CHANNELS, num_warps=WARPS
    )  # fmt: skip
    return weight_grad, bias_grad


def multiprocessors(device: torch.device) -> int:
    """Of a GPU; on a CPU, where only the interpreter runs, a few that make several runs of small maps."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
