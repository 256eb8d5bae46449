"""Settings files that build on one another, overrides, and errors that say all that is wrong at once, for any schema of dataclasses.

    config = load(Config, "configs/van_b3_in22k.yaml", ["engine.micro_batch=128", "data.train=/data/in22k/train"], invalid)

A YAML file names the one it builds on with `base:` (relative to itself); later values win, the command line's last. ConfigError lists
every problem with the key, the place it was set in and the nearest valid name.
"""

import dataclasses
import difflib
import os
import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, Literal, TypeVar, get_args, get_origin

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, MissingMandatoryValue, OmegaConfBaseException

COMMAND_LINE = "command line"
_BASE_60 = re.compile(r"[-+]?\d+(:\d+)+")
Schema = TypeVar("Schema")
# (key, what is wrong) of values, by dotted key, that have the right type but can't work. Keys may be absent.
Invalid = Callable[[dict[str, Any]], list[tuple[str, str]]]


class ConfigError(ValueError):
    """What is wrong with a job's settings: all problems found, a line each."""

    def __init__(self, source: str, problems: list[str]):
        self.problems = problems
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(f"{source}: {count}\n" + "\n".join(f"  {problem}" for problem in problems))


def load(
    schema: type[Schema], path: str | Path, overrides: Sequence[str], invalid: Invalid, *, sections: Collection[str] | None = None
) -> Schema:
    """Reads a file, those that it builds on, and `key=value` texts.

    A schema that is a part of what the files hold names the `sections` that it knows whole: of other sections, and of the top level,
    keys that it lacks are passed over where a file sets them.

    Raises:
        ConfigError: listing unknown keys, wrong types, missing values and what `invalid` finds.
    """
    path = Path(path)
    last, problems = _override_layers(overrides)
    layers = [*_file_layers(path), *last]
    where = {key: source for source, layer in layers for key, _ in _leaves(layer)}
    merged = OmegaConf.structured(schema)
    rejected = _apply(merged, layers, schema, sections)
    problems += [problem for _, problem in rejected]
    # A value that was refused is reported once, and says nothing about what else is wrong.
    values, unresolved = _resolve(merged, set(keys(schema)) - {key for key, _ in rejected})
    problems += [f"{key} ({where[key]}): {text}" if key in where else f"{key}: {text} in {path} or as {key}=…" for key, text in unresolved]
    problems += [f"{key} = {values[key]} ({where.get(key, 'default')}): {text}" for key, text in invalid(values)]
    if problems:
        raise ConfigError(str(path), problems)
    return OmegaConf.to_object(merged)  # type: ignore[return-value]


def override(config: Schema, overrides: Sequence[str]) -> Schema:
    """The settings with `key=value` texts applied.

    Raises:
        ConfigError: listing unknown keys and wrong types.
    """
    merged = OmegaConf.structured(config)
    layers, problems = _override_layers(overrides)
    problems += [problem for _, problem in _apply(merged, layers, type(config))]
    if problems:
        raise ConfigError(COMMAND_LINE, problems)
    return OmegaConf.to_object(merged)  # type: ignore[return-value]


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
        key, equals, value = text.partition("=")
        if not key or not equals:
            problems.append(f"{text!r} ({COMMAND_LINE}): not of the form key=value")
            continue
        try:
            # YAML 1.1 takes 2:4 for a number in base 60.
            layers.append((COMMAND_LINE, OmegaConf.from_dotlist([f'{key}="{value}"' if _BASE_60.fullmatch(value) else text])))
        except Exception as error:  # PyYAML and OmegaConf each raise their own kinds for a value that is not YAML
            problems.append(f"{text!r} ({COMMAND_LINE}): {str(error).splitlines()[0]}")
    return layers, problems


def _apply(
    merged: DictConfig, layers: list[tuple[str, DictConfig]], schema: type, sections: Collection[str] | None = None
) -> list[tuple[str, str]]:
    """Sets every value of the layers; returns (key, what is wrong) of those that can't be set."""
    rejected = []
    types = keys(schema)
    for source, layer in layers:
        for key, value in _leaves(layer):
            if sections is not None and source != COMMAND_LINE and _is_foreign(key, types, sections):
                OmegaConf.update(merged, key, value, force_add=True)  # for those that refer to it; the schema's objects lack it
                continue
            problem = _set(merged, key, value, schema)
            if problem:
                rejected.append((key, f"{key} = {'null' if value is None else value} ({source}): {problem}"))
    return rejected


def _resolve(merged: DictConfig, names: set[str]) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """The values of these keys, and (key, what is wrong) of those without one."""
    values, unresolved = {}, []
    for key in sorted(names):
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


def _is_foreign(key: str, types: Collection[str], sections: Collection[str]) -> bool:
    """Whether a key is one of others: neither a name of the schema's, nor a section of it or inside of a value, nor in `sections`."""
    related = any(f"{name}.".startswith(f"{key}.") or key.startswith(f"{name}.") for name in types)
    return not related and key.partition(".")[0] not in sections


def _set(merged: DictConfig, key: str, value: Any, schema: type) -> str | None:
    """Sets one key; returns what is wrong with it."""
    types = keys(schema)
    if key not in types:
        inside = [name for name in types if name.startswith(f"{key}.")]
        if inside:
            return f"is a section; set one of {', '.join(inside)}"
        near = _nearest_key(key, list(types))
        return "unknown key" + (f"; did you mean {near}?" if near else f"; see {schema.__module__.replace('.', '/')}.py for all keys")
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
    if get_origin(hint) is list:
        return "a list of texts"
    words = {int: "a whole number", float: "a number", str: "text", NoneType: "null"}
    return " or ".join(words[part] for part in get_args(hint) or (hint,))


def keys(schema: type, prefix: str = "") -> dict[str, Any]:
    """The types of all dotted keys of a schema."""
    types: dict[str, Any] = {}
    for f in dataclasses.fields(schema):
        if dataclasses.is_dataclass(f.type):
            types |= keys(f.type, f"{prefix}{f.name}.")  # type: ignore[arg-type]
        else:
            types[prefix + f.name] = f.type
    return types
