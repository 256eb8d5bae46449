"""Exports the weights of a run in the formats that other projects load.

    python -m pretrain export runs/van_b3_in22k                                             the formats of run.export, to RUN/weights
    python -m pretrain export runs/van_b3_in22k --format official --out van_b3_in22k.pth    one format, of a run or a checkpoint

Every model can be exported as timm; the other formats exist for some model classes (`formats_of`). official, mmpretrain and mmseg (which
has no head) are files, {"state_dict": …, "arch": name, "classes": names}; timm and hf are folders with config.json and model.safetensors.

Export runs in one process, on a CPU, without DeepSpeed. The weights are read back and compared before the export is renamed to its final
path. It comes with a model card and a checksum: PATH.md and PATH.sha256 beside a file, README.md and SHA256SUMS in a folder.
"""

import copy
import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import timm.models
import torch
from safetensors.torch import save_file
from torch import nn

from data.common.files import sync
from data.common.text import join_first
from pretrain.config import Config, from_dict
from pretrain.model.formats import has_head, to_format
from pretrain.run.directory import MANIFEST
from pretrain.weights.run_model import build_trained, open_run
from pretrain.weights.source import architecture, formats_of, read_source

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Export:
    """One export: format, destination and options."""

    fmt: str
    out: Path
    average: bool = False  # the moving average in place of the weights
    dtype: str = "fp32"  # one of DTYPES
    features_only: bool = False  # without the head
    license: str = "not stated"  # for the model card

    @property
    def is_folder(self) -> bool:
        return EXPORT_FORMATS[self.fmt].is_folder

    @property
    def has_head(self) -> bool:
        return not self.features_only and has_head(self.fmt)

    def files(self, out: Path) -> tuple[Path, Path, Path]:
        """Returns the paths of weights, model card and checksum of an export to `out`."""
        if self.is_folder:
            return out / "model.safetensors", out / "README.md", out / "SHA256SUMS"
        return out, Path(f"{out}.md"), Path(f"{out}.sha256")


def check_formats(model: nn.Module, formats: Sequence[str], setting: str) -> None:
    """Raises ValueError that names the setting if a model can't be exported in one of the formats."""
    missing = [fmt for fmt in formats if fmt not in formats_of(model)]
    if missing:
        raise ValueError(f"{setting}: {type(model).__name__} has no format {', '.join(missing)}, only {', '.join(formats_of(model))}")


def run_formats(config: Config, model: nn.Module) -> list[str]:
    """Returns the formats of run.export; for null, timm and, if the model has it, official."""
    if config.run.export is not None:
        return config.run.export
    return [fmt for fmt in ("official", "timm") if fmt in formats_of(model)]


def export(
    source: Path, fmt: str, out: Path, *, average: bool = False, dtype: str = "fp32", features_only: bool = False,
    license: str = "not stated", force: bool = False,
) -> str:  # fmt: skip
    """Exports a checkpoint, or the newest complete one of a run; returns a line that describes the export.

    `out` is the file or folder to write; `force` replaces an existing export. The other options are those of `Export`.

    Raises:
        ValueError: there is no complete checkpoint or no average in it, or the model has no such format; `out` can't be written or has the
            suffix of another format, or exists and either `force` is off or it is no export.
    """
    job = Export(fmt, out, average, dtype, features_only, license)
    _check_destination([out] if job.is_folder else list(job.files(out)), force)
    if not job.is_folder and out.suffix == ".safetensors":
        raise ValueError(f"{out}: format {fmt} is a file of torch.save; call it {out.with_suffix('.pth')}")
    model, config, trainer = build_trained(source, average)
    check_formats(model, [fmt], "--format")
    return _write(job, model, config, trainer)


def export_run(run: Path, log: Callable[[str], None] = print) -> list[Path]:
    """Exports a finished run to RUN/weights in the formats of run.export; returns the paths.

    Exports the moving average if there is one. The paths are NAME.pth for official, NAME_FORMAT.pth or NAME_FORMAT for the others; earlier
    exports are replaced. `log` is called with a line for each export.

    Raises:
        ValueError: the run is not finished, has no complete checkpoint, or RUN/weights can't be written.
    """
    if (run / MANIFEST).is_file():
        raise ValueError(f"{run} is a checkpoint: give --format and --out")
    checkpoint, trainer = open_run(run)
    step, total, config = trainer["step"], trainer["identity"]["steps"], from_dict(trainer["config"])
    if step < total:
        raise ValueError(f"{run} is not finished: step {step} of {total}; use --format and --out to export its weights as they are")
    average = bool(config.engine.ema_decay)
    model, _, trainer = build_trained(checkpoint, average)
    formats = run_formats(config, model)
    check_formats(model, formats, "run.export")
    jobs = [Export(fmt, run / "weights" / f"{config.name}{EXPORT_FORMATS[fmt].suffix}", average) for fmt in formats]
    for job in jobs:
        _check_destination([job.out], force=True)
        log(_write(job, copy.deepcopy(model), config, trainer))
    return [job.out for job in jobs]


def _check_destination(paths: list[Path], force: bool) -> None:
    """Raises ValueError if a path exists and `force` is off, or if it is a folder with other files than an export's."""
    existing = [path for path in paths if path.exists()]
    if existing and not force:
        raise ValueError(f"{existing[0]} exists; give another --out, or --force to replace it")
    for folder in (path for path in existing if path.is_dir()):
        others = sorted({path.name for path in folder.iterdir()} - {"config.json", "model.safetensors", "README.md", "SHA256SUMS"})
        if others:
            raise ValueError(f"{folder} is not replaced: it holds more than an export: {join_first(others)}; give another --out")


# ---------------------------------------------------------------- write


def _write(job: Export, model: nn.Module, config: Config, trainer: dict[str, Any]) -> str:
    """Writes an export, replacing an earlier one; returns a line that describes it.

    Args:
        model: modified: its head is removed and its type converted, as the job requires.
        config, trainer: as `build_trained` returns them.
    """
    if not job.has_head:
        model.reset_classifier(0)  # type: ignore[operator]
    model.to(DTYPES[job.dtype])
    partial = job.out.with_name(f".partial-{job.out.name}")
    _remove(partial)
    try:
        job.out.parent.mkdir(parents=True, exist_ok=True)
        EXPORT_FORMATS[job.fmt].write(partial, job.fmt, model, config, trainer)
        _compare(partial, model)
        weights, card, checksum = job.files(job.out)
        with job.files(partial)[0].open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        _publish(job, partial, model_card(job, model, config, trainer, digest), f"{digest}  {weights.name}\n")
    except OSError as error:
        raise ValueError(f"{job.out} can't be written: {error}") from error
    finally:
        _remove(partial)
    kind = "moving average" if job.average else "weights"
    line = f"{job.out}: {config.model.name}, {kind} of step {trainer['step']}, {job.dtype}, format {job.fmt}"
    return f"{line}; model card {card}, checksum {checksum}"


def _publish(job: Export, partial: Path, card: str, checksum: str) -> None:
    """Renames a written export to its final path and adds model card and checksum, replacing an earlier export.

    If the process dies in between, there is a complete export or none, and no card or checksum of another export.
    """
    out, texts = job.out, dict(zip(job.files(job.out)[1:], (card, checksum), strict=True))
    removed = out.with_name(f".removed-{out.name}")
    _remove(removed)
    if job.is_folder:
        shutil.copymode(partial / "config.json", partial / "model.safetensors")  # safetensors writes files that only their owner may read
        for path, text in texts.items():
            (partial / path.name).write_text(text)
        for path in partial.iterdir():
            sync(path)
    sync(partial)
    if out.is_dir() or (job.is_folder and out.exists()):
        out.rename(removed)
    if not job.is_folder:
        for path in texts:
            path.unlink(missing_ok=True)
    partial.rename(out)
    if not job.is_folder:
        for path, text in texts.items():
            path.write_text(text)
    sync(out.parent)
    _remove(removed)


def _write_file(path: Path, fmt: str, model: nn.Module, config: Config, trainer: dict[str, Any]) -> None:
    contents = {"state_dict": to_format(model.state_dict(), fmt), "arch": architecture(model), "classes": trainer["classes"]}
    with path.open("wb") as file:  # given a path, torch.save stores the path's stem and rejects an empty one
        torch.save(contents, file)


def _write_timm(path: Path, fmt: str, model: nn.Module, config: Config, trainer: dict[str, Any]) -> None:
    squash = config.data.eval_resize == "squash"  # straight to the size, without a crop
    transform = {
        "input_size": [3, config.data.image_size, config.data.image_size],
        "mean": list(config.data.mean), "std": list(config.data.std),
        "crop_pct": 1.0 if squash else config.data.eval_crop, "crop_mode": "squash" if squash else "center",
    }  # fmt: skip
    model.pretrained_cfg = {**model.pretrained_cfg, **transform}  # type: ignore[dict-item,assignment]
    labels = {"label_names": trainer["classes"]} if model.num_classes else {}
    arguments = config.model.kwargs or None
    timm.models.save_for_hf(model, str(path), model_config=labels, model_args=arguments, safe_serialization=True)


def _write_hf(path: Path, fmt: str, model: nn.Module, config: Config, trainer: dict[str, Any]) -> None:
    """Writes a VAN for transformers: config.json as its VanConfig, model.safetensors."""
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
    # VanModel has a final LayerNorm that its forward pass never uses, and warns if a file lacks it.
    unused = {"van.layernorm.weight": torch.ones(widths[-1]), "van.layernorm.bias": torch.zeros(widths[-1])}
    save_file(to_format(model.state_dict(), fmt) | unused, path / "model.safetensors", metadata={"format": "pt"})


@dataclass(frozen=True)
class ExportFormat:
    """How weights in a format are stored. The format's names of keys are in pretrain/model/formats.py."""

    suffix: str  # follows the run's name
    write: Callable[[Path, str, nn.Module, Config, dict[str, Any]], None]  # (path, format, model, config, trainer), as of `_write`
    load_with: str  # for the model card: loads the export from PATH
    is_folder: bool = False


EXPORT_FORMATS = {
    "official": ExportFormat(
        ".pth", _write_file, '`model.load_state_dict(torch.load(PATH)["state_dict"])` in the authors\' VAN-Classification'
    ),
    "mmseg": ExportFormat(
        "_mmseg.pth", _write_file, "`pretrained=PATH` of the backbone in the authors' VAN-Segmentation, VAN-Detection and their ports"
    ),
    "mmpretrain": ExportFormat("_mmpretrain.pth", _write_file, "`load_from = PATH` in a config of OpenMMLab's mmpretrain"),
    "timm": ExportFormat("_timm", _write_timm, '`timm.create_model("local-dir:PATH", pretrained=True)`', is_folder=True),
    "hf": ExportFormat(
        "_hf", _write_hf, "`VanForImageClassification.from_pretrained(PATH)` of transformers, with VAN up to 4.30", is_folder=True
    ),
}


def _compare(partial: Path, model: nn.Module) -> None:
    """Raises RuntimeError if the written weights differ from the model's."""
    written, expected = read_source(partial, model).weights, model.state_dict()
    same = {name for name in written.keys() & expected.keys() if torch.equal(written[name], expected[name])}
    different = (written.keys() | expected.keys()) - same
    if different:
        raise RuntimeError(f"the export reads back differently: {join_first(sorted(different))}; is the disk sound? Nothing was exported")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    elif path.exists():
        path.unlink()


# ---------------------------------------------------------------- model card


def model_card(job: Export, model: nn.Module, config: Config, trainer: dict[str, Any], digest: str) -> str:
    """Returns the model card as Markdown; `trainer` is the checkpoint's trainer.json, `digest` the SHA-256 of the weights."""
    data, optim = config.data, config.optim
    settings: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    drop_path = "" if config.model.drop_path is None else f"drop path {config.model.drop_path}, "
    rows = {
        "model": f"{config.model.name}, {f'{config.model.classes} classes' if job.has_head else 'without head'}, {job.dtype}",
        "weights": f"{f'moving average, decay {config.engine.ema_decay}' if job.average else 'as trained'}, of step {trainer['step']}, "
        f"epoch {trainer.get('epoch', 0):.2f}",
        "accuracy": _accuracy(trainer.get("evaluation"), config, job.average),
        "data": f"{data.train}, fingerprint {trainer['identity'].get('data')}",
        "recipe": f"AdamW, learning rate {optim.lr} to {optim.min_lr}, {optim.warmup_epochs} epochs of warm-up, {config.epochs} epochs, "
        f"global batch {config.global_batch}, weight decay {optim.weight_decay}, {drop_path}mixup {data.mixup}, "
        f"cutmix {data.cutmix}, label smoothing {optim.label_smoothing}, {data.image_size} px, seed {config.seed}",
        "input": f"RGB, {data.image_size} x {data.image_size}, mean {list(data.mean)}, standard deviation {list(data.std)}, bicubic, "
        f"{'resized straight to the size' if data.eval_resize == 'squash' else f'center crop of {data.eval_crop}'}",
        "started from": config.model.init_from or "random weights",
        "command": f"`{trainer.get('command', 'not recorded')}`",
        "commit": trainer.get("commit", "not recorded"),
        "versions": ", ".join(f"{name} {number}" for name, number in trainer.get("versions", {}).items()) or "not recorded",
        "exported with": f"torch {torch.__version__}, timm {version('timm')}, format {job.fmt}",
        "load with": load_command(config.model.name, job.fmt),
        "SHA-256": digest,
        "license": job.license,
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    paper = f"{settings['paper_name']} ({settings['paper_ids']}), t" if settings.get("paper_name") else "T"
    return f"# {config.name}\n\n{paper}rained with van-pretrain.\n\n| | |\n|---|---|\n{table}\n"


def load_command(name: str, fmt: str) -> str:
    """Returns the code that loads an export from PATH; `name` is model.name. A model that timm doesn't contain is imported first."""
    file, _, name_in_file = name.rpartition(":")
    module = Path(file).stem if file else timm.model_entrypoint(name_in_file).__module__
    first = f"`import {module}` and " if fmt == "timm" and not module.startswith("timm.") else ""
    return first + EXPORT_FORMATS[fmt].load_with


def _accuracy(evaluation: dict[str, Any] | None, config: Config, average: bool) -> str:
    if not evaluation:
        return "not measured"
    result = evaluation["ema" if average else "weight"]
    scores = f"top-1 {result['top1']:.2%}, top-5 {result['top5']:.2%}"
    return f"{scores} on {result['images']} images of {config.data.val}, at step {evaluation['step']}"
