"""Initializes a model from existing weights, with its head kept, zeroed or mapped by class name.

model.init_from=PATH     a file or folder written by `export` or another project, a run directory, or a checkpoint
model.head_init=keep     the head unchanged; its classes must be the job's
                zero     a new head, all zeros
                map      the rows of classes that the job shares, by name (wnid), and zeros for the others
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from data.common.text import join_first
from pretrain.weights.source import Source, architecture, find_mismatches, head_keys, read_source


def start_from(model: nn.Module, path: Path, head_init: str, classes: Sequence[str]) -> list[str]:
    """Loads the weights at `path` into the model; returns lines for the log that list the tensors loaded and dropped.

    `classes` are the names of the job's classes, in the order of the head's rows; `head_init` is `keep`, `zero` or `map`.

    Raises:
        ValueError: there are no weights, they do not fit the model's backbone, or `head_init` is impossible with them.
    """
    source, head, state = read_source(path, model), head_keys(model), model.state_dict()
    rows, remark = _head_rows(source, path, head, head_init, classes)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items() if name not in head}
    if rows:
        shapes |= {name: (len(source.classes or classes), *state[name].shape[1:]) for name in head}
    if wrong := find_mismatches(shapes, source.weights, optional=head):
        if source.architecture not in (None, architecture(model)):
            wrong.insert(0, f"these are weights of {source.architecture}, the job's model is {architecture(model)}")
        raise ValueError(f"model.init_from={path} does not fit the model: {join_first(wrong, '; ')}")

    new_head = {name: torch.zeros_like(state[name]) for name in head}
    for row, source_row in rows:
        for name in head:
            new_head[name][row] = source.weights[name][source_row]
    model.load_state_dict(source.weights | new_head)
    lines = [f"starting from {path}: all {len(state) - len(head)} tensors of the backbone loaded", f"  {', '.join(head)}: {remark}"]
    if source.unused:
        lines.append(f"  {', '.join(source.unused)}: dropped; transformers saves them and never uses them")
    return lines


def _head_rows(
    source: Source, path: Path, head: Sequence[str], head_init: str, classes: Sequence[str]
) -> tuple[list[tuple[int, int]], str]:
    """Returns the rows to copy as (row of the new head, row of the source's head), and a remark for the log; other rows are zero."""
    missing = [name for name in head if name not in source.weights]
    if head_init == "zero":
        dropped = [name for name in head if name in source.weights]
        remarks = [f"{kind} in the source: {', '.join(names)}" for kind, names in (("dropped", dropped), ("missing", missing)) if names]
        return [], "; ".join(["new, all zeros", *remarks])
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
    remarks = [f"{len(rows)} of {len(classes)} rows copied by class name"]
    remarks += [f"zeros for {join_first(new)}"] if new else []
    remarks += [f"{len(row_of) - len(rows)} rows of the source dropped"] if len(rows) < len(row_of) else []
    return rows, "; ".join(remarks)
