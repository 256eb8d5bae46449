"""The settings of a job: the schema, files that build on one another, overrides, and errors that say all that is wrong at once.

    config = load("configs/van_b3_in22k.yaml", ["engine.micro_batch=128", "data.train=/data/in22k/train"])

A YAML file names the one it builds on with `base:` (relative to itself); later values win, the command line's last. Every key is
a field below, documented there. `load` raises ConfigError, which lists every problem with the key, the place it was set in and the
nearest valid name; `accumulation` does the arithmetic that depends on the number of ranks.
"""

import dataclasses
import difflib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data.settings import DataConfig

COMMAND_LINE = "command line"


class ConfigError(ValueError):
    """What is wrong with a job's settings: all problems found, a line each."""

    def __init__(self, source: str, problems: list[str]):
        self.problems = problems
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(f"{source}: {count}\n" + "\n".join(f"  {problem}" for problem in problems))


@dataclass
class ModelConfig:
    name: Literal["van_b0", "van_b1", "van_b2", "van_b3", "van_b4", "van_b5", "van_b6"] = MISSING
    classes: int = MISSING  # outputs of the head
    drop_path: float = 0.0  # stochastic depth of the last block; rises linearly from 0 over all blocks
    init_from: str | None = None  # weights to start from: an exported file or a run directory; a head of other classes starts anew


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


@dataclass
class Config:
    name: str = MISSING  # of the job and its run directory
    seed: int = 0
    global_batch: int = MISSING  # samples in an optimizer step, whatever the machine
    epochs: float = MISSING
    steps: int | None = None  # end after so many optimizer steps instead
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
    path = Path(path)
    layers = [*_file_layers(path), _override_layer(str(path), overrides)]
    merged = OmegaConf.structured(Config)
    problems = _apply(merged, layers)
    problems += [f"{key}: no value; set it in {path} or as {key}=…" for key in sorted(OmegaConf.missing_keys(merged))]
    if problems:
        raise ConfigError(str(path), problems)
    config: Config = OmegaConf.to_object(merged)  # type: ignore[assignment]
    where = {key: source for source, layer in layers for key, _ in _leaves(layer)}
    problems = [f"{key} = {_get(config, key)} ({where.get(key, 'default')}): {text}" for key, text in _invalid(config)]
    if problems:
        raise ConfigError(str(path), problems)
    return config


def override(config: Config, overrides: Sequence[str]) -> Config:
    """The settings with `key=value` texts applied.

    Raises:
        ConfigError: listing unknown keys and wrong types.
    """
    merged = OmegaConf.structured(config)
    problems = _apply(merged, [_override_layer(COMMAND_LINE, overrides)])
    if problems:
        raise ConfigError(COMMAND_LINE, problems)
    return OmegaConf.to_object(merged)  # type: ignore[return-value]


def from_dict(values: dict[str, Any]) -> Config:
    """The settings that `as_dict` took apart."""
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), values))  # type: ignore[return-value]


def save(config: Config, path: Path) -> None:
    """Writes the settings as YAML that `load` reads again."""
    OmegaConf.save(OmegaConf.structured(config), path)


def as_dict(config: Config) -> dict[str, Any]:
    return dataclasses.asdict(config)


def accumulation(config: Config, ranks: int) -> int:
    """Micro-batches a rank takes in one optimizer step: global batch / (micro-batch * ranks).

    Raises:
        ConfigError: where that is no whole number; it names the micro-batches and rank counts that would do.
    """
    batch, micro = config.global_batch, config.engine.micro_batch
    if batch % (micro * ranks) == 0:
        return batch // (micro * ranks)
    share = batch // ranks
    fits = [m for m in _divisors(share) if m % 2 == 0] if batch % ranks == 0 else []
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


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _nearest(values: list[int], target: int) -> list[int]:
    """The closest value below and the closest above, as far as there are such."""
    below, above = [v for v in values if v <= target], [v for v in values if v > target]
    return below[-1:] + above[:1]


def _file_layers(path: Path) -> list[tuple[str, DictConfig]]:
    """The file and those it builds on, the most basic first."""
    layers: list[tuple[str, DictConfig]] = []
    named_by = None
    while True:
        if not path.is_file():
            near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1)
            raise ConfigError(
                str(path),
                [
                    "no such file"
                    + (f", named by {named_by}" if named_by else "")
                    + (f"; did you mean {path.parent / near[0]}?" if near else "")
                ],
            )
        if str(path) in [source for source, _ in layers]:
            raise ConfigError(str(path), [f"base: is circular, named again by {named_by}"])
        try:
            layer = OmegaConf.load(path)
        except Exception as error:  # PyYAML and OmegaConf each raise their own kinds for a file that is not YAML
            raise ConfigError(str(path), [f"not valid YAML: {' '.join(str(error).split())}"]) from None
        if not isinstance(layer, DictConfig):
            raise ConfigError(str(path), ["not a mapping of keys to values"])
        base = layer.pop("base", None)
        layers.insert(0, (str(path), layer))
        if base is None:
            return layers
        named_by, path = path, Path(os.path.normpath(path.parent / base))


def _override_layer(job: str, overrides: Sequence[str]) -> tuple[str, DictConfig]:
    unreadable = [f"{text!r} ({COMMAND_LINE}): not of the form key=value" for text in overrides if "=" not in text]
    if unreadable:
        raise ConfigError(job, unreadable)
    return COMMAND_LINE, OmegaConf.from_dotlist(list(overrides))


def _apply(merged: DictConfig, layers: list[tuple[str, DictConfig]]) -> list[str]:
    """Sets every value of the layers; returns what is wrong with them."""
    problems = []
    for source, layer in layers:
        for key, value in _leaves(layer):
            problem = _set(merged, key, value)
            if problem:
                problems.append(f"{key} = {value} ({source}): {problem}")
    return problems


def _leaves(node: DictConfig, prefix: str = "") -> list[tuple[str, Any]]:
    """(dotted key, value) of everything set in a layer; lists are values."""
    found: list[tuple[str, Any]] = []
    for key in node:
        value = node._get_node(key)
        dotted = f"{prefix}{key!s}"
        if isinstance(value, DictConfig) and not value._is_none() and len(value):
            found += _leaves(value, f"{dotted}.")
        else:
            found.append((dotted, OmegaConf.to_container(node)[key]))  # type: ignore[index]
    return found


def _set(merged: DictConfig, key: str, value: Any) -> str | None:
    """Sets one key; returns what is wrong with it."""
    names = _keys(Config)
    if key not in names:
        sections = {name.rpartition(".")[0] for name in names} - {""}
        if key in sections:
            return f"is a section; set one of {', '.join(name for name in names if name.startswith(key + '.'))}"
        # A key in the wrong section is as common a slip as a misspelt one.
        same_leaf = [name for name in names if name.rpartition(".")[2] == key.rpartition(".")[2]]
        near = same_leaf or difflib.get_close_matches(key, names, n=1, cutoff=0.5)
        return "unknown key" + (f"; did you mean {near[0]}?" if near else "; see pretrain/config.py for all keys")
    try:
        OmegaConf.update(merged, key, value)
    except OmegaConfBaseException as error:
        return str(error).splitlines()[0]
    return None


def _keys(schema: type, prefix: str = "") -> list[str]:
    names = []
    for f in dataclasses.fields(schema):
        if dataclasses.is_dataclass(f.type):
            names += _keys(f.type, f"{prefix}{f.name}.")  # type: ignore[arg-type]
        else:
            names.append(prefix + f.name)
    return names


def _get(config: Config, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def _invalid(config: Config) -> list[tuple[str, str]]:
    """(key, what is wrong) of values that have the right type but can't work."""
    wrong: list[tuple[str, str]] = []
    for key in ("data.train", "data.val"):
        folder = _get(config, key)
        if folder is not None and not (Path(folder) / "dataset.json").is_file():
            what = "no such folder" if not Path(folder).is_dir() else "no dataset.json in it"
            wrong.append((key, f"{what}; make it with: python -m data pack IMAGES {folder}"))
    if config.model.init_from is not None and not Path(config.model.init_from).exists():
        wrong.append(("model.init_from", "no such file or run directory"))
    if config.engine.zero_stage not in (0, 1, 2, 3):
        wrong.append(("engine.zero_stage", "must be 0, 1, 2 or 3"))
    positive = ["global_batch", "epochs", "model.classes", "data.image_size", "data.lanes", "data.window", "data.decode_threads"]
    positive += ["data.read_threads", "engine.micro_batch", "optim.lr", "run.log_every", "run.save_every", "run.keep"]
    wrong += [(key, "must be more than 0") for key in positive if _get(config, key) <= 0]
    if config.steps is not None and config.steps <= 0:
        wrong.append(("steps", "must be more than 0"))
    shares = ("model.drop_path", "optim.label_smoothing", "engine.ema_decay")
    wrong += [(key, "must be at least 0 and less than 1") for key in shares if not 0 <= _get(config, key) < 1]
    chances = ("data.flip", "data.mix_switch")
    wrong += [(key, "must be a probability, 0 to 1") for key in chances if not 0 <= _get(config, key) <= 1]
    if (config.data.mixup or config.data.cutmix) and config.engine.micro_batch % 2:
        wrong.append(("engine.micro_batch", "must be even: mixup and cutmix mix neighbours in pairs"))
    return wrong
