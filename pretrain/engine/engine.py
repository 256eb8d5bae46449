"""The DeepSpeed engine of a job, and the process groups it runs in.

ZeRO stage, precision and accumulation come from the settings. Weights are fp32 and arithmetic runs under torch's autocast:
DeepSpeed's own bf16 mode would hold BatchNorm's statistics in bf16, and its torch_autocast would reduce the gradients of convolutions
and linear layers in bf16. Norm, clipping and loss scale are the guard's (pretrain/engine/guard.py): DeepSpeed's wait for
the device in every
step, and so does its throughput timer, which is off.
"""

import logging
import os
import resource
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from pretrain.config import Config, EngineConfig
from pretrain.engine import zero_state
from pretrain.engine.batch_stats import synchronise
from pretrain.engine.optim import AdamW, parameter_groups
from pretrain.engine.reductions import Reductions
from pretrain.model.fast.kernel_choice import compile_blocks
from pretrain.model.van import Block
from pretrain.run.place import host

T = TypeVar("T")
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# A rank that died is noticed by its launcher; this only bounds how long the others may wait for one that hangs.
COLLECTIVE_TIMEOUT = timedelta(minutes=30)


def start(engine: EngineConfig) -> torch.device:
    """Joins the job's processes, as RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT say; returns this rank's device. Where RANK
    isn't set, this process is alone.

    Raises:
        ValueError: engine.device=cuda and this rank has no GPU.
    """
    device = rank_device(engine)
    os.environ["DS_ACCELERATOR"] = device.type
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed

    # torch's own deprecations, of what DeepSpeed calls in every step.
    warnings.filterwarnings("ignore", message=".*(all_gather_into_tensor|reduce_scatter_tensor)", category=FutureWarning)
    # On a CPU DeepSpeed would compile a collective of its own, which needs a C++ compiler; gloo's serve.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if device.type == "cuda" else "gloo"
    if "RANK" not in os.environ and not dist.is_initialized():
        _be_alone(backend)
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, timeout=COLLECTIVE_TIMEOUT, verbose=False)
    return device


def join() -> None:
    """Joins the job's processes without DeepSpeed, which takes seconds to import. Where RANK isn't set, this process is alone."""
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT)
    else:
        _be_alone(backend)


def _be_alone(backend: str) -> None:
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed wants it said
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def rank_device(engine: EngineConfig) -> torch.device:
    """The device of this rank: the CPU, or of the node's GPUs the one that LOCAL_RANK says, which becomes the current one.

    Raises:
        ValueError: engine.device=cuda and this rank has no GPU.
    """
    if device_type(engine) == "cpu":
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


def device_type(engine: EngineConfig) -> str:
    """What the settings come to on this machine: cuda or cpu."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if engine.device == "auto" else engine.device


def hosts() -> list[str]:
    """The node of each rank. Collective."""
    nodes: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(nodes, host())
    return nodes


def memory_gb(device: torch.device) -> float:
    """The most that this process has held so far: on a GPU of its memory, in tensors; else of the host's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


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


def arithmetic(device: torch.device, precision: str) -> str:
    """What a precision of the settings comes to on a device: bf16 is fp32 on a CPU that has no instructions for it, where PyTorch's
    convolutions in bf16 are plain loops, many times as slow as those in fp32."""
    lacking = device.type == "cpu" and precision == "bf16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return "fp32" if lacking else precision


def autocast(device: torch.device, precision: str) -> torch.autocast:
    used = arithmetic(device, precision)
    return torch.autocast(device.type, dtype=PRECISIONS[used], enabled=used != "fp32")


def build(config: Config, model: Any, accumulation: int) -> Any:
    """Wraps the model in DeepSpeed's engine, with its optimizer's states created. What the settings say of how the model computes
    (precision, compilation, recomputation, BatchNorm over all ranks) is done to it here."""
    import deepspeed
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
    from deepspeed.utils import set_z3_leaf_module

    import_muon()
    if config.engine.sync_bn:
        synchronise(model)
    for number in config.model.checkpoint_stages:
        model.stages[number].grad_checkpointing = True
    if config.model.compile:
        compile_blocks(model)
    device = torch.device(device_type(config.engine))
    model.forward = autocast(device, config.engine.precision)(model.forward)
    optimizer = AdamW(
        parameter_groups(model, config.optim.weight_decay, config.optim.layer_decay),
        lr=config.optim.lr,
        betas=config.optim.betas,
        eps=config.optim.eps,
        ema_decay=config.engine.ema_decay,
    )
    stage, size = config.engine.zero_stage, bucket_size(model)
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": size}
    if config.engine.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": device.type == "cuda"}
    elif stage == 1:
        zero |= {"compute_grad_norm": False, "overlap_comm": False, "contiguous_gradients": False}  # so it has no hooks
    elif stage == 2:
        zero |= {"compute_grad_norm": False, "overlap_comm": True}  # in stage 3 that is DeepSpeed's default
    if stage == 3:
        # Weights are gathered block by block, and hooks run once a block. By itself DeepSpeed does that for each layer, of which a block
        # has eighteen, and gathers small parameters, most of a VAN's, one by one behind every update, for which the host then waits.
        for module in model.modules():
            set_z3_leaf_module(module, isinstance(module, Block))
        zero["stage3_param_persistence_threshold"] = 0
    settings = {
        "train_micro_batch_size_per_gpu": config.engine.micro_batch,
        "zero_force_ds_cpu_optimizer": False,  # offloaded or not, our own AdamW updates
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0,
        "zero_optimization": zero,
        "timers": {"throughput": {"enabled": False}},
    }
    ZERO_SUPPORTED_OPTIMIZERS.append(AdamW)  # it steps as torch.optim.AdamW, which is on DeepSpeed's list
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)
    zero_state.leave_out_norm(engine)
    zero_state.leave_out_wait(engine)
    zero_state.leave_out_relinking(engine)
    if stage == 0 or (stage == 1 and not config.engine.offload):
        engine.reductions = Reductions(engine, size)
    zero_state.start_optimizer(engine)
    return engine


def import_muon() -> None:
    """Imports what DeepSpeed's ZeRO imports of the optimizer Muon whichever optimizer there is, with torch.compile switched off: its
    decorators would import all of inductor at every rank's start."""
    switch = "TORCHDYNAMO_DISABLE"
    before = os.environ.get(switch)
    os.environ[switch] = "1"
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401

    if before is None:
        del os.environ[switch]
    else:
        os.environ[switch] = before


def bucket_size(model: torch.nn.Module) -> int:
    """Elements of the gradient that are reduced together, while the backward pass goes on: an eighth of the model, so that little is left
    when it ends and messages are long (VAN-B3 with 21,841 classes 45 MB, B6 108 MB), but no less than the largest parameter, as
    a larger one would be reduced by itself.

    DeepSpeed, which reduces in stages 2 and 3, allocates two such buckets for a backward pass. By its default, 500 M elements, they would
    be 4 GB, and the whole model one.
    """
    sizes = [parameter.numel() for parameter in model.parameters()]
    return max(-(-sum(sizes) // 8), *sizes)
