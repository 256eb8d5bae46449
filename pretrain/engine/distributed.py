"""Connects the processes of a job, selects each rank's device, and exchanges values between ranks.

device = distributed.start(config.engine)       on every rank, before any collective; DeepSpeed adopts the process group
distributed.stop()
"""

import os
import resource
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.config import EngineConfig
from pretrain.run.position import host_name

T = TypeVar("T")
# The launcher detects a rank that died. This timeout bounds how long ranks wait for one that hangs.
COLLECTIVE_TIMEOUT = timedelta(minutes=30)


# ---------------------------------------------------------------- process group and device


def start(engine: EngineConfig) -> torch.device:
    """Joins the process group with the backend of this rank's device and returns the device; raises as `select_device` does."""
    device = select_device(engine)
    join("nccl" if device.type == "cuda" else "gloo")
    return device


def join(backend: str | None = None) -> None:
    """Joins the process group that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe; without RANK, a group of this process alone.

    The default backend handles tensors on the CPU and, if there is a GPU, on the GPU.
    """
    if backend is None:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def stop() -> None:
    """Leaves the process group, if this process has joined one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def resolve_device_type(engine: EngineConfig) -> str:
    """Returns "cuda" or "cpu": the engine.device setting with "auto" resolved on this machine."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if engine.device == "auto" else engine.device


def select_device(engine: EngineConfig) -> torch.device:
    """Returns this rank's device: the CPU, or the node's GPU number LOCAL_RANK, made the current device.

    Raises:
        ValueError: engine.device=cuda and this rank has no GPU.
    """
    if resolve_device_type(engine) == "cpu":
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"local rank {local_rank} has no GPU: {torch.cuda.device_count()} are visible on this node; "
            "ask Slurm for one GPU a task (--gpus-per-node and --ntasks-per-node alike), or set engine.device=cpu"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    torch.backends.cudnn.benchmark = True
    return device


def get_peak_memory_gb(device: torch.device) -> float:
    """Returns the peak memory of this process in GB: tensors on a GPU, or resident host memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


# ---------------------------------------------------------------- collectives; all ranks must call each of them


def run_on_rank_0(function: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Calls `function` on rank 0 only; returns its result, or raises its exception, on every rank."""
    outcome: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            outcome = [(function(), None)]
        except Exception as error:
            outcome = [(None, error)]
    dist.broadcast_object_list(outcome, src=0, group=group)
    result, failure = outcome[0]
    if failure is not None:
        raise failure
    return result


def gather_objects(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Returns the ranks' picklable values in rank order on rank 0, and an empty list on the other ranks."""
    values: list[Any] = [None] * dist.get_world_size() if dist.get_rank() == 0 else []
    dist.gather_object(value, values or None, group=group)
    return values


def all_gather_objects(value: T) -> list[T]:
    """Returns the ranks' picklable values in rank order, on every rank."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def all_gather_tensors(tensor: Tensor) -> Tensor:
    """Returns the ranks' tensors of one shape, stacked along a new first dimension in rank order, on every rank."""
    gathered = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, tensor)
    return torch.stack(gathered)


def all_gather_rows(rows: Tensor) -> Tensor:
    """Returns the ranks' tensors (n, …), where n may differ between ranks, concatenated in rank order, on every rank."""
    counts = all_gather_tensors(torch.tensor(len(rows), device=rows.device)).tolist()
    padding = rows.new_zeros(max(counts) - len(rows), *rows.shape[1:])
    padded = all_gather_tensors(torch.cat([rows, padding]))
    return torch.cat([part[:count] for part, count in zip(padded, counts, strict=True)])


def gather_hosts() -> list[str]:
    """Returns the host name of every rank, in rank order, on every rank."""
    return all_gather_objects(host_name())
