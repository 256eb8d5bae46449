"""The settings of a job: the schema, what of it can't work, and the arithmetic that depends on the number of ranks.

    config = load("configs/van_b3_in22k.yaml", ["engine.micro_batch=128", "data.train=/data/in22k/train"])

Every key is a field below, documented there; `data/config_files.py` has how files build on one another and what an error tells.
"""

import dataclasses
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from omegaconf import MISSING, OmegaConf

from data import config_files
from data.config_files import ConfigError
from data.files import publish
from data.settings import DataConfig, failing, invalid_data

# Keys, or whole sections, that may change while a run goes on: what is computed stays the recipe's, on other machines or by other means.
# For all others a run wants --force-config, but for those that decide the samples: these it can't change at all (checkpoints).
FREE = (
    "profile", "run", "data.train", "data.val", "data.cache", "data.cache_gb", "data.check", "data.max_bad", "data.decode_threads",
    "data.hw_decoder_load", "data.read_threads", "model.kernels", "engine.device", "engine.zero_stage", "engine.micro_batch",
)  # fmt: skip
FIXED = ("seed", "global_batch", "epochs", "steps", "model.name", "model.classes", "data.lanes", "data.window", "data.repeats")
EXTRAS = {"wandb": "wandb", "mlflow": "mlflow-skinny sqlalchemy alembic"}  # what it takes to use them, as in pyproject.toml


@dataclass
class ModelConfig:
    name: Literal["van_b0", "van_b1", "van_b2", "van_b3", "van_b4", "van_b5", "van_b6"] = MISSING
    classes: int = MISSING  # outputs of the head
    drop_path: float = 0.0  # stochastic depth of the last block; rises linearly from 0 over all blocks
    init_from: str | None = None  # weights to start from: a file or folder of any format, a run directory or a checkpoint
    head_init: Literal["keep", "zero", "map"] = "map"  # its head: as it is, all zeros, or the rows of the classes that are in the data
    # Of depth-wise convolutions and shortcuts. auto: Triton where it runs, on GPUs; triton: an error where it does not; torch: never.
    # They have not run on a GPU yet, so a job has to ask for them.
    kernels: Literal["auto", "triton", "torch"] = "torch"


@dataclass
class OptimConfig:
    lr: float = MISSING  # at the global batch as it stands
    min_lr: float = 1e-6
    warmup_lr: float = 1e-6
    warmup_epochs: float = 0.0
    weight_decay: float = 0.05  # not on biases and other 1-D parameters
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    label_smoothing: float = 0.1
    clip_grad: float = 0.0  # global gradient norm; 0: off


@dataclass
class EngineConfig:
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: a GPU where there is one
    zero_stage: int = 1  # DeepSpeed ZeRO: 0 none, 1 optimizer state, 2 and gradients, 3 and weights in pieces over the ranks
    precision: Literal["bf16", "fp32"] = "bf16"  # of the arithmetic; weights, sums and statistics are fp32
    micro_batch: int = 64  # samples a rank takes through the network at once
    ema_decay: float = 0.0  # of the moving average of the weights, a step; 0: off


@dataclass
class RunConfig:
    dir: str = "runs/${name}"
    log_every: int = 50  # steps
    save_every: int = 500  # steps between checkpoints; a stop signal and the end save too
    eval_every: float = 1.0  # epochs between evaluations; the end evaluates too
    keep: int = 3  # newest checkpoints to keep
    keep_every: float = 0.0  # epochs; checkpoints at multiples of this are saved and kept for good; 0: none
    keep_best: Literal["none", "top1", "top5", "loss"] = "none"  # save after evaluations too, and keep the best; of the average if kept
    wandb: str | None = None  # PROJECT or ENTITY/PROJECT at Weights & Biases to send the records to; none: off
    mlflow: str | None = None  # experiment of MLflow, in the store that MLFLOW_TRACKING_URI names; none: off


@dataclass
class Config:
    name: str = MISSING  # of the job and its run directory
    seed: int = 0
    global_batch: int = MISSING  # samples in an optimizer step, whatever the machine
    epochs: float = MISSING
    steps: int | None = None  # end after so many optimizer steps instead
    profile: str | None = None  # START:STOP, optimizer steps counted from 0, STOP excluded, to trace (profiling.py); none: off
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    run: RunConfig = field(default_factory=RunConfig)


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a job's settings.

    Raises:
        ConfigError: listing unknown keys, wrong types, missing values and folders that do not exist.
    """
    return config_files.load(Config, path, overrides, _invalid)


def override(config: Config, overrides: Sequence[str]) -> Config:
    """The settings with `key=value` texts applied.

    Raises:
        ConfigError: listing unknown keys and wrong types.
    """
    return config_files.override(config, overrides)


def from_dict(values: dict[str, Any]) -> Config:
    """The settings that `as_dict` took apart."""
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), values))  # type: ignore[return-value]


def save(config: Config, path: Path) -> None:
    """Writes the settings as YAML that `load` reads again."""
    with open(path.with_name(f"{path.name}.{os.getpid()}"), "w") as file:
        file.write(OmegaConf.to_yaml(OmegaConf.structured(config)))
        publish(file, path)


def as_dict(config: Config) -> dict[str, Any]:
    return dataclasses.asdict(config)


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of `as_dict` by dotted key; a sequence is a value, and a list."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = list(value) if isinstance(value, tuple) else value
    return found


def confirm(config: Config, path: Path, force: bool) -> list[str]:
    """`key: old -> new` of what is changed against the settings that `save` wrote to `path`, FREE keys apart; none, unless `force`.

    A key that is younger than that file counts as having had its default.

    Raises:
        ValueError: listing what is changed, without `force`.
    """
    before = flat(OmegaConf.to_container(OmegaConf.load(path)))  # type: ignore[arg-type]
    defaults = flat(OmegaConf.to_container(OmegaConf.structured(Config)))  # type: ignore[arg-type]
    asked = {key: value for key, value in flat(as_dict(config)).items() if not any(f"{key}.".startswith(f"{free}.") for free in FREE)}
    old = {key: before.get(key, defaults[key]) for key in asked}
    changed = [key for key, value in asked.items() if value != old[key]]
    lines = [f"{key}: {_shown(old[key])} -> {_shown(asked[key])}" for key in changed]
    if changed and not force:
        fixed = [key for key in changed if key in FIXED]
        forced = f"; {', '.join(fixed)} can't change during a run" if fixed else ", or add --force-config to go on with what is changed"
        listed = "\n  ".join(lines)
        raise ValueError(f"{path.parent} was trained with other settings:\n  {listed}\ngive this job a run.dir of its own{forced}")
    return lines


def _shown(value: Any) -> str:
    return "null" if value is None else str(value)


def profiled_steps(text: str | None) -> range:
    """The steps that START:STOP stands for.

    Raises:
        ValueError: it is something else, or no step.
    """
    if text is None:
        return range(0)
    start, colon, stop = text.partition(":")
    if not (colon and start.isdecimal() and stop.isdecimal()):
        raise ValueError('must be START:STOP, two whole numbers of steps; in a file in quotes, "2:4"')
    if int(start) >= int(stop):
        raise ValueError("holds no step: START must be less than STOP")
    return range(int(start), int(stop))


def accumulation(config: Config, ranks: int) -> int:
    """Micro-batches a rank takes in one optimizer step: global batch / (micro-batch * ranks).

    Raises:
        ConfigError: where that is no whole number; it names the micro-batches and rank counts that would do.
    """
    batch, micro = config.global_batch, config.engine.micro_batch
    if batch % (micro * ranks) == 0:
        return batch // (micro * ranks)
    fits = micro_batches(config, ranks)
    counts = [r for r in _divisors(batch) if (batch // r) % micro == 0]
    hints = []
    if fits:
        hints.append(f"with {ranks} ranks, engine.micro_batch={' or '.join(map(str, _nearest(fits, micro)))}")
    if counts:
        hints.append(f"with engine.micro_batch={micro}, {' or '.join(map(str, _nearest(counts, ranks)))} ranks")
    whole = round(batch / (micro * ranks)) * micro * ranks or micro * ranks
    hints.append(f"or another recipe with global_batch={whole}")
    raise ConfigError(
        "batch sizes",
        [f"global_batch = {batch} can't be divided over {ranks} ranks of engine.micro_batch = {micro}; {'; '.join(hints)}"],
    )


def micro_batches(config: Config, ranks: int) -> list[int]:
    """The even micro-batches that divide the global batch over the ranks, the smallest first."""
    share, rest = divmod(config.global_batch, ranks)
    return [m for m in _divisors(share) if m % 2 == 0] if rest == 0 else []


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _nearest(values: list[int], target: int) -> list[int]:
    """The closest value below and the closest above, as far as there are such."""
    below, above = [v for v in values if v <= target], [v for v in values if v > target]
    return below[-1:] + above[:1]


def _invalid(values: dict[str, Any]) -> list[tuple[str, str]]:
    """(key, what is wrong) of values that have the right type but can't work. Keys may be absent, and are then passed over."""
    wrong = invalid_data(values)
    start, run = values.get("model.init_from"), values.get("run.dir")
    # A run that has a checkpoint goes on from that, and does not need what it once started from.
    resumes = run is not None and any(Path(run, "checkpoints").glob("step-*"))
    if start is not None and not Path(start).exists() and not resumes:
        wrong.append(("model.init_from", "no such file or run directory"))
    wrong += failing(values, ["engine.zero_stage"], lambda stage: stage in (0, 1, 2, 3), "must be 0, 1, 2 or 3")
    positive = [
        "epochs",
        "steps",
        "model.classes",
        "optim.lr",
        "optim.eps",
        "run.log_every",
        "run.save_every",
        "run.eval_every",
        "run.keep",
    ]
    wrong += failing(values, positive, lambda value: 0 < value < math.inf, "must be more than 0 and finite")
    if values.get("run.keep_best", "none") != "none" and values.get("data.val") is None:
        wrong.append(("run.keep_best", "needs data.val to evaluate on"))
    try:
        profiled_steps(values.get("profile"))
    except ValueError as error:
        wrong.append(("profile", str(error)))
    for key in ("run.wandb", "run.mlflow"):
        module = key.removeprefix("run.")
        if values.get(key) is not None and find_spec(module) is None:
            wrong.append((key, f"{module} is not installed: .venv/bin/pip install {EXTRAS[module]}"))
    at_least_0 = ["run.keep_every", "optim.min_lr", "optim.warmup_lr", "optim.warmup_epochs", "optim.weight_decay", "optim.clip_grad"]
    wrong += failing(values, at_least_0, lambda value: 0 <= value < math.inf, "must be at least 0 and finite")
    shares = ["model.drop_path", "optim.label_smoothing", "engine.ema_decay"]
    wrong += failing(values, shares, lambda value: 0 <= value < 1, "must be at least 0 and less than 1")
    return wrong
