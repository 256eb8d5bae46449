"""What runs on the GPU of `norm.py`, in Triton's dialect of Python: not called from here, nor checked by mypy (see pyproject.toml)."""

import triton
import triton.language as tl


@triton.jit
def fold_kernel(
    weight, bias, affine, folded, folded_bias, low_bias, rows, channels, ROWS: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    """folded (O, C) = weight * affine[0]; folded_bias (O,) = bias + the sum over channels of weight * affine[1]; low_bias is that in
    another type. affine: (4, C)."""
    o = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    some_row = o < rows
    sums = tl.zeros((ROWS, CHANNELS), tl.float32)
    for first in range(0, channels, CHANNELS):
        c = first + tl.arange(0, CHANNELS)
        at, here = o[:, None] * channels + c[None, :], some_row[:, None] & (c < channels)[None, :]
        weights = tl.load(weight + at, mask=here, other=0.0).to(tl.float32)
        factor = tl.load(affine + c, mask=c < channels, other=0.0)[None, :]
        tl.store(folded + at, (weights * factor).to(folded.dtype.element_ty), mask=here)
        sums += weights * tl.load(affine + channels + c, mask=c < channels, other=0.0)[None, :]
    total = tl.load(bias + o, mask=some_row).to(tl.float32) + tl.sum(sums, 1)
    tl.store(folded_bias + o, total, mask=some_row)
    tl.store(low_bias + o, total.to(low_bias.dtype.element_ty), mask=some_row)


@triton.jit
def unfold_kernel(
    grad, bias_grad, weight, affine, weight_grad, affine_grad, rows, channels, RUNS: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    """weight_grad (O, C) = grad * affine[0] + bias_grad * affine[1], and affine_grad (4, C), sums over the rows: of grad * weight, of
    bias_grad * weight, of bias_grad * folded, and of grad * folded, the weight as it was rounded. RUNS rows at once."""
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    some_channel = c < channels
    factor = tl.load(affine + c, mask=some_channel, other=0.0)[None, :]
    offset = tl.load(affine + channels + c, mask=some_channel, other=0.0)[None, :]
    of_factor = tl.zeros((RUNS, CHANNELS), tl.float32)
    of_offset, of_sum, of_product = of_factor, of_factor, of_factor
    for first in range(0, rows, RUNS):
        o = first + tl.arange(0, RUNS)
        at, here = o[:, None] * channels + c[None, :], (o < rows)[:, None] & some_channel[None, :]
        weights = tl.load(weight + at, mask=here, other=0.0).to(tl.float32)
        folded = (weights * factor).to(grad.dtype.element_ty).to(tl.float32)
        grads = tl.load(grad + at, mask=here, other=0.0).to(tl.float32)
        bias_grads = tl.load(bias_grad + o, mask=o < rows, other=0.0)[:, None]
        tl.store(weight_grad + at, (grads * factor + bias_grads * offset).to(weight_grad.dtype.element_ty), mask=here)
        of_factor += grads * weights
        of_offset += bias_grads * weights
        of_sum += bias_grads * folded
        of_product += grads * folded
    tl.store(affine_grad + c, tl.sum(of_factor, 0), mask=some_channel)
    tl.store(affine_grad + channels + c, tl.sum(of_offset, 0), mask=some_channel)
    tl.store(affine_grad + 2 * channels + c, tl.sum(of_sum, 0), mask=some_channel)
    tl.store(affine_grad + 3 * channels + c, tl.sum(of_product, 0), mask=some_channel)
