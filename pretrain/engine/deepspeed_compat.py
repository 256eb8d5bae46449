"""Wraps DeepSpeed's private API, for one version of DeepSpeed; rejects every other version.

DeepSpeed's public API gives no access to the training state before the first update, to the gradients of a step, or to the order in which
gradients are reduced. To support another version, check the names used below against its source (runtime/engine.py,
runtime/zero/stage_1_and_2.py, runtime/zero/stage3.py), update SUPPORTED_VERSION and the pins, and run tests/pretrain/engine.
"""

import logging
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pretrain.engine.distributed import COLLECTIVE_TIMEOUT

SUPPORTED_VERSION = "0.19.8"
_DYNAMO_SWITCH = "TORCHDYNAMO_DISABLE"


@dataclass(frozen=True)
class Location:
    """Locates this rank's part of a parameter: elements `offset` to `offset + length` of `flat`, a tensor of the optimizer.

    The part begins at element `start` of the flattened parameter, which has `numel` elements in all.
    """

    flat: Tensor
    offset: int
    start: int
    length: int
    numel: int


# ---------------------------------------------------------------- building an engine


def require_supported_version() -> None:
    """Raises ValueError if the installed DeepSpeed is not the supported version."""
    installed = version("deepspeed")
    if installed != SUPPORTED_VERSION:
        raise ValueError(
            f"DeepSpeed {installed} is installed, but only DeepSpeed {SUPPORTED_VERSION} is supported, because this project uses private "
            f"names of that library; install it: .venv/bin/pip install deepspeed=={SUPPORTED_VERSION}"
        )


def initialize(model: nn.Module, optimizer: torch.optim.Optimizer, settings: dict[str, Any], device: torch.device) -> Any:
    """Wraps a model in DeepSpeed's engine, which adopts the process group and broadcasts the weights of rank 0.

    Args:
        model: on the CPU.
        optimizer: steps as torch.optim.AdamW does, element by element.
        settings: DeepSpeed's own configuration.
        device: of this rank.

    Raises:
        ValueError: the installed DeepSpeed is not the supported version.
    """
    require_supported_version()
    os.environ["DS_ACCELERATOR"] = device.type
    os.environ.setdefault("LOCAL_RANK", "0")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
    from deepspeed.utils import set_z3_leaf_module

    _import_muon()
    # In every step DeepSpeed calls functions that torch has deprecated.
    warnings.filterwarnings("ignore", message=".*(all_gather_into_tensor|reduce_scatter_tensor)", category=FutureWarning)
    # DeepSpeed would compile its own collectives for CPUs at the start, which needs a C++ compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if device.type == "cuda" else "gloo"
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, timeout=COLLECTIVE_TIMEOUT, verbose=False)
    if type(optimizer) not in ZERO_SUPPORTED_OPTIMIZERS:
        ZERO_SUPPORTED_OPTIMIZERS.append(type(optimizer))
    # ZeRO-3 gathers a module's parameters when the module runs. These modules read the parameters of submodules without running them.
    for module in model.modules():
        set_z3_leaf_module(module, getattr(module, "reads_child_parameters", False))
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)
    if engine.zero_optimization_stage() == 1:
        # The parameters already are views of ZeRO's flat buffers. DeepSpeed would link every one of them again in each step.
        engine.optimizer._update_model_bit16_weights = lambda group: None
    return engine


def _import_muon() -> None:
    """Imports DeepSpeed's Muon with torch.compile disabled, because its decorators would import all of inductor on every rank.

    ZeRO imports Muon whichever optimizer the job uses.
    """
    before = os.environ.get(_DYNAMO_SWITCH)
    os.environ[_DYNAMO_SWITCH] = "1"
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401

    if before is None:
        del os.environ[_DYNAMO_SWITCH]
    else:
        os.environ[_DYNAMO_SWITCH] = before


# ---------------------------------------------------------------- gradients


def replace_reduction(engine: Any, reduce: Callable[[], None]) -> None:
    """Makes the engine call `reduce` after every backward pass instead of its own reduction of gradients."""
    engine.allreduce_gradients = reduce


def list_updated_parameters(engine: Any) -> list[Tensor]:
    """Returns the parameters of which this rank's optimizer needs at least a part of the gradient. For stages 0 and 1."""
    if engine.zero_optimization_stage() == 0:
        return list(engine.module.parameters())
    return list(chain(*engine.optimizer.params_in_partition))


def partition_gradients(engine: Any) -> None:
    """Makes stage 1 take this rank's partition of the reduced gradients; does nothing in stage 0."""
    if engine.zero_optimization_stage() == 1:
        engine.optimizer.set_gradient_accumulation_boundary(True)
        engine.optimizer.overlapping_partition_gradients_reduce_epilogue()


def list_gradients(engine: Any) -> list[Tensor]:
    """Returns this rank's gradients, averaged over micro-batches and ranks, after a step's last backward pass and before its update.

    In stage 0 every rank holds all gradients; in the other stages each rank holds its partition.
    """
    if engine.zero_optimization_stage() == 0:
        return [p.grad for p in engine.module.parameters() if p.grad is not None]
    return [part for parts in engine.optimizer.averaged_gradients.values() for part in parts]


# ---------------------------------------------------------------- weights


def list_flat_weights(engine: Any) -> list[Tensor]:
    """Returns the fp32 tensors that the optimizer updates on this rank."""
    stage = engine.zero_optimization_stage()
    if stage == 0:
        return [p for p in engine.module.parameters() if p.requires_grad]
    return engine.optimizer.fp32_partitioned_groups_flat if stage == 3 else engine.optimizer.single_partition_of_fp32_groups


def locate(engine: Any, parameter: Any) -> Location | None:
    """Returns the location of this rank's part of a parameter, or None if this rank holds no part of it."""
    stage = engine.zero_optimization_stage()
    if stage == 0:
        return Location(parameter, 0, 0, parameter.numel(), parameter.numel())
    if stage == 3:
        group, offset, _ = engine.optimizer.grad_position[engine.optimizer.get_param_id(parameter)]
        size = parameter.partition_numel()
        start = dist.get_rank() * size
        length = min(size, parameter.ds_numel - start)  # the last partitions are padded, or all padding
        flat = engine.optimizer.fp32_partitioned_groups_flat[group]
        return Location(flat, offset, start, length, parameter.ds_numel) if length > 0 else None
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    flat = engine.optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
    part = mapping.lp_fragment_address
    return Location(flat, mapping.hp_fragment_address.start, part.start, part.numel, parameter.numel())


def get_shape(engine: Any, parameter: Any) -> torch.Size:
    """Returns the shape of the whole parameter, of which the model holds a partition in stage 3."""
    return parameter.ds_shape if engine.zero_optimization_stage() == 3 else parameter.shape


def publish_weights(engine: Any) -> None:
    """Copies the optimizer's weights into the tensors that the model computes with. Collective."""
    stage = engine.zero_optimization_stage()
    if stage in (1, 2):
        engine.optimizer.update_lp_params()
    elif stage == 3:
        for group in range(len(engine.optimizer.fp32_partitioned_groups_flat)):
            engine.optimizer._reassign_or_swap_out_partitioned_parameters(group)
