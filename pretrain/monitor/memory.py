"""Suggests settings that fit when a GPU runs out of memory in the first steps of a job.

    with explain_out_of_memory(config, ranks, device, is_warm=lambda: step >= 3): …the loop…

The memory estimate is linear in the micro-batch: the model's state (all memory allocated before the first step), the gradients, and per
sample the tensors that the forward pass keeps for the backward pass. These tensors are counted by a forward pass on fake tensors, which
computes shapes only. A share of the memory stays free for workspaces, gradients of activations and fragmentation.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from pretrain import config as settings
from pretrain.config import Config
from pretrain.engine.precision import autocast
from pretrain.model.build import build_empty_model

USABLE = 0.9  # of a GPU's memory


@contextmanager
def explain_out_of_memory(config: Config, ranks: int, device: torch.device, is_warm: Callable[[], bool]) -> Iterator[None]:
    """Converts torch.OutOfMemoryError into a ValueError that names a micro-batch that fits.

    `is_warm` returns whether enough steps have succeeded: running out of memory after that is a fault of the machine, and is re-raised.
    """
    state, total = measure_memory(device)
    try:
        yield
    except torch.OutOfMemoryError as error:
        if is_warm():
            raise
        raise ValueError(out_of_memory_message(config, ranks, device.type, state, total)) from error


def measure_memory(device: torch.device) -> tuple[int, int]:
    """Returns the bytes in use on a GPU and its total; zeros for a CPU."""
    if device.type != "cuda":
        return 0, 0
    return torch.cuda.memory_allocated(device), torch.cuda.get_device_properties(device).total_memory


def out_of_memory_message(config: Config, ranks: int, device_type: str, state: int, total: int) -> str:
    """Returns the error message of a job that ran out of memory, with settings that help.

    Args:
        config: of the job.
        ranks: of the job.
        device_type: "cuda" or "cpu", the device whose operators are counted.
        state: bytes in use before the first step.
        total: bytes of the GPU.
    """
    model = build_empty_model(config, torch.device("meta"))
    gradients = sum(4 * parameter.numel() for parameter in model.parameters())
    sample = activation_bytes(model, config.data.image_size, config.engine.precision, device_type)
    micro = config.engine.micro_batch
    smaller = [size for size in settings.micro_batches(config, ranks) if size < micro]
    fits = largest_that_fits(state + gradients, sample, total, smaller)
    stage = config.engine.zero_stage
    remedies = [f"engine.micro_batch={fits}"] if fits else []
    remedies += ["model.checkpoint_stages=[0,1,2,3]"] if _can_recompute_more(config) else []
    if ranks > 1 and stage < (1 if config.model.graphs else 3):  # CUDA graphs train in stages 0 and 1
        remedies += [f"engine.zero_stage={stage + 1}"]
    remedies += ["more GPUs or GPUs with more memory"] if not remedies else []
    return (
        f"out of memory with engine.micro_batch={micro}: of {total / 1e9:.1f} GB the model's state and gradients take "
        f"{(state + gradients) / 1e9:.1f}, and each sample's activations {sample / 1e9:.2f}. "
        + (f"engine.micro_batch={fits} should fit" if fits else "No smaller engine.micro_batch should fit")
        + f", by this estimate; the global batch stays {config.global_batch} either way. Try {', or '.join(remedies)}"
    )


def _can_recompute_more(config: Config) -> bool:
    """Returns whether the model can recompute further blocks."""
    every = [0, 1, 2, 3]
    if config.model.graphs or set(config.model.checkpoint_stages) == set(every):
        return False
    try:
        build_empty_model(replace(config, model=replace(config.model, checkpoint_stages=every)), torch.device("meta"))
    except ValueError:
        return False
    return True


def largest_that_fits(fixed: int, sample: int, total: int, sizes: Sequence[int]) -> int | None:
    """Returns the largest of `sizes` at which `fixed` plus `sample` bytes per sample fit into USABLE memory, or None."""
    return max((size for size in sizes if fixed + size * sample <= USABLE * total), default=None)


def activation_bytes(model: nn.Module, image_size: int, precision: str, device_type: str) -> int:
    """Returns the bytes that the forward pass of one sample keeps for the backward pass, without weights; computes nothing.

    Args:
        model: in training mode; may be on the meta device.
        image_size: pixels of a side.
        precision: of the settings.
        device_type: "cuda" or "cpu", the device whose operators are counted.
    """

    def count_kept_bytes(batch: int) -> int:
        storages = {}
        with FakeTensorMode():
            state = {
                name: torch.empty(tensor.shape, dtype=tensor.dtype, device=device_type, requires_grad=tensor.requires_grad)
                for name, tensor in [*model.named_parameters(), *model.named_buffers()]
            }
            images = torch.empty(batch, 3, image_size, image_size, device=device_type).to(memory_format=torch.channels_last)

            def keep(tensor: torch.Tensor) -> torch.Tensor:
                storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
                return tensor

            with saved_tensors_hooks(keep, lambda tensor: tensor), autocast(torch.device(device_type), precision):
                torch.func.functional_call(model, state, (images,))
            for tensor in state.values():
                storages.pop(tensor.untyped_storage()._cdata, None)
        return sum(storage.nbytes() for storage in storages.values())

    return count_kept_bytes(3) - count_kept_bytes(2)  # the difference excludes 16-bit copies of the weights
