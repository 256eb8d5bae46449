"""Defines the settings of a job: the schema, its constraints, and the batch sizes that depend on the number of ranks.

    config = load("configs/van_b3_in22k.yaml", ["engine.micro_batch=128", "data.train=/data/in22k/train"])

Each field carries its meaning, its constraint and its rule on resume; `python -m pretrain config --markdown` generates
docs/configuration.md from the fields. data/common/config_files.py reads the files.
"""

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

from data.common import config_files
from data.common.config_files import ConfigError
from data.common.fields import MISSING, Check, above_0_to_1, at_least, below_1, must_be, parsed_by, positive, setting, settings_of, to_text
from data.common.files import open_to_replace
from data.settings import JobData, JobEngine, data_conflicts
from pretrain.model.formats import FORMATS

EXTRAS = {"wandb": "wandb", "mlflow": "mlflow-skinny sqlalchemy alembic"}  # the packages of each tracker, as in pyproject.toml
NOT_IN_KWARGS = ("num_classes", "drop_path_rate", "pretrained", "checkpoint_path")  # arguments of timm.create_model


def _installed(module: str) -> Check:
    problem = f"{module} is not installed: .venv/bin/pip install {EXTRAS[module]}"
    return Check(f"with the package {module} installed", lambda value: None if find_spec(module) else problem)


def profiled_steps(text: str | None) -> range:
    """Parses START:STOP into a range of steps, empty for None; raises ValueError for any other text."""
    if text is None:
        return range(0)
    start, colon, stop = text.partition(":")
    if not (colon and start.isdecimal() and stop.isdecimal()):
        raise ValueError("must be START:STOP, two whole numbers of steps")
    if int(start) >= int(stop):
        raise ValueError("is empty: START must be less than STOP")
    return range(int(start), int(stop))


@dataclass
class ModelConfig:
    name: str = setting(MISSING, "The model's name in timm, such as van_b3.", resume="fixed")
    classes: int = setting(MISSING, "Outputs of the classification head.", positive, resume="fixed")
    drop_path: float | None = setting(None, "Drop-path rate of the last block, from 0 at the first; null: the model's own.", below_1)
    kwargs: dict[str, Any] = setting(
        {},
        "Further arguments of the model, as `timm.create_model` takes them: `model.kwargs.drop_rate=0.1` sets one of them.",
        must_be(f"without {', '.join(NOT_IN_KWARGS)}; model.classes, drop_path and init_from set these", set(NOT_IN_KWARGS).isdisjoint),
    )
    init_from: str | None = setting(None, "Initial weights: a run, a checkpoint, or a file or folder in any format.", on_node=True)
    head_init: Literal["keep", "zero", "map"] = setting(
        "map", "Head of `model.init_from`: keep it, set it to zero, or take the rows of the classes that are in the data."
    )
    kernels: Literal["auto", "triton", "torch"] = setting(
        "torch",
        "Kernels of convolutions, residual adds and normalizations. auto: Triton on GPUs where it works; triton: Triton or an error.",
        resume="free",
    )
    checkpoint_stages: list[int] = setting(
        [],
        "Activation checkpointing: stages whose blocks keep only their input and recompute the rest; costs a third more computation.",
        must_be("of stages 0, 1, 2 and 3", lambda stages: set(stages) <= {0, 1, 2, 3}),
        resume="free",
    )
    compile: bool = setting(False, "Compile each kind of block with torch.compile; the first step takes minutes.", resume="free")
    graphs: bool = setting(False, "Run the stages as CUDA graphs: a few launches per step instead of thousands.", resume="free")


@dataclass
class OptimConfig:
    lr: float = setting(MISSING, "Peak learning rate; it is not scaled with the global batch.", positive)
    min_lr: float = setting(1e-6, "Learning rate at the end of the cosine schedule.", at_least(0))
    warmup_lr: float = setting(1e-6, "Learning rate at the start of the warm-up.", at_least(0))
    warmup_epochs: float = setting(0.0, "Length of the linear warm-up, in epochs.", at_least(0))
    warmup_steps: int | None = setting(None, "Length of the warm-up in optimizer steps, in place of epochs.", at_least(0))
    warmup_samples: int | None = setting(None, "Length of the warm-up in samples, in place of epochs.", at_least(0))
    weight_decay: float = setting(0.05, "Weight decay of AdamW; biases and other 1-D parameters have none.", at_least(0))
    layer_decay: float = setting(1.0, "Ratio of a layer's learning rate to the next layer's; the head has the full rate.", above_0_to_1)
    betas: tuple[float, float] = setting(
        (0.9, 0.999),
        "Decay rates of AdamW's two moments.",
        must_be("each at least 0 and less than 1", lambda betas: 0 <= min(betas) <= max(betas) < 1),
    )
    eps: float = setting(1e-8, "Epsilon of AdamW.", positive)
    label_smoothing: float = setting(0.1, "Label smoothing of the cross-entropy.", below_1)
    clip_grad: float = setting(0.0, "Maximum norm of all gradients together; larger gradients are scaled down. 0: off.", at_least(0))


@dataclass
class EngineConfig(JobEngine):
    zero_stage: int = setting(
        1,
        "DeepSpeed ZeRO, which shards over the ranks: 0 nothing, 1 the optimizer state, 2 also gradients, 3 also weights.",
        must_be("one of 0, 1, 2, 3", lambda stage: stage in (0, 1, 2, 3)),
        resume="free",
    )
    precision: Literal["bf16", "fp16", "fp32"] = setting("bf16", "Precision of the computation; weights, sums and statistics are fp32.")
    sync_bn: bool = setting(False, "BatchNorm statistics over the micro-batches of all ranks, in place of each rank's own.")
    ema_decay: float = setting(0.0, "Decay per step of the moving average of the weights; 0: off.", below_1)


@dataclass
class GuardConfig:
    """Configures the response to faults. Whatever the settings, a step whose loss or gradient is not finite never changes the weights."""

    spike: float = setting(
        0.0,
        "Roll back after a loss above this multiple of the average of the last hundred steps; 0: never.",
        must_be("more than 1, or 0 for never", lambda value: value == 0 or value > 1),
        resume="free",
    )
    skipped: int = setting(20, "Roll back after this many consecutive steps that were not finite.", positive, resume="free")
    skip_before: int = setting(20, "Batches before the first bad one that a rollback skips too.", at_least(0), resume="free")
    rollbacks: int = setting(3, "Maximum number of rollbacks; the job ends instead of another one.", at_least(0), resume="free")
    step_limit: float = setting(600.0, "Seconds that a step may take; then all ranks write their stacks and end.", positive, resume="free")
    start_limit: float = setting(3600.0, "Seconds that the first step, an evaluation or a save may take.", positive, resume="free")
    restarts: int = setting(5, "Consecutive failures without a new checkpoint that a Slurm job may survive.", at_least(0), resume="free")


@dataclass
class RunConfig:
    dir: str = setting("runs/${name}", "The run directory: checkpoints, metrics, logs and weights.", resume="free")
    log_every: int = setting(50, "Steps between records in the log.", positive, resume="free")
    save_minutes: float | None = setting(
        10.0, "Minutes between checkpoints; null: never by time. A stop signal and the last step save too.", positive, resume="free"
    )
    save_every: int | None = setting(None, "Steps between checkpoints, in addition to `run.save_minutes`.", positive, resume="free")
    eval_every: float = setting(1.0, "Epochs between evaluations. The last step evaluates too.", positive, resume="free")
    keep: int = setting(3, "Newest checkpoints to keep.", positive, resume="free")
    keep_every: float = setting(0.0, "Also keep the checkpoints at multiples of this many epochs; 0: none.", at_least(0), resume="free")
    keep_best: Literal["none", "top1", "top5", "loss"] = setting(
        "none",
        "Save after each evaluation too, and keep the best checkpoint by this result, of the moving average if there is one.",
        resume="free",
    )
    export: list[str] | None = setting(
        None,
        "Formats in which a complete run exports its weights; null: official and timm, where the model has them.",
        must_be(f"of {', '.join(FORMATS)}", lambda formats: set(formats) <= set(FORMATS)),
        resume="free",
    )
    wandb: str | None = setting(None, "PROJECT or ENTITY/PROJECT at Weights & Biases; null: off.", _installed("wandb"), resume="free")
    mlflow: str | None = setting(None, "MLflow experiment at MLFLOW_TRACKING_URI; null: off.", _installed("mlflow"), resume="free")


@dataclass
class Config(JobData):
    name: str = setting(MISSING, "Name of the job and of its run directory.")
    epochs: float = setting(MISSING, "Length of the training, in epochs.", positive, resume="fixed")
    steps: int | None = setting(None, "Length of the training in optimizer steps, in place of epochs.", positive, resume="fixed")
    samples: int | None = setting(None, "Length of the training in samples, in place of epochs.", positive, resume="fixed")
    profile: str | None = setting(
        None,
        "Optimizer steps to trace, START included and STOP excluded, counted from 0; null: none.",
        parsed_by("START:STOP", profiled_steps),
        resume="free",
    )
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    run: RunConfig = field(default_factory=RunConfig)


NODE_PATHS = tuple(key for key, each in settings_of(Config).items() if each.on_node)  # may exist on some nodes of a job only


def _conflicts(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yields (key, problem) of values that can't work together. Keys may be absent."""
    yield from data_conflicts(values)
    for first, second in (("steps", "samples"), ("optim.warmup_steps", "optim.warmup_samples")):
        if values.get(first) is not None and values.get(second) is not None:
            yield second, f"can't be combined with {first}"
    start, run = values.get("model.init_from"), values.get("run.dir")
    # A run with a checkpoint resumes from the checkpoint and no longer needs its initial weights.
    resumes = run is not None and any(Path(run, "checkpoints").glob("step-*"))
    if start is not None and not Path(start).exists() and not resumes:
        yield "model.init_from", "no such file or run directory"
    if values.get("run.keep_best", "none") != "none" and "data.val" in values and values["data.val"] is None:
        yield "run.keep_best", "needs data.val to evaluate on"
    against = [key for key in ("engine.sync_bn", "model.checkpoint_stages") if values.get(key)]
    against += ["engine.zero_stage 2 or 3"] if values.get("engine.zero_stage", 0) > 1 else []
    if values.get("model.graphs") and against:
        yield "model.graphs", f"can't be combined with {', '.join(against)}"


# ---------------------------------------------------------------- reading and writing


def resolve(path: str | Path, overrides: Sequence[str] = (), unchecked: Collection[str] = ()) -> tuple[Config, dict[str, str]]:
    """Returns a job's settings, and by dotted key the place that set each; ConfigError lists the problems of all but `unchecked` keys."""
    return config_files.resolve(Config, path, overrides, _conflicts, unchecked=unchecked)


def load(path: str | Path, overrides: Sequence[str] = (), unchecked: Collection[str] = ()) -> Config:
    """Returns the settings of a job; raises as `resolve` does."""
    return resolve(path, overrides, unchecked)[0]


def override(config: Config, overrides: Sequence[str]) -> Config:
    """Returns the settings with `key=value` texts applied; ConfigError lists the problems of all texts."""
    return config_files.override(config, overrides)


def from_dict(values: dict[str, Any]) -> Config:
    """Rebuilds settings from the result of `as_dict`; skips keys of another version and fills in defaults for missing ones."""
    return config_files.from_dict(Config, values)


def save(config: Config, path: Path) -> None:
    """Writes the settings as YAML that `load` reads again."""
    with open_to_replace(path, encoding="utf-8") as file:
        file.write(config_files.to_yaml(config))


def as_dict(config: Config) -> dict[str, Any]:
    return dataclasses.asdict(config)


def flat(config: Config) -> dict[str, Any]:
    """Returns the values by dotted key, tuples as lists."""
    values = {key: attrgetter(key)(config) for key in settings_of(Config)}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def confirm(config: Config, path: Path, force: bool) -> list[str]:
    """Compares the settings of this start with RUN/config.yaml, except for those that are free to change.

    Returns:
        `key: old -> new` of each change.

    Raises:
        ValueError: there are changes and `force` (--force-config) is not set; lists the changes.
    """
    saved, fields = config_files.read_saved(Config, path), settings_of(Config)
    values = {key: (to_text(saved.get(key)), to_text(value)) for key, value in flat(config).items() if fields[key].resume != "free"}
    changes = {key: f"{key}: {old} -> {new}" for key, (old, new) in values.items() if old != new}
    if changes and not force:
        advice = ", or add --force-config to resume with the changed settings"
        if fixed := [key for key in changes if fields[key].resume == "fixed"]:
            advice = (
                f", which can start from these weights with model.init_from={path.parent}; {', '.join(fixed)} can't change during a run"
            )
        listed = "\n  ".join(changes.values())
        raise ValueError(f"{path.parent} was trained with other settings:\n  {listed}\ngive this job a run.dir of its own{advice}")
    return list(changes.values())


# ---------------------------------------------------------------- steps and batch sizes


def accumulation(config: Config, ranks: int) -> int:
    """Returns the number of micro-batches per rank in one optimizer step: global_batch / (micro_batch * ranks).

    Raises:
        ConfigError: the quotient is not a whole number; suggests micro-batches and rank counts that fit.
    """
    batch, micro = config.global_batch, config.engine.micro_batch
    if batch % (micro * ranks) == 0:
        return batch // (micro * ranks)
    fits = micro_batches(config, ranks)
    counts = [r for r in _divisors(batch) if (batch // r) % micro == 0]
    hints = [f"with {ranks} ranks, engine.micro_batch={' or '.join(map(str, _nearest(fits, micro)))}"] if fits else []
    hints += [f"with engine.micro_batch={micro}, {' or '.join(map(str, _nearest(counts, ranks)))} ranks"] if counts else []
    hints.append(f"or another recipe with global_batch={max(1, round(batch / (micro * ranks))) * micro * ranks}")
    problem = f"global_batch = {batch} can't be divided over {ranks} ranks of engine.micro_batch = {micro}; {'; '.join(hints)}"
    raise ConfigError("batch sizes", [problem])


def lengths(config: Config, steps_per_epoch: int) -> tuple[int, int]:
    """Returns the optimizer steps of the training and of its warm-up; steps take precedence over samples, and samples over epochs."""
    optim = config.optim

    def to_steps(steps: int | None, samples: int | None, epochs: float) -> int:
        if steps is not None:
            return steps
        return round(epochs * steps_per_epoch if samples is None else samples / config.global_batch)

    total = max(1, to_steps(config.steps, config.samples, config.epochs))
    return total, to_steps(optim.warmup_steps, optim.warmup_samples, optim.warmup_epochs)


def micro_batches(config: Config, ranks: int) -> list[int]:
    """Returns the even micro-batches that divide the global batch over the ranks, the smallest first."""
    share, rest = divmod(config.global_batch, ranks)
    return [m for m in _divisors(share) if m % 2 == 0] if rest == 0 else []


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _nearest(values: list[int], target: int) -> list[int]:
    """Returns the closest value up to the target and the closest above it, where they exist; `values` are sorted."""
    below, above = [v for v in values if v <= target], [v for v in values if v > target]
    return below[-1:] + above[:1]
