"""The DeepSpeed engine of a job.

ZeRO stage, precision and accumulation come from the settings. Weights are fp32 and arithmetic runs under torch's autocast:
DeepSpeed's own bf16 mode would hold BatchNorm's statistics in bf16, and its torch_autocast would reduce the gradients of convolutions
and linear layers in bf16. Norm, clipping and loss scale are the guard's (pretrain/engine/guard.py): DeepSpeed's wait for
the device in every
step, and so does its throughput timer, which is off.
"""

import logging
import os
import warnings
from typing import Any

import torch

from pretrain.config import Config
from pretrain.engine import zero_state
from pretrain.engine.distributed import COLLECTIVE_TIMEOUT, device_type
from pretrain.engine.optim import AdamW, parameter_groups
from pretrain.engine.precision import autocast
from pretrain.engine.reductions import Reductions
from pretrain.model.van import Block


def build_engine(config: Config, model: Any, accumulation: int) -> Any:
    """Wraps a model that is ready to train in DeepSpeed's engine, and creates its optimizer's states.

    Args:
        config: of the job; the model already has the layers and the blocks that it asks for.
        model: on the CPU; its forward pass runs under autocast from here on.
        accumulation: micro-batches of an optimizer step.
    """
    device = torch.device(device_type(config.engine))
    _prepare_deepspeed(device)
    import deepspeed
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
    from deepspeed.utils import set_z3_leaf_module

    import_muon()
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


def _prepare_deepspeed(device: torch.device) -> None:
    """Imports DeepSpeed for `device` and lets it adopt the process group."""
    os.environ["DS_ACCELERATOR"] = device.type
    os.environ.setdefault("LOCAL_RANK", "0")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed

    # torch's own deprecations, of what DeepSpeed calls in every step.
    warnings.filterwarnings("ignore", message=".*(all_gather_into_tensor|reduce_scatter_tensor)", category=FutureWarning)
    # On a CPU DeepSpeed would compile a collective of its own, which needs a C++ compiler; gloo's serve.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if device.type == "cuda" else "gloo"
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, timeout=COLLECTIVE_TIMEOUT, verbose=False)


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
