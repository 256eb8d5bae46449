"""Weights to start training from: files and folders in any of the formats, runs and checkpoints, and what becomes of their head.

model.init_from=PATH     a file or folder that `export` or another project wrote, a run directory, or a checkpoint
model.head_init=keep     the head as it is; it must have the job's classes
                zero     a new head, all zeros
                map      the rows of the head's classes that the job has too, by name (wnid), and zeros for the others
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pretrain import checkpoint
from pretrain.trained import build_trained
from pretrain.weights import from_format

HEAD = ("head.weight", "head.bias")


@dataclass(frozen=True)
class Source:
    """A native state dict, and the names of its head's classes where they are known."""

    weights: dict[str, Tensor]
    classes: tuple[str, ...] | None


def start_from(model: nn.Module, path: Path, head_init: str, classes: Sequence[str]) -> str:
    """Loads the weights at `path` into the model, whose head is for `classes`; returns lines that say what was taken.

    Raises:
        ValueError: no weights there, anything but the head is missing, left over or of another shape, or the head can't be had as asked.
    """
    source = read_source(path)
    own = model.state_dict()
    head, told = _head(source, own, path, head_init, classes)
    weights = {name: tensor for name, tensor in source.weights.items() if name not in HEAD} | head
    wrong = [f"{name} is missing" for name in own if name not in weights]
    wrong += [f"{name} is left over" for name in weights if name not in own]
    shapes = [(name, tuple(weights[name].shape), tuple(own[name].shape)) for name in own if name in weights]
    wrong += [f"{name} has shape {theirs} instead of {ours}" for name, theirs, ours in shapes if theirs != ours]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(f"model.init_from={path} does not fit the model: {'; '.join(wrong[:5])}{more}")
    model.load_state_dict(weights)
    return f"starting from {path}: {len(own) - len(HEAD)} tensors of the backbone loaded, none missing, none left over; head: {told}"


def read_source(path: Path) -> Source:
    """The weights of a run, a checkpoint, a file or a folder.

    Raises:
        ValueError: none of these, or damaged.
    """
    if (path / "checkpoints").is_dir() or (path / checkpoint.MANIFEST).is_file():
        model, _, trainer = build_trained(path, average=False)
        return Source(model.state_dict(), tuple(trainer["classes"]))
    return Source(read_file(path), _class_names(path))


def read_file(path: Path) -> dict[str, Tensor]:
    """A native state dict from a weights file or a folder with model.safetensors, in whichever format it is.

    Raises:
        ValueError: not a weights file, or keys of another model.
    """
    contents = _contents(path)
    try:
        native = from_format(contents)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    other = [f"{name} is a {type(value).__name__}" for name, value in native.items() if not isinstance(value, Tensor)]
    if other:
        raise ValueError(f"{path} holds other things than tensors: {'; '.join(other[:5])}")
    return native


def _contents(path: Path) -> Mapping[str, Any]:
    file = path / "model.safetensors" if path.is_dir() else path
    try:
        contents = load_file(file) if file.suffix == ".safetensors" else torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and safetensors raise half a dozen kinds for files that are not theirs
        raise ValueError(f"{file} can't be read as weights: {error}") from error
    if not isinstance(contents, dict):
        raise ValueError(f"{file} holds a {type(contents).__name__} instead of a dictionary of weights")
    return contents


def _class_names(path: Path) -> tuple[str, ...] | None:
    """As timm's and transformers' config.json and the files of `export` hold them; files of others don't."""
    if path.is_dir():
        settings = json.loads((path / "config.json").read_text()) if (path / "config.json").is_file() else {}
        by_id = settings.get("id2label")
        names = [by_id[str(i)] for i in range(len(by_id))] if by_id else settings.get("label_names")
    else:
        names = None if path.suffix == ".safetensors" else _contents(path).get("classes")
    return tuple(names) if names else None


def _head(source: Source, own: dict[str, Tensor], path: Path, head_init: str, classes: Sequence[str]) -> tuple[dict[str, Tensor], str]:
    """The head to load, and what is to be said of it."""
    zeros = {name: torch.zeros_like(own[name]) for name in HEAD}
    if head_init == "zero":
        return zeros, "new, all zeros"
    if any(name not in source.weights for name in HEAD):
        raise ValueError(f"model.head_init={head_init}, but {path} holds no head; use model.head_init=zero")
    theirs = {name: source.weights[name] for name in HEAD}
    if head_init == "keep":
        if source.classes is not None and source.classes != tuple(classes):
            raise ValueError(f"model.head_init=keep, but the head in {path} is for other classes than the data; use map or zero")
        return theirs, "kept"
    if source.classes is None:
        raise ValueError(
            f"model.head_init=map, but {path} does not name its classes; use model.head_init=zero, or a run or an exported file"
        )
    row_of = {name: row for row, name in enumerate(source.classes)}
    pairs = [(row, row_of[name]) for row, name in enumerate(classes) if name in row_of]
    if not pairs:
        raise ValueError(f"model.head_init=map, but {path} has none of the data's classes ({classes[0]}, …); it has {source.classes[0]}, …")
    ours, found = (torch.tensor(rows) for rows in zip(*pairs, strict=True))
    for name in HEAD:
        zeros[name][ours] = theirs[name][found].to(zeros[name].dtype)
    absent = [name for name in classes if name not in row_of]
    told = f"{len(pairs)} of {len(classes)} rows mapped by class name"
    return zeros, told + (f", zeros for {', '.join(absent[:5])}{' …' if len(absent) > 5 else ''}" if absent else "")
