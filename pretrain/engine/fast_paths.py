"""Chooses how a job's model computes: by PyTorch's operators, or by the fast paths of pretrain/model/fast that the settings ask for.

log.line(use_fast_paths(model, config, device))      # before the engine is built
log.line(use_graphs(engine, config))                # before the first step
"""

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.config import Config
from pretrain.engine.precision import DTYPES, autocast, resolve_precision
from pretrain.model.fast.cuda_graphs import CudaGraph
from pretrain.model.fast.registry import FastPaths, find_fast_paths

# Relative error (norm of the difference over the norm) of a block's output and of each gradient; rounding to bf16 stays well below.
TOLERANCE = 0.05


def use_fast_paths(model: nn.Module, config: Config, device: torch.device) -> str:
    """Applies the fast paths of the settings to a model that will train on `device`; returns a line for the log.

    model.kernels=auto uses Triton's kernels if they run and agree with PyTorch; with model.kernels=triton a fault is a ValueError. On a CPU
    a model trains in the CPU path of its class, unless it is compiled.
    """
    settings, chosen, paths = config.model, [], find_fast_paths(model)
    if paths is None:
        fault: str | None = f"there are none for {type(model).__name__}"
    elif settings.kernels == "torch":
        fault = "as model.kernels=torch asks"
    else:
        fault = _find_kernel_fault(model, paths, config, device)
    if settings.kernels == "triton" and fault is not None:
        raise ValueError(f"model.kernels=triton can't be used: {fault}; model.kernels=auto takes Triton where it runs")
    if paths is None:
        return f"computing: PyTorch's operators (no fast path exists for {type(model).__name__})"
    if fault is None:
        paths.use_kernels(model)
        chosen.append("Triton's kernels")
    if settings.compile:
        paths.compile_blocks(model)
        chosen.append("compiled blocks")
    elif device.type == "cpu":
        paths.use_cpu_path(model)
        chosen.append("the CPU path")
    computing = " and ".join(chosen) or "PyTorch's operators"
    return f"computing: {computing}" + (f" (no Triton kernels: {fault})" if fault else "")


def use_graphs(engine: Any, config: Config) -> str:
    """Records an engine's model as CUDA graphs, which replace its stages; returns a line for the log.

    Call this last: neither the model's operators nor the addresses of its parameters and buffers may change afterwards.
    """
    paths = find_fast_paths(engine.module)
    if engine.device.type != "cuda" or paths is None:
        return f"CUDA graphs: none for {type(engine.module).__name__} on a {engine.device.type}"
    size, precision = config.data.image_size, DTYPES[config.engine.precision]
    images = torch.empty(config.engine.micro_batch, 3, size, size, device=engine.device).to(memory_format=torch.channels_last)
    # Without autocast's cache of cast weights: a replayed graph would keep using the old ones.
    with torch.autocast("cuda", precision, enabled=precision is not torch.float32, cache_enabled=False):
        return paths.graph_stages(engine.module, engine.reductions.mark_ready, images, partial(CudaGraph, torch.cuda.graph_pool_handle()))


def _find_kernel_fault(model: nn.Module, paths: FastPaths, config: Config, device: torch.device) -> str | None:
    """Returns why Triton's kernels can't compute a model's blocks on this device, or None if they can.

    Tries a block of each stage on random feature maps of the job's size, which also compiles the kernels of the first step.
    """
    reason = paths.why_no_kernels(model, device)
    if reason is not None:
        return reason
    for number, (block, channels, reduction) in enumerate(paths.list_blocks(model)):
        size = -(-config.data.image_size // reduction)
        try:
            distance = _distance(block, paths, (4, channels, size, size), config, device)
        except Exception as error:  # of any kind (compiler, driver, launch): the job can run without the kernels
            return f"stage {number}: {type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
        if not distance <= TOLERANCE:  # also if the distance is NaN
            return f"stage {number}: they differ from PyTorch's operators by {distance:.0%}"
    return None


def _distance(block: nn.Module, paths: FastPaths, shape: tuple[int, ...], config: Config, device: torch.device) -> float:
    """Returns the largest relative error of a block's output and gradients, by kernels against PyTorch's fp32."""
    reference = copy.deepcopy(block).to(device).train()
    swapped = copy.deepcopy(reference)
    paths.use_kernels(swapped)
    generator = torch.Generator(device).manual_seed(0)
    x, grad = (torch.randn(shape, generator=generator, device=device) for _ in range(2))
    expected = _values_and_gradients(reference, x, grad, torch.autocast(device.type, enabled=False))
    actual = _values_and_gradients(swapped, x, grad, autocast(device, resolve_precision(device, config.engine.precision)))
    return max(float((one - other).norm() / other.norm()) for one, other in zip(actual, expected, strict=True))


def _values_and_gradients(block: nn.Module, x: Tensor, grad: Tensor, context: torch.autocast) -> list[Tensor]:
    torch.manual_seed(0)  # stochastic depth
    x = x.to(memory_format=torch.channels_last).detach().requires_grad_()
    with context:
        y = block(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *block.parameters()], grad.to(y.dtype))]
