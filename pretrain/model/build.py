"""Builds the model that a job's settings name: a VAN, another timm classifier, or the user's own.

    model = build_model(config)                  # model.name=van_b3
    model = build_model(config)                  # model.name=my_models.py:my_net, a file that registers my_net with timm

The rest of the pipeline relies only on timm's model interface: create_model, forward_features and forward_head, reset_classifier,
group_matcher, no_weight_decay and set_grad_checkpointing.
"""

import difflib
import importlib.util
import sys
import traceback
import zlib
from pathlib import Path
from typing import Any, cast

import timm
import torch
from torch import Tensor, nn

import pretrain.model.van  # noqa: F401  registers the variants with timm
from pretrain.config import Config
from pretrain.model.fast.channels_last import use_channels_last

INTERFACE = ("forward_features", "forward_head", "get_classifier", "reset_classifier", "num_classes", "num_features", "pretrained_cfg")


def build_model(config: Config) -> nn.Module:
    """Returns the model of `config.model`, newly initialized, on the CPU.

    A model with a fixed input size, such as a ViT, is built for data.image_size. Every process stores the weights of dense convolutions
    channels-last (pretrain/model/fast/channels_last.py), because checkpoints keep the memory layout of weights.

    Raises:
        ValueError: timm has no such model, or the model rejects these arguments, lacks a part of timm's interface, or can't recompute
            these stages.
    """
    settings = config.model
    name = _registered_name(settings.name)
    arguments: dict[str, Any] = {"num_classes": settings.classes}
    if getattr(timm.get_pretrained_cfg(name), "fixed_input_size", False):
        arguments["img_size"] = config.data.image_size
    if settings.drop_path is not None:
        arguments["drop_path_rate"] = settings.drop_path
    arguments |= settings.kwargs
    try:
        model = timm.create_model(name, **arguments)
    except (TypeError, AssertionError, ValueError, KeyError) as error:
        given = ", ".join(f"{key}={value}" for key, value in arguments.items())
        raise ValueError(
            f"model.name={settings.name} can't be built with {given}: {error}; see model.kwargs, and model.drop_path=null for a model "
            "without stochastic depth"
        ) from error
    missing = [part for part in INTERFACE if not hasattr(model, part)]
    if missing:
        raise ValueError(f"model.name={settings.name}: {type(model).__name__} lacks {', '.join(missing)} of the interface of timm's models")
    _convert_frozen_parameters_to_buffers(model)
    use_channels_last(model)
    _recompute_stages(model, settings.name, settings.checkpoint_stages)
    return model


def build_empty_model(config: Config, device: torch.device) -> nn.Module:
    """Returns the model on a device with uninitialized parameters and buffers, which is faster than initializing them.

    A model that computes with values while it is built, or holds tensors that are neither parameters nor buffers, is built on the CPU.
    """
    try:
        with torch.device("meta"):
            model = build_model(config)
    except RuntimeError:
        return build_model(config).to(device)
    if any(isinstance(value, Tensor) for module in model.modules() for value in vars(module).values()):
        return build_model(config).to(device)
    return model.to_empty(device=device)


def _registered_name(name: str) -> str:
    """Returns the name under which timm knows the model; imports the user's file first if `name` is PATH.py:NAME.

    Raises:
        ValueError: the file or the name does not exist.
    """
    path, colon, name_in_file = name.rpartition(":")
    if colon:
        _import_file(Path(path))
        name = name_in_file
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        where = f"{path} registers no model {name}" if colon else f"timm has no model {name}"
        raise ValueError(f"model.name: {where}" + (f"; did you mean {' or '.join(near)}?" if near else ""))
    return name


def _import_file(path: Path) -> None:
    """Imports a Python file that registers models with timm, once per process."""
    if not path.is_file():
        raise ValueError(f"model.name: there is no file {path}")
    name = f"user_model_{path.stem}_{zlib.crc32(bytes(path.resolve())):08x}"  # files in two folders may have the same name
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"model.name: {path} is not a Python file")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # of any kind: the user's code decides
        del sys.modules[name]
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise ValueError(
            f"model.name: {path} can't be imported: {type(error).__name__}: {error} ({place.filename}:{place.lineno})"
        ) from error


def _convert_frozen_parameters_to_buffers(model: nn.Module) -> None:
    """Replaces parameters that need no gradient by buffers of the same name, which are saved but not optimized."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not parameter.requires_grad:
                delattr(module, name)
                module.register_buffer(name, parameter.data)


def _recompute_stages(model: nn.Module, name: str, stages: list[int]) -> None:
    """Turns on activation checkpointing, in only these stages if the model has a switch per stage."""
    if not stages:
        return
    listed = getattr(model, "stages", None)
    modules: list[Any] = list(listed) if isinstance(listed, nn.Sequential | nn.ModuleList) else []
    if len(modules) == 4 and all(hasattr(stage, "grad_checkpointing") for stage in modules):
        for stage in stages:
            modules[stage].grad_checkpointing = True
    elif set(stages) == {0, 1, 2, 3}:
        try:
            cast(Any, model).set_grad_checkpointing(True)
        except (AssertionError, AttributeError) as error:  # how timm's models refuse
            raise ValueError(f"model.checkpoint_stages={stages}: {name} can't recompute its blocks; set []") from error
    else:
        raise ValueError(
            f"model.checkpoint_stages={stages}: {name} recomputes all of its blocks or none; set [0, 1, 2, 3] for all, or [] for none"
        )
