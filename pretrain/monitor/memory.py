"""What to do when a GPU's memory is too small, told in the first steps of a job.

    with explained(config, ranks, device, lambda: step >= warm): …the loop…

How much a micro-batch takes is taken to be linear: the model's state (weights, moments and whatever else is allocated before the first
step), its gradients, and for each sample the tensors that the forward pass keeps for the backward pass. These are counted by running the
model's shapes through PyTorch's operators without computing anything, as what the failed step had allocated tells only that it was
too much. Room is left for what neither counts: workspaces, gradients of activations, fragments.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from pretrain import config as settings
from pretrain.config import Config
from pretrain.engine.precision import autocast
from pretrain.model.build import build_model

USABLE = 0.9  # of a GPU's memory


@contextmanager
def explained(config: Config, ranks: int, device: torch.device, under_way: Callable[[], bool]) -> Iterator[None]:
    """Turns running out of a GPU's memory, until steps are `under_way`, into an error that says what would fit.

    Raises:
        ValueError: instead of torch.OutOfMemoryError.
    """
    state, total = room(device)
    try:
        yield
    except torch.OutOfMemoryError as error:
        if under_way():
            raise
        raise ValueError(explanation(config, ranks, device.type, state, total)) from error


def room(device: torch.device) -> tuple[int, int]:
    """Bytes that are in use on a GPU, and that it has."""
    if device.type != "cuda":
        return 0, 0
    return torch.cuda.memory_allocated(device), torch.cuda.get_device_properties(device).total_memory


def explanation(config: Config, ranks: int, device_type: str, state: int, total: int) -> str:
    """What to tell of a job that ran out of a GPU's `total` bytes, of which `state` were taken before its first step."""
    with torch.device("meta"):
        model = build_model(config)
    gradients = sum(4 * parameter.numel() for parameter in model.parameters())
    sample = activation_bytes(model, config.data.image_size, config.engine.precision, device_type)
    micro = config.engine.micro_batch
    smaller = [size for size in settings.micro_batches(config, ranks) if size < micro]
    fits = largest_that_fits(state + gradients, sample, total, smaller)
    ways = [f"engine.micro_batch={fits}"] if fits else []
    ways += ["model.checkpoint_stages=[0,1,2,3]"]
    ways += [f"engine.zero_stage={config.engine.zero_stage + 1}"] if config.engine.zero_stage < 3 and ranks > 1 else []
    return (
        f"out of memory with engine.micro_batch={micro}: of {total / 1e9:.1f} GB the model's state and gradients take "
        f"{(state + gradients) / 1e9:.1f}, and each sample's activations {sample / 1e9:.2f}. "
        + (f"engine.micro_batch={fits} should fit" if fits else "No smaller engine.micro_batch should fit")
        + f", by this estimate; the global batch stays {config.global_batch} either way. What helps: {', or '.join(ways)}"
    )


def largest_that_fits(fixed: int, sample: int, total: int, sizes: Sequence[int]) -> int | None:
    """The largest of these micro-batches of which `fixed` bytes and `sample` bytes each leave a tenth of `total` free."""
    return max((size for size in sizes if fixed + size * sample <= USABLE * total), default=None)


def activation_bytes(model: nn.Module, image_size: int, precision: str, device_type: str) -> int:
    """What the forward pass of one sample in training keeps for the backward pass, weights apart, on a device of this type. Nothing is
    computed: only the model's shapes matter."""

    def kept(batch: int) -> int:
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

    return kept(3) - kept(2)  # what is left are weights in 16 bits
