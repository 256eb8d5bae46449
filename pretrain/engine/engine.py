"""Builds the DeepSpeed engine of a job: model, optimizer and ZeRO stage.

Weights are fp32, and the model computes under torch's autocast. DeepSpeed's own bf16 mode would keep BatchNorm's statistics in bf16,
and its torch_autocast would reduce the gradients of convolutions and linear layers in bf16. The guard (guard.py) measures, clips and
scales gradients, because DeepSpeed's functions for that wait for the device in every step. So would its throughput timer, which is off.
"""

from typing import Any

import torch
from torch import nn

from pretrain.config import Config
from pretrain.engine import deepspeed_compat, zero_state
from pretrain.engine.distributed import resolve_device_type
from pretrain.engine.optim import AdamW, group_parameters
from pretrain.engine.precision import autocast
from pretrain.engine.reductions import Reductions


def build_engine(config: Config, model: nn.Module, accumulation: int) -> Any:
    """Wraps a model that is ready to train in DeepSpeed's engine, and creates the optimizer's states.

    Stages 0 and 1 reduce gradients by reductions.py; in stages 2 and 3 DeepSpeed reduces them.

    Args:
        config: of the job.
        model: on the CPU, with the layers that the settings ask for; its forward pass is changed to run under autocast.
        accumulation: micro-batches per optimizer step.
    """
    device = torch.device(resolve_device_type(config.engine))
    model.forward = autocast(device, config.engine.precision)(model.forward)
    optim = config.optim
    groups = group_parameters(model, optim.weight_decay, optim.layer_decay)
    optimizer = AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, ema_decay=config.engine.ema_decay)
    stage, size = config.engine.zero_stage, choose_bucket_size(model)
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": size}
    if stage == 1:
        zero |= {"compute_grad_norm": False, "overlap_comm": False, "contiguous_gradients": False}  # DeepSpeed then adds no hooks
    elif stage == 2:
        zero |= {"compute_grad_norm": False, "overlap_comm": True}  # stage 3 overlaps by default
    elif stage == 3:
        zero |= {"stage3_param_persistence_threshold": 0}  # no whole parameters, which loading a checkpoint would leave stale
    settings = {
        "train_micro_batch_size_per_gpu": config.engine.micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0,
        "zero_optimization": zero,
        "timers": {"throughput": {"enabled": False}},
    }
    engine = deepspeed_compat.initialize(model, optimizer, settings, device)
    if stage in (0, 1):
        engine.reductions = Reductions(engine, size)
    zero_state.start_optimizer(engine)
    return engine


def choose_bucket_size(model: nn.Module) -> int:
    """Returns the elements of a gradient bucket: an eighth of the model, or the largest parameter if that is larger.

    Eight buckets leave little to reduce after the backward pass, and their messages are long (45 MB for VAN-B3, 108 MB for VAN-B6).
    DeepSpeed's default of 500 M elements would put the whole model into one bucket.
    """
    sizes = [parameter.numel() for parameter in model.parameters()]
    return max(-(-sum(sizes) // 8), *sizes)
