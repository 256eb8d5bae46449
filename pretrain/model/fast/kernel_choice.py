"""How a model computes: which of its layers by Triton's kernels, and whether its blocks are compiled."""

from collections.abc import Callable
from typing import cast

import torch
from torch import nn

from pretrain.model.convolutions import PointwiseConv2d
from pretrain.model.depthwise import DepthwiseConv2d
from pretrain.model.fast.triton import unusable
from pretrain.model.fast.triton.trial import joint_fault
from pretrain.model.lka import LKA
from pretrain.model.van import VAN, Block, VANStage


def use_kernels(model: nn.Module, choice: str, device: torch.device, image_size: int, dtype: torch.dtype, zero_stage: int = 0) -> str:
    """Chooses, layer by layer, between Triton's kernels and PyTorch's operators for a model that will train on `device` on square images
    with activations of `dtype`; returns a line for the log. To be called when the BatchNorms are what they will be. In ZeRO-3, which
    fetches weights block by block, no shortcut takes the next block's norm along.

    `choice` is `model.kernels` of the settings: "torch"; "auto", Triton where it runs and agrees with PyTorch, which is tried here;
    "triton", which is an error where it doesn't.

    Raises:
        ValueError: "triton", and the device or a layer can't.
    """
    reason = "as model.kernels=torch asks" if choice == "torch" else unusable(device)
    faults: dict[str, str] = {}  # by layer

    def good(layer: str, fault: Callable[[], str | None]) -> bool:
        found = fault() if reason is None else None
        if found is not None:
            faults[layer] = found
        return reason is None and found is None

    van = cast(VAN, model)
    stages = cast(list[VANStage], list(van.stages))
    for stage, info in zip(stages, van.feature_info, strict=True):
        channels, size = info["num_chs"], -(-image_size // info["reduction"])
        joint = good(f"shortcuts of {channels} channels", lambda c=channels: joint_fault(c, dtype, device))  # type: ignore[misc]
        for module in stage.modules():
            if isinstance(module, Block):
                module.triton = joint
            elif isinstance(module, PointwiseConv2d):
                module.by_linear = reason is None
            elif isinstance(module, DepthwiseConv2d):
                module.triton = good(_name(module, size), lambda m=module, s=size: m.triton_fault(s, dtype, device))  # type: ignore[misc]
        for lka in [module for module in stage.modules() if isinstance(module, LKA)]:
            layer = f"gates of {channels} channels, {size} px"
            lka.triton = lka.conv0.triton and good(layer, lambda m=lka, s=size: m.triton_fault(s, dtype, device))  # type: ignore[misc]
        blocks = cast(list[Block], list(stage.blocks))
        norms_are_own = all(type(norm) is nn.BatchNorm2d for block in blocks for norm in (block.norm1, block.norm2))
        # What a norm leaves to the convolution behind it, that one leaves to kernels too.
        taken = all(block.attn.spatial_gating_unit.triton and block.mlp.dwconv.triton for block in blocks)
        stage.joins = joint and norms_are_own and taken and zero_stage < 3
        for block in blocks:
            block.mlp.fc1.triton = stage.joins
            block.attn.proj_1.triton = stage.joins and block is not blocks[0]
    if choice == "triton" and (reason or faults):
        raise ValueError(f"model.kernels=triton can't be: {reason or _listed(faults)}; model.kernels=auto takes Triton where it runs")
    if reason is not None:
        return f"kernels: PyTorch's, {reason}"
    convolutions = [m.triton for m in model.modules() if isinstance(m, DepthwiseConv2d)]
    gates = [m.triton for m in model.modules() if isinstance(m, LKA)]
    ends = [m.triton for m in model.modules() if isinstance(m, Block)]  # of two branches each
    joined = [len(stage.blocks) * 2 - 1 for stage in stages if stage.joins]
    return (
        f"kernels: Triton for {sum(convolutions)} of {len(convolutions)} depth-wise convolutions, {sum(gates)} of {len(gates)} gates, "
        f"{2 * sum(ends)} of {2 * len(ends)} shortcuts, with {sum(joined)} norms behind them"
        + (f"; not for {_listed(faults)}" if faults else "")
    )


def _name(layer: DepthwiseConv2d, size: int) -> str:
    k, dilation = layer.kernel_size[0], layer.dilation[0]
    return f"{k}x{k}{f' dilation {dilation}' if dilation > 1 else ''}, {layer.in_channels} channels, {size} px"


def _listed(faults: dict[str, str]) -> str:
    return "; ".join(f"{layer} ({fault})" for layer, fault in faults.items())


def compile_blocks(model: nn.Module) -> None:
    """Has torch.compile compile the blocks, each as one graph, when they first run."""
    for block in model.modules():
        if isinstance(block, Block):
            block.compile()
            block.joined = torch.compile(block.joined)  # type: ignore[method-assign]
