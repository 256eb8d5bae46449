"""Triton kernels behind VAN's layers, for channels-last activations on a GPU: depth-wise convolution, what stands around LKA's, and what
joins two branches.

    y = depthwise_conv2d(x, weight, bias, dilation=3)                         # also: gelu=True
    x, near = gelu_conv2d(z, weight, bias, z_bias); y = gated(x, attention, attention_bias)
    y, normed, found = residual_norm(x, branch, shortcut, scale, keep, norm, expected)  # also: scaled_residual, without the norm

All are custom operators of torch.library (`van::…`) with derivatives and shapes registered, so autograd, autocast and torch.compile
work over them. Layers choose them through `pretrain.model.fast.kernel_choice.use_kernels`.

    tiling.py       how the convolutions' work is cut, as pure functions of its shape
    depthwise.py    the convolution: launches and operators              depthwise_device.py   what runs on the GPU
    attention.py    GELU in front of a convolution, and the gate         attention_device.py   likewise
    residual.py     the end of a branch and the BatchNorm behind it      residual_device.py    likewise
    norm.py         what of a BatchNorm a convolution takes along       norm_device.py        likewise
    trial.py        whether a kernel runs here and agrees with PyTorch

`python -m benchmarks.training.kernel_resources` compiles them for GPUs that need not be there and reads off registers and spills;
`python -m benchmarks.training --gpu` times them on one that is. docs/performance.md has the reasons, in bytes and multiply-adds.
"""

import torch

from pretrain.model.fast.triton.attention import gated, gelu_conv2d
from pretrain.model.fast.triton.depthwise import depthwise_conv2d
from pretrain.model.fast.triton.norm import Normed, fold_norm
from pretrain.model.fast.triton.residual import expected_statistics, move_statistics, residual_norm, scaled_residual

__all__ = [
    "Normed", "depthwise_conv2d", "expected_statistics", "fold_norm", "gated", "gelu_conv2d", "move_statistics", "residual_norm",
    "scaled_residual", "unusable",
]  # fmt: skip


def unusable(device: torch.device) -> str | None:
    """Why the kernels can't run on a device; None where they can."""
    if device.type != "cuda":
        return f"the device is {device.type}"
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"compute capability {major}.{minor} is below 8.0, which bf16 needs"
