"""Weights out of a run, in the formats other projects load.

    python -m pretrain export runs/van_b3_in22k                                             all of run.export, to RUN/weights
    python -m pretrain export runs/van_b3_in22k --format official --out van_b3_in22k.pth    one, of a run or a checkpoint

official, mmpretrain and mmseg (which has no head) are files, {"state_dict": …, "classes": names}; timm and hf are folders with
config.json and model.safetensors. LOADED_BY says how each is loaded.

One process does it, on a CPU, without DeepSpeed. What was written is read back and compared before it gets its name. Beside a file stand
its model card, PATH.md, and its checksum, PATH.sha256; in a folder they are README.md and SHA256SUMS.
"""

import copy
import hashlib
import json
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import timm.models
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from data.common.files import publish, sync
from pretrain.config import Config, from_dict
from pretrain.model.formats import some, to_format
from pretrain.run.directory import MANIFEST
from pretrain.weights.initial import read_source
from pretrain.weights.run_model import build_trained, open_run

FOLDERS = ("timm", "hf")
WEIGHTS, LIST = "weights", "weights.json"  # of a run: their folder, and the list in it of what was written, from which step
SUFFIXES = {"official": ".pth", "mmseg": "_mmseg.pth", "mmpretrain": "_mmpretrain.pth", "timm": "_timm", "hf": "_hf"}
LOADED_BY = {
    "official": '`model.load_state_dict(torch.load(PATH)["state_dict"])` in the authors\' VAN-Classification',
    "mmseg": "`pretrained=PATH` of the backbone in the authors' VAN-Segmentation, VAN-Detection and their ports",
    "mmpretrain": "`load_from = PATH` in a config of OpenMMLab's mmpretrain",
    "timm": '`import pretrain.model.van; timm.create_model("local-dir:PATH", pretrained=True)`',
    "hf": "`VanForImageClassification.from_pretrained(PATH)` of transformers, with VAN up to 4.30",
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def release(run: Path, log: Callable[[str], None] = print) -> list[Path]:
    """Writes a finished run's weights, or their moving average where one is kept, to RUN/weights in the formats of run.export: NAME.pth
    for the authors' code, NAME_FORMAT.pth or the folder NAME_FORMAT for others. Returns where they are.

    What is there already, whole and of the same step, stays; what an earlier try left is replaced.

    Args:
        log: gets a line for each.

    Raises:
        ValueError: the run is not finished, has no whole checkpoint, or RUN/weights can't be written.
    """
    if (run / MANIFEST).is_file():
        raise ValueError(f"{run} is a checkpoint: give --format and --out")
    checkpoint, trainer = open_run(run)
    step, total, config = trainer["step"], trainer["identity"]["steps"], from_dict(trainer["config"])
    if step < total:
        raise ValueError(f"{run} is not finished: step {step} of {total}; with --format and --out its weights are exported as they are")
    average = bool(config.engine.ema_decay)
    state = {"step": step, "weights": "ema" if average else "raw"}
    listed = _listed(run / WEIGHTS)
    outs = {fmt: run / WEIGHTS / f"{config.name}{SUFFIXES[fmt]}" for fmt in config.run.export}
    missing = {fmt: out for fmt, out in outs.items() if not _stands(fmt, out, state, listed)}
    for fmt, out in outs.items():
        if fmt not in missing:
            log(f"{out}: there already, of step {step}")
    if missing:
        model, config, trainer = build_trained(checkpoint, average)
    for fmt, out in missing.items():
        _check_place([out], force=True)
        written, digest = _write(copy.deepcopy(model), config, trainer, fmt, out, average=average)
        listed[out.name] = state | {"sha256": digest}
        _list(run / WEIGHTS, listed)
        log(written)
    return list(outs.values())


def _listed(folder: Path) -> dict[str, Any]:
    """What is in a run's folder of weights, by name; nothing where that can't be read, so that all is written anew."""
    try:
        found = json.loads((folder / LIST).read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _list(folder: Path, listed: dict[str, Any]) -> None:
    try:
        with (folder / f".{LIST}").open("w") as file:
            json.dump(listed, file, indent=1)
            publish(file, folder / LIST)
    except OSError as error:
        raise ValueError(f"{folder / LIST} can't be written: {error}") from error


def _stands(fmt: str, out: Path, state: dict[str, Any], listed: dict[str, Any]) -> bool:
    """Whether an export is there, as it was written."""
    weights, *beside = _files(fmt, out)
    if not all(path.is_file() for path in (weights, *beside)):
        return False
    return listed.get(out.name) == state | {"sha256": _sha256(weights)}


def export(
    source: Path, fmt: str, out: Path, *, average: bool = False, dtype: str = "fp32", features_only: bool = False,
    licence: str = "not stated", force: bool = False,
) -> str:  # fmt: skip
    """Writes a run's weights; returns a line that says what was written.

    Args:
        source: a run directory, whose newest whole checkpoint is taken, or a checkpoint.
        average: the moving average instead of the weights.
        dtype: one of DTYPES.
        features_only: leave the head out. mmseg never has one.

    Raises:
        ValueError: no whole checkpoint to read, no average in it, `out` can't be written, has a name of another format, or exists and
            `force` is off or it is no export.
    """
    _check_place([out] if fmt in FOLDERS else _files(fmt, out), force)
    if fmt not in FOLDERS and out.suffix == ".safetensors":
        raise ValueError(f"{out}: format {fmt} is a file of torch.save; call it {out.with_suffix('.pth')}")
    model, config, trainer = build_trained(source, average)
    written, _ = _write(model, config, trainer, fmt, out, average=average, dtype=dtype, features_only=features_only, licence=licence)
    return written


def _write(
    model: nn.Module, config: Config, trainer: dict[str, Any], fmt: str, out: Path, *, average: bool, dtype: str = "fp32",
    features_only: bool = False, licence: str = "not stated",
) -> tuple[str, str]:  # fmt: skip
    """Writes a model, which may be changed by that; what was there is replaced once all is written. Returns a line and the weights'
    SHA-256."""
    headless = features_only or fmt == "mmseg"
    if headless:
        model.reset_classifier(0)  # type: ignore[operator]
    model.to(DTYPES[dtype])
    partial = out.with_name(f".partial-{out.name}")
    _remove(partial)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _WRITERS[fmt](partial, fmt, model, config, trainer)
        _compare(read_source(partial).weights, model.state_dict())

        digest = _sha256(_files(fmt, partial)[0])
        card = model_card(config, trainer, fmt, average=average, dtype=dtype, headless=headless, digest=digest, licence=licence)
        weights, *beside = _files(fmt, out)
        _put(partial, fmt, out, (card, f"{digest}  {weights.name}\n"))
    except OSError as error:
        raise ValueError(f"{out} can't be written: {error}") from error
    finally:
        _remove(partial)
    told = f"{config.model.name}, {'moving average' if average else 'weights'} of step {trainer['step']}, {dtype}, format {fmt}"
    return f"{out}: {told}; model card {beside[0]}, checksum {beside[1]}", digest


def _put(partial: Path, fmt: str, out: Path, texts: tuple[str, str]) -> None:
    """Gives what was written its name, with model card and checksum, in the place of what has that name. Whenever this is cut short, there
    is a whole export or none, and no card or checksum of another."""
    weights, *beside = _files(fmt, out)
    if fmt in FOLDERS:
        shutil.copymode(partial / "config.json", partial / weights.name)  # safetensors lets nobody else read what it writes
        for path, text in zip(beside, texts, strict=True):
            (partial / path.name).write_text(text)
        for path in partial.iterdir():
            sync(path)
    sync(partial)
    removed = out.with_name(f".removed-{out.name}")
    _remove(removed)
    if out.is_dir() or (fmt in FOLDERS and out.exists()):
        out.rename(removed)
    if fmt not in FOLDERS:
        for path in beside:
            path.unlink(missing_ok=True)
    partial.rename(out)
    if fmt not in FOLDERS:
        for path, text in zip(beside, texts, strict=True):
            path.write_text(text)
    sync(out.parent)
    _remove(removed)


def _files(fmt: str, out: Path) -> list[Path]:
    """Of an export: the weights, their model card and their checksum."""
    if fmt in FOLDERS:
        return [out / "model.safetensors", out / "README.md", out / "SHA256SUMS"]
    return [out, Path(f"{out}.md"), Path(f"{out}.sha256")]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_place(written: list[Path], force: bool) -> None:
    """Raises ValueError where something stands that was not asked to be replaced, or that is no export."""
    taken = [path for path in written if path.exists()]
    if taken and not force:
        raise ValueError(f"{taken[0]} exists; give another --out, or --force to replace it")
    for folder in (path for path in taken if path.is_dir()):
        others = sorted({path.name for path in folder.iterdir()} - {"config.json", "model.safetensors", "README.md", "SHA256SUMS"})
        if others:
            raise ValueError(f"{folder} is not replaced: it holds more than an export, {some(others)}; give another --out")


def _write_file(path: Path, fmt: str, model: nn.Module, config: Config, trainer: dict[str, Any]) -> None:
    # The classes tell whoever starts from the file which row of the head is whose.
    contents = {"state_dict": to_format(model.state_dict(), fmt), "classes": trainer["classes"]}
    with path.open("wb") as file:  # given a path, torch.save puts its stem into the file and refuses one without
        torch.save(contents, file)


def _write_timm(path: Path, fmt: str, model: nn.Module, config: Config, trainer: dict[str, Any]) -> None:
    # The normalisation and the evaluation's resize go along, so that timm builds the right input transform.
    squash = config.data.eval_resize == "squash"  # straight to the size: nothing is cropped
    settings = {
        "input_size": [3, config.data.image_size, config.data.image_size],
        "mean": list(config.data.mean), "std": list(config.data.std),
        "crop_pct": 1.0 if squash else config.data.eval_crop, "crop_mode": "squash" if squash else "center",
    }  # fmt: skip
    model.pretrained_cfg = {**model.pretrained_cfg, **settings}  # type: ignore[dict-item,assignment]
    labels = {"label_names": trainer["classes"]} if model.num_classes else {}
    timm.models.save_for_hf(model, str(path), model_config=labels, safe_serialization=True)


def _write_hf(path: Path, fmt: str, model: nn.Module, config: Config, trainer: dict[str, Any]) -> None:
    stages: Any = model.stages
    widths = [info["num_chs"] for info in model.feature_info]  # type: ignore[union-attr]
    classes = trainer["classes"]
    settings = {
        "architectures": ["VanForImageClassification" if model.num_classes else "VanModel"], "model_type": "van",
        "image_size": config.data.image_size, "num_channels": 3, "patch_sizes": [7, 3, 3, 3], "strides": [4, 2, 2, 2],
        "hidden_sizes": widths, "depths": [len(stage.blocks) for stage in stages], "hidden_act": "gelu",
        "mlp_ratios": [stage.blocks[0].mlp.fc1.out_channels // width for stage, width in zip(stages, widths, strict=True)],
        "layer_norm_eps": 1e-6, "layer_scale_init_value": 1e-2, "drop_path_rate": 0.0, "dropout_rate": 0.0,
        "id2label": {str(i): name for i, name in enumerate(classes)}, "label2id": {name: i for i, name in enumerate(classes)},
        "torch_dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
    }  # fmt: skip
    path.mkdir()
    (path / "config.json").write_text(json.dumps(settings, indent=1))
    # Its VanModel holds a last LayerNorm that its forward pass never uses, and warns when a file lacks it.
    unused = {"van.layernorm.weight": torch.ones(widths[-1]), "van.layernorm.bias": torch.zeros(widths[-1])}
    save_file(to_format(model.state_dict(), fmt) | unused, path / "model.safetensors", metadata={"format": "pt"})


_WRITERS = {"official": _write_file, "mmseg": _write_file, "mmpretrain": _write_file, "timm": _write_timm, "hf": _write_hf}


def model_card(
    config: Config, trainer: dict[str, Any], fmt: str, *, average: bool, dtype: str, headless: bool, digest: str, licence: str
) -> str:
    """What the weights are and how they were made, as Markdown."""
    evaluation = trainer.get("evaluation")
    measured = "not measured"
    if evaluation:
        accuracy = evaluation["ema" if average else "weight"]
        measured = f"top-1 {accuracy['top1']:.2%}, top-5 {accuracy['top5']:.2%} on {accuracy['images']} images of {config.data.val}"
        measured += f", at step {evaluation['step']}"
    data, optim = config.data, config.optim
    rows = {
        "model": f"{config.model.name}, {'without head' if headless else f'{config.model.classes} classes'}, {dtype}",
        "weights": f"{'moving average, decay ' + str(config.engine.ema_decay) if average else 'as trained'}, of step {trainer['step']}, "
        f"epoch {trainer.get('epoch', 0):.2f}",
        "accuracy": measured,
        "data": f"{data.train}, fingerprint {trainer['identity'].get('data')}",
        "recipe": f"AdamW, learning rate {optim.lr} to {optim.min_lr}, {optim.warmup_epochs} epochs of warm-up, {config.epochs} epochs, "
        f"global batch {config.global_batch}, weight decay {optim.weight_decay}, drop path {config.model.drop_path}, mixup {data.mixup}, "
        f"cutmix {data.cutmix}, label smoothing {optim.label_smoothing}, {data.image_size} px, seed {config.seed}",
        "input": f"RGB, {data.image_size} x {data.image_size}, mean {list(data.mean)}, standard deviation {list(data.std)}, bicubic, "
        f"{'resized straight to the size' if data.eval_resize == 'squash' else f'centre crop of {data.eval_crop}'}",
        "started from": config.model.init_from or "random weights",
        "command": f"`{trainer.get('command', 'not recorded')}`",
        "commit": trainer.get("commit", "not recorded"),
        "versions": ", ".join(f"{name} {number}" for name, number in trainer.get("versions", {}).items()) or "not recorded",
        "exported with": f"torch {torch.__version__}, timm {version('timm')}, format {fmt}",
        "load with": LOADED_BY[fmt],
        "SHA-256": digest,
        "licence": licence,
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"# {config.name}\n\nVisual Attention Network (arXiv 2202.09741), trained with van-pretrain.\n\n| | |\n|---|---|\n{table}\n"


def _compare(read_back: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    names = read_back.keys() | expected.keys()
    same = {name for name in read_back.keys() & expected.keys() if torch.equal(read_back[name], expected[name])}
    if names != same:
        raise RuntimeError(
            f"what was written reads back differently: {some(sorted(names - same))}; is the disk sound? Nothing was exported"
        )


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    elif path.exists():
        path.unlink()
