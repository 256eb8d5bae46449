"""Builds the model of a run or a checkpoint in one process, without DeepSpeed: for evaluation, export and fine-tuning."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pretrain import checkpoint
from pretrain.config import Config, from_dict
from pretrain.model.build import build_model
from pretrain.run.directory import CHECKPOINTS, MANIFEST, TRAINER


def is_run(source: Path) -> bool:
    """Returns whether `source` is a run directory or a checkpoint rather than a file or folder of weights."""
    return (source / CHECKPOINTS).is_dir() or (source / MANIFEST).is_file()


def open_run(source: Path) -> tuple[Path, dict[str, Any]]:
    """Returns a checkpoint, or the newest complete one of a run directory, and its trainer.json.

    Raises:
        ValueError: there is no checkpoint, or it is damaged.
    """
    if (source / MANIFEST).is_file():
        path: Path | None = source
        if faults := checkpoint.verify(source):
            raise ValueError(f"checkpoint {source} is damaged: {'; '.join(faults)}")
    else:
        path = checkpoint.find_newest_whole(source / CHECKPOINTS, print)
    if path is None and not source.exists():
        raise ValueError(f"{source}: no such file or folder")
    if path is None:
        raise ValueError(f"{source} is neither a checkpoint nor a run directory with one in {CHECKPOINTS}/")
    return path, json.loads((path / TRAINER).read_text())


def build_trained(source: Path, average: bool) -> tuple[nn.Module, Config, dict[str, Any]]:
    """Returns the model of a run or checkpoint in eval mode, its settings and its trainer.json.

    `average` loads the exponential moving average in place of the weights.

    Raises:
        ValueError: there is no complete checkpoint, or no average in it.
    """
    path, trainer = open_run(source)
    config = from_dict(trainer["config"])
    reject_enclosed_code(source, config.model.name)
    if average and not config.engine.ema_decay:
        raise ValueError(f"{source} keeps no moving average of its weights (engine.ema_decay was 0); use --weights raw")
    kinds = ("ema", "buffer", "buffer_ema") if average else ("weight", "buffer")
    tensors: dict[str, dict[str, Tensor]] = {kind: {} for kind in kinds}
    for key, tensor in checkpoint.read_tensors(path, kinds).items():
        kind, _, name = key.partition("/")
        tensors[kind][name] = tensor
    model = build_model(config)
    copy_weights(model, tensors[kinds[0]], tensors["buffer"] | tensors.get("buffer_ema", {}))
    return model.eval(), config, trainer


def reject_enclosed_code(source: Path, name: str) -> None:
    """Raises ValueError if a Python file inside `source` defines the model: a downloaded checkpoint must not execute code."""
    file = name.rpartition(":")[0]
    if file and Path(file).resolve().is_relative_to(source.resolve()):
        raise ValueError(f"{source}: its model.name is {name}, a file inside it, which is not executed; keep such files outside of runs")


@torch.no_grad()
def copy_weights(model: nn.Module, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> None:
    """Copies tensors into a model by name; they may be flattened, and have the model's memory layout."""
    for name, parameter in model.named_parameters():
        parameter.copy_(parameters[name].view(parameter.shape))
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name].view(buffer.shape))
