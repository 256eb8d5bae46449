"""Triton kernels for VAN's blocks, for channels-last activations on a GPU of compute capability 8.0 or newer.

    use_triton(model)            # a VAN; parameters, names and state dict stay
    restore_reference(model)

    block.py        VAN's block, computed by the operators below and matrix products
    depthwise.py    depthwise convolution, optionally followed by GELU      depthwise_device.py   its kernels
    attention.py    GELU before a convolution, and LKA's gate               attention_device.py   its kernels
    residual.py     layer scale, stochastic depth and residual add          residual_device.py    its kernels
    tiling.py       division of the convolutions' work, as pure functions of the shape

All are custom operators of torch.library (`van::…`) with registered derivatives and shape functions, so they work with autograd, autocast
and torch.compile. tests/pretrain/model/fast/triton compiles them for GPUs that need not be present and counts registers and spills;
`python -m benchmarks.training --gpu` times them on a GPU. docs/performance.md counts bytes and multiply-adds.
"""

import torch
from torch import nn

from pretrain.model import van
from pretrain.model.fast.swap import swap_class
from pretrain.model.fast.triton.block import Block

_SIZES, _DILATIONS = (3, 5, 7), (1, 3)  # of depthwise convolutions, for which the kernels are tuned and tested


def why_unusable(model: nn.Module, device: torch.device) -> str | None:
    """Returns why the kernels can't compute a model on a device, or None if they can."""
    if device.type != "cuda":
        return f"the device is {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"compute capability {'.'.join(map(str, capability))} is below 8.0, which bf16 needs"
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1:
            size, dilation = module.kernel_size[0], module.dilation[0]
            if size not in _SIZES or dilation not in _DILATIONS:
                return f"there is no kernel for a depthwise {size}x{size} convolution with dilation {dilation}"
        elif isinstance(module, van.Mlp) and module.drop1.p > 0:
            return "the kernels have no dropout in the MLP"
    return None


def use_triton(model: nn.Module) -> None:
    """Makes a VAN's blocks compute by the kernels."""
    for module in model.modules():
        if isinstance(module, van.Block):
            swap_class(module, Block)


def restore_reference(model: nn.Module) -> None:
    """Undoes `use_triton`."""
    for module in model.modules():
        if isinstance(module, Block):
            swap_class(module, van.Block)
