"""The settings of a job: the schema, files that build on one another, overrides, and errors that say all that is wrong at once.

    config = load("configs/van_b3_in22k.yaml", ["engine.micro_batch=128", "data.train=/data/in22k/train"])

A YAML file names the one it builds on with `base:` (relative to itself); later values win, the command line's last. Every key is
a field below, documented there. `load` raises ConfigError, which lists every problem with the key, the place it was set in and the
nearest valid name; `accumulation` does the arithmetic that depends on the number of ranks.
"""

import dataclasses
import difflib
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, MissingMandatoryValue, OmegaConfBaseException

from data.remote import is_url
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
    init_from: str | None = None  # weights to start from: a file or folder of any format, a run directory or a checkpoint
    head_init: Literal["keep", "zero", "map"] = "map"  # its head: as it is, all zeros, or the rows of the classes that are in the data
    # Of depth-wise convolutions and shortcuts. auto: Triton where it runs, on GPUs; triton: an error where it does not; torch: never.
    kernels: Literal["auto", "triton", "torch"] = "auto"


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
    last, problems = _override_layers(overrides)
    layers = [*_file_layers(path), *last]
    where = {key: source for source, layer in layers for key, _ in _leaves(layer)}
    merged = OmegaConf.structured(Config)
    rejected = _apply(merged, layers)
    problems += [problem for _, problem in rejected]
    # A value that was refused is reported once, and says nothing about what else is wrong.
    values, unresolved = _resolve(merged, set(_keys(Config)) - {key for key, _ in rejected})
    problems += [f"{key} ({where[key]}): {text}" if key in where else f"{key}: {text} in {path} or as {key}=…" for key, text in unresolved]
    problems += [f"{key} = {values[key]} ({where.get(key, 'default')}): {text}" for key, text in _invalid(values)]
    if problems:
        raise ConfigError(str(path), problems)
    return OmegaConf.to_object(merged)  # type: ignore[return-value]


def override(config: Config, overrides: Sequence[str]) -> Config:
    """The settings with `key=value` texts applied.

    Raises:
        ConfigError: listing unknown keys and wrong types.
    """
    merged = OmegaConf.structured(config)
    layers, problems = _override_layers(overrides)
    problems += [problem for _, problem in _apply(merged, layers)]
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
        if not isinstance(base, str):
            raise ConfigError(str(path), [f"base = {base}: must be the name of one file"])
        named_by, path = path, Path(os.path.normpath(path.parent / base))


def _override_layers(overrides: Sequence[str]) -> tuple[list[tuple[str, DictConfig]], list[str]]:
    """A layer for each text, and what is wrong with those that give none."""
    layers, problems = [], []
    for text in overrides:
        key, equals, _ = text.partition("=")
        if not key or not equals:
            problems.append(f"{text!r} ({COMMAND_LINE}): not of the form key=value")
            continue
        try:
            layers.append((COMMAND_LINE, OmegaConf.from_dotlist([text])))
        except Exception as error:  # PyYAML and OmegaConf each raise their own kinds for a value that is not YAML
            problems.append(f"{text!r} ({COMMAND_LINE}): {str(error).splitlines()[0]}")
    return layers, problems


def _apply(merged: DictConfig, layers: list[tuple[str, DictConfig]]) -> list[tuple[str, str]]:
    """Sets every value of the layers; returns (key, what is wrong) of those that can't be set."""
    rejected = []
    for source, layer in layers:
        for key, value in _leaves(layer):
            problem = _set(merged, key, value)
            if problem:
                rejected.append((key, f"{key} = {'null' if value is None else value} ({source}): {problem}"))
    return rejected


def _resolve(merged: DictConfig, keys: set[str]) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """The values of the keys, and (key, what is wrong) of those without one."""
    values, unresolved = {}, []
    for key in sorted(keys):
        try:
            values[key] = OmegaConf.select(merged, key, throw_on_missing=True)
        except MissingMandatoryValue:
            unresolved.append((key, "no value; set it"))
        except InterpolationToMissingValueError:
            pass  # what it refers to is reported itself
        except OmegaConfBaseException as error:
            unresolved.append((key, str(error).splitlines()[0]))
    return values, unresolved


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
    types = _keys(Config)
    if key not in types:
        inside = [name for name in types if name.startswith(f"{key}.")]
        if inside:
            return f"is a section; set one of {', '.join(inside)}"
        near = _nearest_key(key, list(types))
        return "unknown key" + (f"; did you mean {near}?" if near else "; see pretrain/config.py for all keys")
    try:
        OmegaConf.update(merged, key, value)
    except OmegaConfBaseException:
        choices = get_args(types[key]) if get_origin(types[key]) is Literal else ()
        meant = difflib.get_close_matches(str(value), choices, n=1)
        return f"must be {_expected(types[key])}" + (f"; did you mean {meant[0]}?" if meant else "")
    return None


def _nearest_key(key: str, names: list[str]) -> str | None:
    """The name that was probably meant. A key in the wrong section is as common a slip as a misspelt one."""

    def likeness(name: str) -> tuple[float, float]:
        whole, last = (difflib.SequenceMatcher(None, one, other).ratio() for one, other in zip(_ends(key), _ends(name), strict=True))
        return max(whole, last), whole

    near = max(names, key=likeness)
    return near if max(likeness(near)) > 0.6 else None


def _ends(key: str) -> tuple[str, str]:
    return key, key.rpartition(".")[2]


def _expected(hint: Any) -> str:
    """What a key of this type takes."""
    if get_origin(hint) is Literal:
        return f"one of {', '.join(get_args(hint))}"
    if get_origin(hint) is tuple:
        return f"a list of {len(get_args(hint))} numbers"
    words = {int: "a whole number", float: "a number", str: "text", NoneType: "null"}
    return " or ".join(words[part] for part in get_args(hint) or (hint,))


def _keys(schema: type, prefix: str = "") -> dict[str, Any]:
    """The types of all keys."""
    types: dict[str, Any] = {}
    for f in dataclasses.fields(schema):
        if dataclasses.is_dataclass(f.type):
            types |= _keys(f.type, f"{prefix}{f.name}.")  # type: ignore[arg-type]
        else:
            types[prefix + f.name] = f.type
    return types


def _invalid(values: dict[str, Any]) -> list[tuple[str, str]]:
    """(key, what is wrong) of values that have the right type but can't work. Keys may be absent, and are then passed over."""
    wrong: list[tuple[str, str]] = []
    for key in ("data.train", "data.val"):
        folder = values.get(key)
        if folder is not None and not is_url(folder) and not (Path(folder) / "dataset.json").is_file():
            what = "no such folder" if not Path(folder).is_dir() else "no dataset.json in it"
            wrong.append((key, f"{what}; make it with: python -m data pack IMAGES {Path(folder).parent} --split {Path(folder).name}"))
    start, run = values.get("model.init_from"), values.get("run.dir")
    # A run that has a checkpoint goes on from that, and does not need what it once started from.
    resumes = run is not None and any(Path(run, "checkpoints").glob("step-*"))
    if start is not None and not Path(start).exists() and not resumes:
        wrong.append(("model.init_from", "no such file or run directory"))

    def check(keys: Sequence[str], holds: Callable[[Any], bool], text: str) -> None:
        wrong.extend((key, text) for key in keys if values.get(key) is not None and not holds(values[key]))

    check(["engine.zero_stage"], lambda stage: stage in (0, 1, 2, 3), "must be 0, 1, 2 or 3")
    positive = ["global_batch", "epochs", "steps", "model.classes", "data.image_size", "data.lanes", "data.window", "data.decode_threads"]
    positive += ["data.read_threads", "engine.micro_batch", "optim.lr", "optim.eps", "run.log_every", "run.save_every", "run.eval_every"]
    check([*positive, "run.keep", "data.cache_gb"], lambda value: 0 < value < math.inf, "must be more than 0 and finite")
    at_least_0 = ["data.mixup", "data.cutmix", "optim.min_lr", "optim.warmup_lr", "optim.warmup_epochs", "optim.weight_decay"]
    check([*at_least_0, "optim.clip_grad"], lambda value: 0 <= value < math.inf, "must be at least 0 and finite")
    shares = ["model.drop_path", "optim.label_smoothing", "engine.ema_decay"]
    check(shares, lambda value: 0 <= value < 1, "must be at least 0 and less than 1")
    check(["data.flip", "data.mix_switch"], lambda value: 0 <= value <= 1, "must be a probability, 0 to 1")
    check(["data.eval_crop"], lambda value: 0 < value <= 1, "must be a share, more than 0 and at most 1")
    check(["data.crop_area"], lambda area: 0 < area[0] <= area[1] <= 1, "must be two shares of an area, the smaller first")
    check(["data.crop_ratio"], lambda ratio: 0 < ratio[0] <= ratio[1] < math.inf, "must be more than 0, the smaller first")
    mixes = values.get("data.mixup") or values.get("data.cutmix")
    check(["engine.micro_batch"], lambda micro: not mixes or micro % 2 == 0, "must be even: mixup and cutmix mix neighbours in pairs")
    return wrong
