"""Reads weights from a run, a checkpoint, or a file or folder in any format that exists for the model.

    source = read_source(Path("van_b3.pth"), model)     native names, whatever the format of the file
    formats_of(model)                                   ("timm", …)

The format timm, the native names, exists for every model, others for some model classes (pretrain/model/formats.py).
"""

import argparse
import copy
import json
import pickle
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from data.common.text import join_first
from pretrain.model.fast.channels_last import restore_reference
from pretrain.model.formats import FORMATS, UNUSED_KEYS, from_format, unwrap
from pretrain.model.van import VAN
from pretrain.weights.run_model import build_trained, is_run

_FORMATS_BY_CLASS: dict[type[nn.Module], tuple[str, ...]] = {VAN: FORMATS}


@dataclass(frozen=True)
class Source:
    """Weights by native name."""

    weights: dict[str, Tensor]
    classes: tuple[str, ...] | None  # names of the head's classes, if known
    architecture: str | None  # the model's name in timm without a tag, if known
    unused: tuple[str, ...] = ()  # keys in the file that no model uses


def formats_of(model: nn.Module) -> tuple[str, ...]:
    """Returns the names of the weight formats that exist for a model."""
    return next((formats for kind, formats in _FORMATS_BY_CLASS.items() if isinstance(model, kind)), ("timm",))


def architecture(model: nn.Module) -> str:
    """Returns the name under which timm built a model, without a tag: `resnet50` for `resnet50.a1_in1k`."""
    return model.pretrained_cfg["architecture"]  # type: ignore[index,return-value]


def head_keys(model: nn.Module) -> tuple[str, ...]:
    """Returns the state-dict keys of a timm model's classifier with a row per class; none if the model has no classifier.

    Other layers that a model counts as its classifier, such as a hidden one, belong to the backbone here.
    """
    classifier = model.get_classifier()  # type: ignore[operator]
    layers = classifier if isinstance(classifier, tuple) else (classifier,)
    prefixes = tuple(f"{name}." for name, module in model.named_modules() if any(module is layer for layer in layers))
    state = model.state_dict()
    return tuple(key for key, tensor in state.items() if key.startswith(prefixes) and tensor.shape[:1] == (model.num_classes,))


def find_mismatches(shapes: Mapping[str, tuple[int, ...]], weights: Mapping[str, Tensor], optional: Collection[str] = ()) -> list[str]:
    """Describes each tensor that is missing, has another shape than in `shapes`, or is in neither `shapes` nor `optional`."""
    actual = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    wrong = [f"{name} has shape {actual[name]} instead of {shape}" for name, shape in shapes.items() if actual.get(name, shape) != shape]
    wrong += [f"{name} is missing" for name in shapes if name not in actual]
    return wrong + [f"{name} is not in the model" for name in actual if name not in shapes and name not in optional]


def read_source(path: Path, model: nn.Module) -> Source:
    """Reads weights for a model, without checking that they fit.

    Args:
        path: a run directory, a checkpoint, a file of torch.save or safetensors, or a folder written by timm or transformers.
        model: determines the formats to try.

    Raises:
        ValueError: `path` is none of these, is damaged, or its keys match no format of the model.
    """
    if is_run(path):
        trained, _, trainer = build_trained(path, average=False)
        return Source(trained.state_dict(), tuple(trainer["classes"]), architecture(trained))
    contents = _read(path)
    try:
        weights = from_format(contents) if len(formats_of(model)) > 1 else unwrap(contents)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    others = [f"{name} is a {type(value).__name__}" for name, value in weights.items() if not isinstance(value, Tensor)]
    if others:
        raise ValueError(f"{path} holds other things than tensors: {join_first(others, '; ')}")
    unused = tuple(key for key in UNUSED_KEYS if key in unwrap(contents) and key not in weights)
    return Source(_fit_image_size(weights, model), *_describe(path, contents), unused)


def _fit_image_size(weights: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Resamples weights that depend on the image size, such as position embeddings, to the model's image size, by timm's function."""
    head, resample = head_keys(model), getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items() if name not in head}
    if resample is None or all(weights[name].shape == shape for name, shape in shapes.items() if name in weights):
        return weights
    plain = copy.deepcopy(model)
    restore_reference(plain)  # timm reads shapes of the model's parameters
    return dict(resample(dict(weights), plain))


def _read(path: Path) -> Mapping[str, Any]:
    file = path
    if path.is_dir():  # the last versions of transformers with VAN write pytorch_model.bin
        file = next((path / name for name in ("model.safetensors", "pytorch_model.bin") if (path / name).is_file()), path)
    try:
        # Checkpoints of timm's CheckpointSaver, which the authors use, hold the training script's arguments too.
        with torch.serialization.safe_globals([argparse.Namespace]):
            contents = load_file(file) if file.suffix == ".safetensors" else torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # torch's message is a page long and suggests executing the file's code
        raise ValueError(f"{file} can't be read as weights: not a file of torch.save, or one with more in it than tensors") from error
    except Exception as error:  # torch and safetensors raise many types for damaged files
        raise ValueError(f"{file} can't be read as weights: {str(error) or 'it is empty'}") from error
    if not isinstance(contents, dict):
        raise ValueError(f"{file} holds a {type(contents).__name__} instead of a dictionary of weights")
    return contents


def _describe(path: Path, contents: Mapping[str, Any]) -> tuple[tuple[str, ...] | None, str | None]:
    """Returns class names and architecture, from a folder's config.json or as `export` and timm's CheckpointSaver store them."""
    classes, name = contents.get("classes"), contents.get("arch")
    if path.is_dir():
        settings = json.loads((path / "config.json").read_text()) if (path / "config.json").is_file() else {}
        by_id = settings.get("id2label")
        classes = [by_id[str(i)] for i in range(len(by_id))] if by_id else settings.get("label_names")
        name = settings.get("architecture")
    return tuple(classes) if classes else None, name if isinstance(name, str) else None
