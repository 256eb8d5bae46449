"""Weights out of a run, in the formats other projects load, and into a model that starts from them.

    python -m pretrain export runs/van_b3_in22k --format official --out van_b3_in22k.pth

| format | what is written | who loads it |
|---|---|---|
| official | PATH: {"state_dict": …} | the authors' VAN-Classification |
| mmseg | PATH: {"state_dict": …} without head | the authors' VAN-Segmentation, VAN-Detection |
| mmpretrain | PATH: {"state_dict": …} | OpenMMLab's mmpretrain |
| timm | PATH/config.json, PATH/model.safetensors | timm.create_model("local-dir:PATH", pretrained=True), once pretrain.van is imported |

One process does it, on a CPU, without DeepSpeed. What was written is read back and compared before it gets its name.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import timm.models
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pretrain import checkpoint
from pretrain.config import Config, from_dict
from pretrain.evaluate import build_model, fill
from pretrain.weights import from_format, to_format

FORMATS = ("official", "mmseg", "mmpretrain", "timm")


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
    fill(model, by_kind[kinds[0]], by_kind["buffer"] | by_kind.get("buffer_ema", {}))
    return model.eval(), config, trainer


def export(source: Path, fmt: str, out: Path, *, average: bool = False, force: bool = False) -> str:
    """Writes a run's weights; returns a line that says what was written.

    Raises:
        ValueError: no whole checkpoint to read, no average in it, `out` exists and `force` is off, or it has a name of another format.
    """
    if out.exists() and not force:
        raise ValueError(f"{out} exists; give another --out, or --force to replace it")
    if fmt != "timm" and out.suffix == ".safetensors":
        raise ValueError(f"{out}: format {fmt} is a file of torch.save; call it {out.with_suffix('.pth')}")
    model, config, trainer = build_trained(source, average)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".partial-{out.name}")
    _remove(partial)
    if fmt == "timm":
        # The names of the classes and of the normalisation go along, so that timm builds the right input transform.
        squash = config.data.eval_resize == "squash"  # straight to the size: nothing is cropped
        settings = {
            "input_size": [3, config.data.image_size, config.data.image_size],
            "mean": list(config.data.mean), "std": list(config.data.std),
            "crop_pct": 1.0 if squash else config.data.eval_crop, "crop_mode": "squash" if squash else "center",
        }  # fmt: skip
        model.pretrained_cfg = {**model.pretrained_cfg, **settings}  # type: ignore[dict-item,assignment]
        timm.models.save_for_hf(model, str(partial), model_config={"label_names": trainer["classes"]}, safe_serialization=True)
    else:
        with partial.open("wb") as file:  # given a path, torch.save puts its stem into the file and refuses one without
            torch.save({"state_dict": to_format(model.state_dict(), fmt)}, file)
    _compare(read_file(partial), model.state_dict(), headless=fmt == "mmseg")
    _remove(out)
    partial.rename(out)
    return f"{out}: {config.model.name}, {'moving average' if average else 'weights'} of step {trainer['step']}, format {fmt}"


def read_file(path: Path) -> dict[str, Tensor]:
    """A native state dict from a weights file or a timm folder, in whichever format it is.

    Raises:
        ValueError: not a weights file, or keys of another model.
    """
    path = path / "model.safetensors" if path.is_dir() else path
    try:
        weights = load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and safetensors raise half a dozen kinds for files that are not theirs
        raise ValueError(f"{path} can't be read as weights: {error}") from error
    if not isinstance(weights, dict):
        raise ValueError(f"{path} holds a {type(weights).__name__} instead of a dictionary of weights")
    try:
        native = from_format(weights)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    other = [f"{name} is a {type(value).__name__}" for name, value in native.items() if not isinstance(value, Tensor)]
    if other:
        raise ValueError(f"{path} holds other things than tensors: {'; '.join(other[:5])}")
    return native


def start_from(model: nn.Module, source: Path) -> str:
    """Loads weights to train on from, out of a run, a checkpoint or a file; a head of other classes stays as it was initialised.

    Returns a line that says what was taken.

    Raises:
        ValueError: anything but the head is missing, left over or of another shape.
    """
    is_run = (source / "checkpoints").is_dir() or (source / checkpoint.MANIFEST).is_file()
    weights = build_trained(source, average=False)[0].state_dict() if is_run else read_file(source)
    own = model.state_dict()
    head = [name for name in own if name.startswith("head.")]
    kept = all(name in weights and weights[name].shape == own[name].shape for name in head)
    if not kept:
        weights = {name: tensor for name, tensor in weights.items() if name not in head} | {name: own[name] for name in head}
    wrong = [f"{name} is missing" for name in own if name not in weights]
    wrong += [f"{name} is left over" for name in weights if name not in own]
    shapes = [(name, tuple(weights[name].shape), tuple(own[name].shape)) for name in own if name in weights]
    wrong += [f"{name} has shape {theirs} instead of {ours}" for name, theirs, ours in shapes if theirs != ours]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(f"model.init_from={source} does not fit the model: {'; '.join(wrong[:5])}{more}")
    model.load_state_dict(weights)
    return f"starting from {source}, {'head included' if kept else 'with a new head: there is none of these classes'}"


def _compare(read_back: dict[str, Tensor], written: dict[str, Tensor], headless: bool) -> None:
    expected = {name: tensor for name, tensor in written.items() if not (headless and name.startswith("head."))}
    same = read_back.keys() == expected.keys() and all(torch.equal(read_back[name], expected[name]) for name in expected)
    if not same:
        raise RuntimeError("what was written reads back differently; is the disk sound? Nothing was exported")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
