"""The model of a run or a checkpoint, in one process, without DeepSpeed: for evaluation, export and fine-tuning."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pretrain import checkpoint
from pretrain.config import Config, from_dict
from pretrain.model.build import build_model


def is_run(source: Path) -> bool:
    """Whether it is a run directory or a checkpoint, rather than a file or a folder of weights."""
    return (source / "checkpoints").is_dir() or (source / checkpoint.MANIFEST).is_file()


def build_trained(source: Path, average: bool) -> tuple[nn.Module, Config, dict[str, Any]]:
    """The model of a run or checkpoint, with its weights or with their moving average; its settings and trainer.json.

    Raises:
        ValueError: no whole checkpoint, or an average is asked for and none was kept.
    """
    path, trainer = open_run(source)
    config = from_dict(trainer["config"])
    if average and not config.engine.ema_decay:
        raise ValueError(f"{source} keeps no moving average of its weights (engine.ema_decay was 0); take the weights: --weights raw")
    kinds = ("ema", "buffer", "buffer_ema") if average else ("weight", "buffer")
    tensors = checkpoint.read(path, kinds)
    by_kind: dict[str, dict[str, Tensor]] = {kind: {} for kind in kinds}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition("/")
        by_kind[kind][rest] = tensor
    model = build_model(config)
    copy_weights(model, by_kind[kinds[0]], by_kind["buffer"] | by_kind.get("buffer_ema", {}))
    return model.eval(), config, trainer


def open_run(source: Path) -> tuple[Path, dict[str, Any]]:
    """The checkpoint that a run directory (its newest whole one) or a checkpoint directory stands for, and its trainer.json.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    if (source / checkpoint.MANIFEST).is_file():
        faults = checkpoint.verify(source)
        if faults:
            raise ValueError(f"checkpoint {source} is damaged: {'; '.join(faults)}")
        path = source
    else:
        newest = checkpoint.newest_whole(source / "checkpoints", print)
        if newest is None:
            raise ValueError(f"{source} is neither a checkpoint nor a run directory with one in checkpoints/")
        path = newest
    return path, json.loads((path / checkpoint.TRAINER).read_text())


@torch.no_grad()
def copy_weights(model: nn.Module, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> None:
    """Copies weights into a model by name.

    Args:
        parameters: each of as many elements as the model's, in the layout that the parameters are stored in; may be flat.
        buffers: likewise.
    """
    for name, parameter in model.named_parameters():
        parameter.copy_(parameters[name].view(parameter.shape))
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name].view(buffer.shape))
