"""Chooses how a job's model computes: by PyTorch's operators, or by the faster ways of pretrain/model/fast that the settings ask for.

log.line(use_fast_ways(model, config, device))      # before the engine is built
log.line(use_graphs(engine, config))                # before the first step
"""

import copy
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from pretrain.config import Config
from pretrain.engine.precision import DTYPES, autocast, resolve_precision
from pretrain.model.fast import compiled, cpu, triton
from pretrain.model.fast.cuda_graphs import CudaGraph, graph_stages
from pretrain.model.van import VAN, Block

# Norm of the difference over the norm, of a block's output and of each gradient: well above what rounding to bf16 causes.
TOLERANCE = 0.05


def use_fast_ways(model: nn.Module, config: Config, device: torch.device) -> str:
    """Puts the ways that the settings ask for into a model that will train on `device`; returns a line for the log.

    With model.kernels=auto Triton's kernels are used if they run and agree with PyTorch; with triton a fault is a ValueError. On a CPU a
    VAN trains in the CPU way, unless it is compiled.
    """
    if not isinstance(model, VAN):
        return f"computing: PyTorch's operators; faster ways exist for VAN alone, not for {type(model).__name__}"
    settings, ways = config.model, []
    fault = "as model.kernels=torch asks" if settings.kernels == "torch" else _kernel_fault(model, config, device)
    if fault is None:
        triton.use_triton(model)
        ways.append("Triton's kernels")
    elif settings.kernels == "triton":
        raise ValueError(f"model.kernels=triton can't be used: {fault}; model.kernels=auto takes Triton where it runs")
    if settings.compile:
        compiled.compile_blocks(model)
        ways.append("compiled blocks")
    elif device.type == "cpu":
        cpu.use_cpu_way(model)
        ways.append("the CPU way")
    computing = " and ".join(ways) or "PyTorch's operators"
    return f"computing: {computing}" + (f" (no Triton kernels: {fault})" if fault else "")


def use_graphs(engine: Any, config: Config) -> str:
    """Records an engine's model as CUDA graphs and puts them into the model; returns a line for the log.

    Call it last, when it is settled how the model computes and where its parameters and buffers lie.
    """
    if engine.device.type != "cuda":
        return f"CUDA graphs: none on a {engine.device.type}"
    size, precision = config.data.image_size, DTYPES[config.engine.precision]
    images = torch.empty(config.engine.micro_batch, 3, size, size, device=engine.device).to(memory_format=torch.channels_last)
    # Without a cache of cast weights: a graph would not cast them again.
    with torch.autocast("cuda", precision, enabled=precision is not torch.float32, cache_enabled=False):
        return graph_stages(engine.module, engine.reductions.mark_ready, images, partial(CudaGraph, torch.cuda.graph_pool_handle()))


def _kernel_fault(model: VAN, config: Config, device: torch.device) -> str | None:
    """Returns why Triton's kernels can't compute a model's blocks on this device, or None if they can.

    Tries a block of each stage on drawn maps of the job's size, and so compiles what the first step would compile.
    """
    reason = triton.why_unusable(model, device)
    if reason is not None:
        return reason
    for number, (stage, info) in enumerate(zip(model.stages, model.feature_info, strict=True)):
        size = -(-config.data.image_size // info["reduction"])
        block = cast(nn.Sequential, stage.blocks)[-1]
        try:
            distance = _distance(cast(Block, block), size, config, device)
        except Exception as error:  # of the compiler, the driver or a launch: whatever it is, the job can do without the kernels
            return f"stage {number}: {type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
        if not distance <= TOLERANCE:  # also where the distance is not a number
            return f"stage {number}: they differ from PyTorch's operators by {distance:.0%}"
    return None


def _distance(block: Block, size: int, config: Config, device: torch.device) -> float:
    """Returns the largest relative distance between a block by kernels and by PyTorch, over its output and all gradients."""
    reference = copy.deepcopy(block).to(device).train()
    swapped = copy.deepcopy(reference)
    triton.use_triton(swapped)
    generator = torch.Generator(device).manual_seed(0)
    x, grad = (torch.randn(4, reference.norm1.num_features, size, size, generator=generator, device=device) for _ in range(2))
    expected = _values_and_gradients(reference, x, grad, torch.autocast(device.type, enabled=False))
    actual = _values_and_gradients(swapped, x, grad, autocast(device, resolve_precision(device, config.engine.precision)))
    return max(float((one - other).norm() / other.norm()) for one, other in zip(actual, expected, strict=True))


def _values_and_gradients(block: Block, x: Tensor, grad: Tensor, context: torch.autocast) -> list[Tensor]:
    torch.manual_seed(0)  # stochastic depth
    x = x.to(memory_format=torch.channels_last).detach().requires_grad_()
    with context:
        y = block(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *block.parameters()], grad.to(y.dtype))]
