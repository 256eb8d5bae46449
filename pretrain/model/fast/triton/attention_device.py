"""The Triton kernel of `attention.py`; mypy does not check it (see pyproject.toml). Maps, runs and partials: see `residual_device.py`."""

import triton
import triton.language as tl

from pretrain.model.fast.triton.residual_device import places, run_of_pixels


@triton.jit(do_not_specialize=["pixels", "per_run"])
def gate_backward_kernel(
    grad, x, attention, x_grad, attention_grad, partial, pixels, per_run, channels, PIXELS: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    """Computes x_grad = grad * attention, attention_grad = grad * x, and this run's sums of attention_grad: partial (runs, C)."""
    run, begin, end, c, channel_exists = run_of_pixels(per_run, pixels, channels, CHANNELS)
    sums = tl.zeros((PIXELS, CHANNELS), tl.float32)
    for first in range(begin, end, PIXELS):
        at, exists = places(first + tl.arange(0, PIXELS), end, c, channel_exists, channels)
        g = tl.load(grad + at, mask=exists, other=0.0).to(tl.float32)
        x_part = g * tl.load(attention + at, mask=exists, other=0.0).to(tl.float32)
        attention_part = g * tl.load(x + at, mask=exists, other=0.0).to(tl.float32)
        tl.store(x_grad + at, x_part.to(x_grad.dtype.element_ty), mask=exists)
        tl.store(attention_grad + at, attention_part.to(attention_grad.dtype.element_ty), mask=exists)
        sums += attention_part
    tl.store(partial + run * channels + c, tl.sum(sums, 0), mask=channel_exists)
