"""Weights to start training from: files and folders in any of the formats, runs and checkpoints, and what becomes of their head.

model.init_from=PATH     a file or folder that `export` or another project wrote, a run directory, or a checkpoint
model.head_init=keep     the head as it is; it must have the job's classes
                zero     a new head, all zeros
                map      the rows of the head's classes that the job has too, by name (wnid), and zeros for the others
"""

import argparse
import json
import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pretrain.model.formats import WITHOUT_USE, bare, from_format, some
from pretrain.model.van import VARIANTS
from pretrain.weights.run_model import build_trained, is_run

HEAD = ("head.weight", "head.bias")


@dataclass(frozen=True)
class Source:
    """A native state dict, the names of its head's classes where they are known, and what else was there and means nothing."""

    weights: dict[str, Tensor]
    classes: tuple[str, ...] | None
    without_use: tuple[str, ...] = ()


def start_from(model: nn.Module, path: Path, head_init: str, classes: Sequence[str]) -> list[str]:
    """Loads the weights at `path` into the model, whose head is for `classes`; returns lines that list what was taken and what not.

    Raises:
        ValueError: no weights there, anything but the head is missing, left over or of another shape, or the head can't be had as asked.
    """
    source = read_source(path)
    rows, told = _rows(source, path, head_init, classes)
    own = model.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in own.items() if name not in HEAD}
    if rows:
        shapes |= {name: (len(source.classes or classes), *own[name].shape[1:]) for name in HEAD}
    if wrong := misfits(shapes, source.weights):
        named, expected = variant(source.weights), variant(own)
        if named not in (None, expected):
            wrong.insert(0, f"these look like {named}, the job's model is {expected}")
        raise ValueError(f"model.init_from={path} does not fit the model: {some(wrong, '; ')}")

    head = {name: torch.zeros_like(own[name]) for name in HEAD}
    for ours, theirs in rows:
        for name in HEAD:
            head[name][ours] = source.weights[name][theirs]
    model.load_state_dict(source.weights | head)
    lines = [f"starting from {path}: all {len(own) - len(HEAD)} tensors of the backbone loaded", f"  {', '.join(HEAD)}: {told}"]
    if source.without_use:
        lines.append(f"  {', '.join(source.without_use)}: dropped; transformers saves them and uses them nowhere")
    return lines


def misfits(shapes: Mapping[str, tuple[int, ...]], weights: Mapping[str, Tensor]) -> list[str]:
    """What of a native state dict is not as these shapes; it may have a head that they speak not of."""
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    wrong = [f"{name} has shape {found[name]} instead of {shape}" for name, shape in shapes.items() if found.get(name, shape) != shape]
    wrong += [f"{name} is missing" for name in shapes if name not in found]
    return wrong + [f"{name} is left over" for name in found if name not in shapes and name not in HEAD]


def variant(weights: Mapping[str, Tensor]) -> str | None:
    """The model of the family whose depths and widths a native state dict has; None if there is none."""
    blocks = [match for name in weights if (match := re.match(r"stages\.(\d)\.blocks\.(\d+)\.", name))]
    depths = tuple(1 + max((int(match[2]) for match in blocks if int(match[1]) == stage), default=-1) for stage in range(4))
    widths = tuple(len(weights.get(f"stages.{stage}.norm.weight", ())) for stage in range(4))
    return next((name for name, found in VARIANTS.items() if (found["depths"], found["embed_dims"]) == (depths, widths)), None)


def read_source(path: Path) -> Source:
    """The weights of a run or a checkpoint, or of a file or a folder in whichever format it is.

    Raises:
        ValueError: none of these, damaged, or weights of another model.
    """
    if is_run(path):
        model, _, trainer = build_trained(path, average=False)
        return Source(model.state_dict(), tuple(trainer["classes"]))
    contents = _contents(path)
    try:
        native = from_format(contents)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    other = [f"{name} is a {type(value).__name__}" for name, value in native.items() if not isinstance(value, Tensor)]
    if other:
        raise ValueError(f"{path} holds other things than tensors: {some(other, '; ')}")
    return Source(native, _class_names(path, contents), tuple(name for name in WITHOUT_USE if name in bare(contents)))


def _contents(path: Path) -> Mapping[str, Any]:
    file = path
    if path.is_dir():  # transformers, in its last versions with VAN, writes the second of these
        file = next((path / name for name in ("model.safetensors", "pytorch_model.bin") if (path / name).is_file()), path)
    try:
        # Checkpoints that the authors' training code saves hold its arguments as well.
        with torch.serialization.safe_globals([argparse.Namespace]):
            contents = load_file(file) if file.suffix == ".safetensors" else torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # torch's own words are a page, and advise to run whatever the file holds
        raise ValueError(f"{file} can't be read as weights: not a file of torch.save, or one with more in it than tensors") from error
    except Exception as error:  # torch and safetensors raise half a dozen kinds for files that are not theirs
        raise ValueError(f"{file} can't be read as weights: {str(error) or 'it is empty'}") from error
    if not isinstance(contents, dict):
        raise ValueError(f"{file} holds a {type(contents).__name__} instead of a dictionary of weights")
    return contents


def _class_names(path: Path, contents: Mapping[str, Any]) -> tuple[str, ...] | None:
    """As timm's and transformers' config.json and the files of `export` hold them; files of others don't."""
    names = contents.get("classes")
    if path.is_dir():
        settings = json.loads((path / "config.json").read_text()) if (path / "config.json").is_file() else {}
        by_id = settings.get("id2label")
        names = [by_id[str(i)] for i in range(len(by_id))] if by_id else settings.get("label_names")
    return tuple(names) if names else None


def _rows(source: Source, path: Path, head_init: str, classes: Sequence[str]) -> tuple[list[tuple[int, int]], str]:
    """(row of the new head, row of the source's) of the rows to take, and what is to be said of the head; other rows are zeros."""
    missing = [name for name in HEAD if name not in source.weights]
    if head_init == "zero":
        dropped = [name for name in HEAD if name in source.weights]
        there = [f"{what} there: {', '.join(names)}" for what, names in (("dropped", dropped), ("missing", missing)) if names]
        return [], "; ".join(["new, all zeros", *there])
    if missing:
        raise ValueError(f"model.head_init={head_init}, but {path} holds no {' and no '.join(missing)}; use model.head_init=zero")
    if head_init == "keep":
        if source.classes is not None and source.classes != tuple(classes):
            raise ValueError(f"model.head_init=keep, but the head in {path} is for other classes than the data; use map or zero")
        return [(row, row) for row in range(len(classes))], "kept"
    if source.classes is None:
        raise ValueError(
            f"model.head_init=map, but {path} does not name its classes; use model.head_init=zero, or a run or an exported file"
        )
    row_of = {name: row for row, name in enumerate(source.classes)}
    rows = [(row, row_of[name]) for row, name in enumerate(classes) if name in row_of]
    if not rows:
        raise ValueError(f"model.head_init=map, but {path} has none of the data's classes ({classes[0]}, …); it has {source.classes[0]}, …")
    new = [name for name in classes if name not in row_of]
    told = [f"{len(rows)} of {len(classes)} rows taken by class name"]
    told += [f"zeros for {some(new)}"] if new else []
    told += [f"dropped there: {len(row_of) - len(rows)} rows"] if len(rows) < len(row_of) else []
    return rows, "; ".join(told)
