"""The DeepSpeed engine of a job, and the process groups it runs in.

ZeRO stage, precision and accumulation come from the settings. Weights are fp32 and arithmetic runs under torch's autocast:
DeepSpeed's own bf16 mode would hold BatchNorm's statistics in bf16. Gradients are summed over the ranks in fp32 as well
(`lower_precision_safe_modules` empty; DeepSpeed would reduce those of convolutions and linear layers in bf16).
"""

import logging
import os
import socket
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from pretrain import zero_state
from pretrain.config import Config, EngineConfig
from pretrain.optim import AdamW, parameter_groups

T = TypeVar("T")
PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32}
# A rank that died is noticed by its launcher; this only bounds how long the others may wait for one that hangs.
COLLECTIVE_TIMEOUT = timedelta(minutes=30)


def start(engine: EngineConfig) -> torch.device:
    """Joins the job's processes, as RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT say; returns this rank's device.

    Raises:
        ValueError: engine.device=cuda and this rank has no GPU.
    """
    device = rank_device(engine)
    os.environ["DS_ACCELERATOR"] = device.type
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed

    # torch's own deprecation, of what DeepSpeed calls in every step.
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor", category=FutureWarning)
    # On a CPU DeepSpeed would compile a collective of its own, which needs a C++ compiler; gloo's serve.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if device.type == "cuda" else "gloo"
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, timeout=COLLECTIVE_TIMEOUT, verbose=False)
    return device


def join() -> None:
    """Joins the job's processes without DeepSpeed, which takes seconds to import. Where RANK isn't set, this process is alone."""
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def rank_device(engine: EngineConfig) -> torch.device:
    """The device of this rank: the CPU, or of the node's GPUs the one that LOCAL_RANK says, which becomes the current one.

    Raises:
        ValueError: engine.device=cuda and this rank has no GPU.
    """
    if engine.device == "cpu" or (engine.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"local rank {local_rank} has no GPU: this node shows {torch.cuda.device_count()}; "
            "ask Slurm for one GPU a task (--gpus-per-node and --ntasks-per-node alike), or set engine.device=cpu"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    torch.backends.cudnn.benchmark = True
    return device


def ranks_on_node() -> int:
    """How many ranks of the job run where this one does. Collective where ranks are joined."""
    if not dist.is_initialized():
        return 1
    nodes: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(nodes, socket.gethostname())
    return nodes.count(socket.gethostname())


def from_rank_0(function: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """What `function` returns on rank 0, where alone it runs, on every rank; or raises what it raises there. Collective."""
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


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def autocast(device: torch.device, precision: str) -> torch.autocast:
    return torch.autocast(device.type, dtype=PRECISIONS[precision], enabled=precision != "fp32")


def build(config: Config, model: nn.Module, accumulation: int) -> Any:
    """Wraps the model in DeepSpeed's engine, with its optimizer's states created."""
    import deepspeed
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

    optimizer = AdamW(
        parameter_groups(model, config.optim.weight_decay),
        lr=config.optim.lr,
        betas=config.optim.betas,
        eps=config.optim.eps,
        ema_decay=config.engine.ema_decay,
    )
    settings = {
        "train_micro_batch_size_per_gpu": config.engine.micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.optim.clip_grad,
        "zero_optimization": {"stage": config.engine.zero_stage},
        "torch_autocast": {
            "enabled": config.engine.precision != "fp32",
            "dtype": str(PRECISIONS[config.engine.precision]).removeprefix("torch."),
            "lower_precision_safe_modules": [],
        },
    }
    ZERO_SUPPORTED_OPTIMIZERS.append(AdamW)  # it steps as torch.optim.AdamW, which is on DeepSpeed's list
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)
    zero_state.start_optimizer(engine)
    return engine
