"""The settings of a job: the schema, what of it can't work, and the arithmetic that depends on the number of ranks.

    config = load("configs/van_b3_in22k.yaml", ["engine.micro_batch=128", "data.train=/data/in22k/train"])

Every key is a field below, documented there; `data/common/config_files.py` has how files build on one another and what an error tells.
"""

import dataclasses
import math
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from omegaconf import MISSING, OmegaConf

from data.common import config_files
from data.common.config_files import ConfigError
from data.common.files import publish
from data.settings import DataConfig, failing, invalid_data
from pretrain.model.formats import FORMATS

# Keys, or whole sections, that may change while a run goes on: what is computed stays the recipe's, on other machines or by other means.
# For all others a run wants --force-config, but for those that decide the samples: these it can't change at all (checkpoints).
FREE = (
    "profile", "run", "data.train", "data.val", "data.cache", "data.cache_gb", "data.check", "data.max_bad", "data.decode_threads",
    "data.hw_decoder_load", "data.read_threads", "data.val_except", "model.kernels", "model.checkpoint_stages", "model.compile",
    "model.graphs", "engine.device", "engine.zero_stage", "engine.offload", "engine.micro_batch", "guard",
)  # fmt: skip
FIXED = ("seed", "global_batch", "epochs", "steps", "samples", "model.name", "model.classes", "data.lanes", "data.window", "data.repeats")
ON_A_NODE = ("data.train", "data.val", "model.init_from", "run.keep_best")  # what these name, or need, a node may lack that another has
EXTRAS = {"wandb": "wandb", "mlflow": "mlflow-skinny sqlalchemy alembic"}  # what it takes to use them, as in pyproject.toml


@dataclass
class ModelConfig:
    name: Literal["van_b0", "van_b1", "van_b2", "van_b3", "van_b4", "van_b5", "van_b6"] = MISSING
    classes: int = MISSING  # outputs of the head
    drop_path: float = 0.0  # stochastic depth of the last block; rises linearly from 0 over all blocks
    init_from: str | None = None  # weights to start from: a file or folder of any format, a run directory or a checkpoint
    head_init: Literal["keep", "zero", "map"] = "map"  # its head: as it is, all zeros, or the rows of the classes that are in the data
    # Of convolutions, shortcuts and norms. auto: Triton where it runs, on GPUs; triton: an error where it does not; torch: never.
    # They have not run on a GPU yet, so a job has to ask for them.
    kernels: Literal["auto", "triton", "torch"] = "torch"
    # Stages (0 to 3) whose blocks keep their input alone for the backward pass and compute the rest again: less memory, a third more work.
    checkpoint_stages: list[int] = field(default_factory=list)
    compile: bool = False  # torch.compile, each kind of block once; the first step takes minutes
    # On GPUs, stages as CUDA graphs: a micro-step costs the host some calls instead of thousands. They have not run on a GPU yet.
    graphs: bool = False


@dataclass
class OptimConfig:
    lr: float = MISSING  # at the global batch as it stands
    min_lr: float = 1e-6
    warmup_lr: float = 1e-6
    warmup_epochs: float = 0.0
    warmup_steps: int | None = None  # in optimizer steps instead
    warmup_samples: int | None = None  # in samples instead
    weight_decay: float = 0.05  # not on biases and other 1-D parameters
    layer_decay: float = 1.0  # a layer's rate is so much of the one's behind it, 1 at the head; for fine-tuning
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    label_smoothing: float = 0.1
    clip_grad: float = 0.0  # global gradient norm; 0: off


@dataclass
class EngineConfig:
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: a GPU where there is one
    zero_stage: int = 1  # DeepSpeed ZeRO: 0 none, 1 optimizer state, 2 and gradients, 3 and weights in pieces over the ranks
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"  # of the arithmetic; weights, sums and statistics are fp32
    offload: bool = False  # optimizer state in host memory, updated by the CPU (ZeRO-Offload); for ZeRO stages 1 to 3
    sync_bn: bool = False  # BatchNorm over the micro-batches of all ranks instead of each rank's own
    micro_batch: int = 64  # samples a rank takes through the network at once
    ema_decay: float = 0.0  # of the moving average of the weights, a step; 0: off


@dataclass
class GuardConfig:
    """When things go wrong. A step whose loss or gradient is not finite changes nothing, always; this is about what more is done."""

    spike: float = 0.0  # a loss over so many times the average of the last hundred or so goes back as well; 0: never
    skipped: int = 20  # so many steps in a row that were not finite: back to a checkpoint from before them
    pass_over: int = 20  # batches ahead of the first bad one that are left out too when training goes back
    rollbacks: int = 3  # after so many the job ends
    step_limit: float = 600.0  # seconds that a step may take; then the ranks write their stacks and end, to be started again
    start_limit: float = 3600.0  # seconds that the first step, an evaluation or a save may take
    restarts: int = 5  # under Slurm: failures in a row without a new checkpoint, after which the job is not started again


@dataclass
class RunConfig:
    dir: str = "runs/${name}"
    log_every: int = 50  # steps
    save_minutes: float | None = 10.0  # minutes between checkpoints; a stop signal and the end save too; null: not by the clock
    save_every: int | None = None  # steps between checkpoints, beside save_minutes: whichever comes first
    eval_every: float = 1.0  # epochs between evaluations; the end evaluates too
    keep: int = 3  # newest checkpoints to keep
    keep_every: float = 0.0  # epochs; checkpoints at multiples of this are saved and kept for good; 0: none
    keep_best: Literal["none", "top1", "top5", "loss"] = "none"  # save after evaluations too, and keep the best; of the average if kept
    # Formats of the weights in RUN/weights when training is complete (weights.py lists them); empty: none.
    export: list[str] = field(default_factory=lambda: ["official", "timm"])
    wandb: str | None = None  # PROJECT or ENTITY/PROJECT at Weights & Biases to send the records to; none: off
    mlflow: str | None = None  # experiment of MLflow, in the store that MLFLOW_TRACKING_URI names; none: off


@dataclass
class Config:
    name: str = MISSING  # of the job and its run directory
    seed: int = 0
    global_batch: int = MISSING  # samples in an optimizer step, whatever the machine
    epochs: float = MISSING
    steps: int | None = None  # end after so many optimizer steps instead
    samples: int | None = None  # end after so many samples instead
    profile: str | None = None  # START:STOP, optimizer steps counted from 0, STOP excluded, to trace (profiling.py); none: off
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    run: RunConfig = field(default_factory=RunConfig)


def load(path: str | Path, overrides: Sequence[str] = (), unused: Collection[str] = ()) -> Config:
    """Reads a job's settings. Whether the values of `unused` keys could work is not asked.

    Raises:
        ConfigError: listing unknown keys, wrong types, missing values and folders that do not exist.
    """
    return config_files.load(
        Config, path, overrides, lambda values: _invalid({key: value for key, value in values.items() if key not in unused})
    )


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


def lengths(config: Config, steps_per_epoch: int) -> tuple[int, int]:
    """Optimizer steps of the whole training and of its warm-up, from what is given: steps before samples before epochs."""
    optim = config.optim

    def whole(steps: int | None, samples: int | None, epochs: float) -> int:
        if steps is not None:
            return steps
        return round(epochs * steps_per_epoch if samples is None else samples / config.global_batch)

    return max(1, whole(config.steps, config.samples, config.epochs)), whole(optim.warmup_steps, optim.warmup_samples, optim.warmup_epochs)


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
        "samples",
        "model.classes",
        "optim.lr",
        "optim.eps",
        "run.log_every",
        "run.save_minutes",
        "run.save_every",
        "run.eval_every",
        "run.keep",
        "guard.skipped",
        "guard.step_limit",
        "guard.start_limit",
    ]
    wrong += failing(values, positive, lambda value: 0 < value < math.inf, "must be more than 0 and finite")
    if values.get("run.keep_best", "none") != "none" and values.get("data.val") is None:
        wrong.append(("run.keep_best", "needs data.val to evaluate on"))
    at_least_0 = ["run.keep_every", "guard.pass_over", "guard.rollbacks", "guard.restarts"]
    at_least_0 += [
        f"optim.{key}" for key in ("min_lr", "warmup_lr", "warmup_epochs", "warmup_steps", "warmup_samples", "weight_decay", "clip_grad")
    ]
    try:
        profiled_steps(values.get("profile"))
    except ValueError as error:
        wrong.append(("profile", str(error)))
    for key in ("run.wandb", "run.mlflow"):
        module = key.removeprefix("run.")
        if values.get(key) is not None and find_spec(module) is None:
            wrong.append((key, f"{module} is not installed: .venv/bin/pip install {EXTRAS[module]}"))
    wrong += failing(values, at_least_0, lambda value: 0 <= value < math.inf, "must be at least 0 and finite")
    for first, second in (("steps", "samples"), ("optim.warmup_steps", "optim.warmup_samples")):
        if values.get(first) is not None and values.get(second) is not None:
            wrong.append((second, f"can't be given beside {first}"))
    if values.get("engine.offload") and values.get("engine.zero_stage") == 0:
        wrong.append(("engine.offload", "needs engine.zero_stage 1, 2 or 3"))
    if values.get("model.graphs"):
        against = [key for key in ("engine.offload", "engine.sync_bn", "model.checkpoint_stages") if values.get(key)]
        against += ["engine.zero_stage 2 or 3"] if values.get("engine.zero_stage", 0) > 1 else []
        wrong += [("model.graphs", f"can't be beside {', '.join(against)}")] if against else []
    wrong += failing(values, ["model.checkpoint_stages"], lambda stages: set(stages) <= {0, 1, 2, 3}, "must be of stages 0, 1, 2 and 3")
    wrong += failing(values, ["run.export"], lambda formats: set(formats) <= set(FORMATS), f"must be of {', '.join(FORMATS)}")
    wrong += failing(values, ["guard.spike"], lambda value: value == 0 or value > 1, "must be more than 1, or 0 for never")
    wrong += failing(values, ["optim.layer_decay"], lambda value: 0 < value <= 1, "must be more than 0 and at most 1")
    shares = ["model.drop_path", "optim.label_smoothing", "engine.ema_decay"]
    wrong += failing(values, shares, lambda value: 0 <= value < 1, "must be at least 0 and less than 1")
    return wrong
