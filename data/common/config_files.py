"""Reads settings files that build on one another, and `key=value` texts, for any schema of settings (fields.py).

    values = resolve(Config, "configs/van_b3_in22k.yaml", ["engine.micro_batch=128", "data.train=/data/in22k/train"], conflicts)
    config = build(Config, values)

A YAML file names the one it builds on with `base:` (relative to itself); later values win, the command line's last. A setting whose type
is text keeps its value as typed: `name: 2026_12`, `name: yes` and `name: 1.10` are no numbers and no booleans. ConfigError lists every
problem with the key, the place it was set in and the nearest valid name.
"""

import copy
import dataclasses
import difflib
import math
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import NoneType
from typing import Any, Literal, TypeVar, get_args, get_origin

import yaml

from data.common.fields import MISSING, Setting, in_words, settings_of, type_in_words
from data.common.text import printable

COMMAND_LINE, DEFAULT = "command line", "default"
Schema = TypeVar("Schema")
# Takes values of the right types by dotted key; returns (key, problem) of those that can't work together. Keys may be absent.
Conflicts = Callable[[Mapping[str, Any]], Iterable[tuple[str, str]]]

_NULLS = ("null", "Null", "NULL", "~", "")
_BOOLEANS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
_REFERENCE = re.compile(r"(\\?)\$\{(?:([^{}]*)\})?")  # ${key} or ${env:NAME}; with a backslash before it, text


class ConfigError(ValueError):
    """The problems of a job's settings, a line each."""

    def __init__(self, source: str, problems: list[str]):
        self.problems = [printable(problem) for problem in problems]
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(f"{source}: {count}\n" + "\n".join(f"  {problem}" for problem in self.problems))


@dataclass(frozen=True)
class Value:
    """The value of a setting, the value as typed with references filled in where it is text, and the place that set it."""

    value: Any
    typed: str
    source: str


def resolve(
    schema: type,
    path: str | Path,
    overrides: Sequence[str],
    conflicts: Conflicts,
    *,
    unchecked: Collection[str] = (),
    sections: Collection[str] | None = None,
) -> dict[str, Value]:
    """Reads a file, those that it builds on, and `key=value` texts.

    Args:
        schema: a dataclass of settings.
        path: the file.
        overrides: `key=value` texts; of two for one key the later one wins.
        conflicts: finds values that can't work together.
        unchecked: keys whose values are not checked.
        sections: where the schema is a part of the settings in the files, the sections that it knows whole. Keys of other sections and
            of the top level that it lacks are skipped where a file sets them.

    Returns:
        The values of all settings by dotted key.

    Raises:
        ConfigError: lists unknown keys, wrong types, missing values and values that can't work.
    """
    in_files = _read_layers(schema, Path(path))
    overriding, malformed = _parse_overrides(schema, overrides)
    skipped = {key for key in in_files.keys() - overriding.keys() if sections is not None and _is_foreign(key, schema, sections)}
    values, problems = _convert(schema, _merged([in_files, overriding]), str(path), skipped)
    problems = malformed + problems + _unworkable(schema, values, conflicts, unchecked)
    if problems:
        raise ConfigError(str(path), problems)
    return values


def override(config: Schema, overrides: Sequence[str]) -> Schema:
    """Returns the settings with `key=value` texts applied.

    Raises:
        ConfigError: lists unknown keys, wrong types and values that can't work.
    """
    schema = type(config)
    overriding, malformed = _parse_overrides(schema, overrides)
    values, problems = _convert(schema, _merged([_parse(schema, to_yaml(config), Path(DEFAULT)), overriding]), COMMAND_LINE)
    problems = malformed + problems + _unworkable(schema, values, lambda values: (), values.keys() - overriding.keys())
    if problems:
        raise ConfigError(COMMAND_LINE, problems)
    return build(schema, values)


def build(schema: type[Schema], values: Mapping[str, Value], prefix: str = "") -> Schema:
    """Returns the schema's object with values by dotted key."""
    parts = {}
    for f in dataclasses.fields(schema):  # type: ignore[arg-type]
        key = prefix + f.name
        parts[f.name] = build(f.type, values, f"{key}.") if dataclasses.is_dataclass(f.type) else values[key].value  # type: ignore[arg-type]
    return schema(**parts)


def from_dict(schema: type[Schema], settings: Mapping[str, Any]) -> Schema:
    """Returns the settings that `dataclasses.asdict` took apart; keys that the schema lacks are skipped, missing ones get their default."""
    values, problems = _from_saved(schema, to_yaml(settings), Path("settings"))
    if problems:
        raise ConfigError("settings", problems)
    return build(schema, values)


def read_saved(schema: type, path: Path) -> dict[str, Any]:
    """Returns the values in a file of `to_yaml` by dotted key; keys that the schema lacks are skipped, missing ones get their default."""
    return {key: each.value for key, each in _from_saved(schema, path.read_bytes(), path)[0].items()}


def to_yaml(config: Any) -> str:
    """Returns settings, or a dictionary of settings, as YAML that reads as the same."""

    def escaped(value: Any) -> Any:
        if isinstance(value, str):
            return _REFERENCE.sub(r"\\\g<0>", value)
        if isinstance(value, Mapping):
            return {key: escaped(each) for key, each in value.items()}
        return [escaped(each) for each in value] if isinstance(value, list | tuple) else value

    values = dataclasses.asdict(config) if dataclasses.is_dataclass(config) else config  # type: ignore[arg-type]
    return yaml.dump(escaped(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)


class _Dumper(yaml.SafeDumper):
    """Quotes every text that would not read as text in a mapping of any values."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    is_plain = _untyped(yaml.ScalarNode("", text), str) == text
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if is_plain else "'")


_Dumper.add_representer(str, _represent_text)


# ---------------------------------------------------------------- from text to nodes


@dataclass(frozen=True)
class _Given:
    """A value as a file or the command line gives it."""

    node: yaml.Node
    source: str


def _read_layers(schema: type, path: Path) -> dict[str, _Given]:
    """Returns the values of the file and of those that it builds on, by dotted key."""
    layers: list[dict[str, _Given]] = []
    paths: list[Path] = []
    while True:
        named_by = f", named by {paths[-1]}" if paths else ""
        if not path.is_file():
            near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1)
            raise ConfigError(str(path), [f"no such file{named_by}" + (f"; did you mean {path.parent / near[0]}?" if near else "")])
        if path in paths:
            raise ConfigError(str(path), [f"base: is circular{named_by}"])
        layers.append(_parse(schema, path.read_bytes(), path))
        paths.append(path)
        base = layers[-1].pop("base", None)
        if base is None:
            return _merged(reversed(layers))
        if not isinstance(base.node, yaml.ScalarNode) or _is_null(base.node):
            raise ConfigError(str(path), [f"base = {_text(base.node)} ({base.source}): must be the name of one file"])
        path = Path(os.path.normpath(path.parent / base.node.value))


def _parse(schema: type, text: str | bytes, path: Path) -> dict[str, _Given]:
    """Returns the values of a YAML text by dotted key."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)  # builds no objects: a scalar keeps its text
    except yaml.YAMLError as error:
        raise ConfigError(str(path), [f"not valid YAML: {' '.join(str(error).split())}"]) from None
    if node is not None and not isinstance(node, yaml.MappingNode):
        raise ConfigError(str(path), ["not a mapping of keys to values"])
    return dict(_leaves(node, path, settings_of(schema))) if node else {}


def _leaves(node: yaml.MappingNode, path: Path, settings: Mapping[str, Setting], prefix: str = "") -> Iterator[tuple[str, _Given]]:
    """Yields everything that is set below a node by dotted key."""
    names: set[str] = set()
    for name_node, value in node.value:
        name, source = _text(name_node), f"{path}:{name_node.start_mark.line + 1}"
        if name in names:
            raise ConfigError(str(path), [f"duplicate key {prefix}{name} ({source})"])
        names.add(name)
        if isinstance(value, yaml.MappingNode) and value.value and prefix + name not in settings:
            yield from _leaves(value, path, settings, f"{prefix}{name}.")
        else:
            yield prefix + name, _Given(value, source)


def _parse_overrides(schema: type, overrides: Sequence[str]) -> tuple[dict[str, _Given], list[str]]:
    """Returns the values of `key=value` texts by key, and a problem for each text that gives none.

    Lists and mappings are YAML. Any other value is the text after the first `=`, where null is no text.
    """
    settings = settings_of(schema)
    given: dict[str, _Given] = {}
    problems = []
    for text in overrides:
        key, equals, value = text.partition("=")
        if not key or not equals:
            problems.append(f"{text!r} ({COMMAND_LINE}): not of the form key=value")
            continue
        node: yaml.Node = yaml.ScalarNode("", value, style=None if value == "null" else '"')
        mapping = next((name for name in settings if settings[name].is_a(dict) and key.startswith(f"{name}.")), None)
        if mapping or (key in settings and settings[key].is_a(list, tuple, dict)):
            try:
                node = yaml.compose(value, Loader=yaml.SafeLoader) or node
            except yaml.YAMLError as error:
                problems.append(f"{text!r} ({COMMAND_LINE}): {str(error).splitlines()[0]}")
                continue
        if mapping:
            node = yaml.MappingNode("", [(yaml.ScalarNode("", key.removeprefix(f"{mapping}.")), node)])
        given = _merged([given, {mapping or key: _Given(node, COMMAND_LINE)}])
    return given, problems


def _merged(layers: Iterable[Mapping[str, _Given]]) -> dict[str, _Given]:
    """Returns the values of all layers; later ones win, and mappings are merged by name."""
    merged: dict[str, _Given] = {}
    for layer in layers:
        for key, given in layer.items():
            before = merged.get(key, given).node
            if before is not given.node and isinstance(before, yaml.MappingNode) and isinstance(given.node, yaml.MappingNode):
                given = _Given(yaml.MappingNode("", before.value + given.node.value), given.source)
            merged[key] = given
    return merged


def _is_null(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.style is None and node.value in _NULLS


def _text(node: yaml.Node) -> str:
    """Returns a value as typed, a list or a mapping in one line."""
    if isinstance(node, yaml.MappingNode):
        return "{" + ", ".join(f"{_text(name)}: {_text(value)}" for name, value in node.value) + "}"
    if isinstance(node, yaml.SequenceNode):
        return "[" + ", ".join(map(_text, node.value)) + "]"
    return node.value or ("null" if _is_null(node) else "")


# ---------------------------------------------------------------- from nodes to values


class _WrongType(Exception):
    pass


class _ReferenceToMissing(Exception):
    """A value refers to a setting without one, which is reported for that setting alone."""


def _convert(schema: type, given: Mapping[str, _Given], path: str, skipped: Collection[str] = ()) -> tuple[dict[str, Value], list[str]]:
    """Returns the values of the schema's settings by dotted key, and the problems of those that can't have one."""
    settings = settings_of(schema)
    values: dict[str, Value] = {}
    problems: list[str] = []
    for key, each in given.items():
        if key in skipped:
            continue
        try:
            if key not in settings:
                raise ValueError(_unknown(key, list(settings)))
            value = _typed(settings[key].type, each.node, _References(given, settings, each.source).fill)
            values[key] = Value(value, value if isinstance(value, str) else _text(each.node), each.source)
        except _ReferenceToMissing:
            continue
        except ValueError as error:
            problems.append(f"{key} = {_text(each.node)} ({each.source}): {error}")
    for key in [key for key in settings if key not in given]:
        default = copy.copy(settings[key].default)
        if default == MISSING:
            problems.append(f"{key}: no value; set it in {path} or as {key}=…")
            continue
        with suppress(_ReferenceToMissing):
            value = _References(given, settings, DEFAULT).fill(default) if isinstance(default, str) else default
            values[key] = Value(value, in_words(value), DEFAULT)
    return values, problems


def _from_saved(schema: type, text: str | bytes, path: Path) -> tuple[dict[str, Value], list[str]]:
    given = _parse(schema, text, path)
    return _convert(schema, given, str(path), given.keys() - settings_of(schema).keys())


def _unworkable(schema: type, values: Mapping[str, Value], conflicts: Conflicts, unchecked: Collection[str]) -> list[str]:
    """Returns the problems of values that have the right type."""
    checks = {key: setting.check for key, setting in settings_of(schema).items() if key not in unchecked}
    alone = {
        key: check.problem(values[key].value) for key, check in checks.items() if check and key in values and values[key].value is not None
    }
    wrong = [(key, problem) for key, problem in alone.items() if problem]
    wrong += conflicts({key: each.value for key, each in values.items() if not alone.get(key)})
    return [f"{key} = {values[key].typed} ({values[key].source}): {problem}" for key, problem in wrong if key not in unchecked]


@dataclass(frozen=True)
class _References:
    """Replaces ${key} by another setting's value as typed, and ${env:NAME} by an environment variable, in a value from `source`."""

    given: Mapping[str, _Given]
    settings: Mapping[str, Setting]
    source: str
    within: tuple[str, ...] = ()  # the settings that refer to this one

    def fill(self, text: str) -> str:
        return _REFERENCE.sub(self._replacement, text)

    def _replacement(self, match: re.Match[str]) -> str:
        escape, name = match.groups()
        is_known = name is not None and (name.startswith("env:") or name in self.given or name in self.settings)
        if not is_known and self.source == COMMAND_LINE:
            return match[0]
        if escape:
            return match[0].removeprefix(escape)
        if not is_known:
            near = _nearest_key(name or "", list(self.settings))
            raise ValueError(f"{match[0]} names no setting" + (f"; did you mean ${{{near}}}?" if near else ""))
        if name.startswith("env:"):
            if (variable := os.environ.get(name.removeprefix("env:"))) is None:
                raise ValueError(f"{match[0]}: there is no such environment variable")
            return variable
        if name in self.within:
            raise ValueError(f"{match[0]} leads back to itself")
        if name in self.given:
            text, source = _text(self.given[name].node), self.given[name].source
        else:
            text, source = in_words(self.settings[name].default), DEFAULT
        if text == MISSING:
            raise _ReferenceToMissing
        return replace(self, source=source, within=(*self.within, name)).fill(text)


def _typed(hint: Any, node: yaml.Node, fill: Callable[[str], str]) -> Any:
    """Returns the value of a node as a type, with references filled in.

    Raises:
        ValueError: it is of another type, or empty text, or a reference names nothing.
    """
    try:
        return _converted(hint, node, fill)
    except _WrongType:
        choices = list(map(str, get_args(hint))) if get_origin(hint) is Literal else []
        near = difflib.get_close_matches(_text(node), choices, n=1)
        raise ValueError(f"must be {type_in_words(hint)}" + (f"; did you mean {near[0]}?" if near else "")) from None


def _converted(hint: Any, node: yaml.Node, fill: Callable[[str], str]) -> Any:
    kind, parts = get_origin(hint) or hint, get_args(hint)
    if NoneType in parts:
        return None if _is_null(node) else _converted(parts[0], node, fill)
    if kind is dict and isinstance(node, yaml.MappingNode):
        return _untyped(node, fill)
    if kind in (list, tuple) and isinstance(node, yaml.SequenceNode):
        if kind is tuple and len(node.value) != len(parts):
            raise _WrongType
        return kind(_converted(parts[0], item, fill) for item in node.value)
    if kind in (list, tuple, dict) or not isinstance(node, yaml.ScalarNode):
        raise _WrongType
    text = fill(node.value)
    if kind is str:
        if not text:
            raise ValueError("is empty")
        return text
    try:
        if kind is Literal:
            return {str(choice): choice for choice in parts}[text]
        value = _BOOLEANS[text.lower()] if kind is bool else kind(text)
    except (KeyError, ValueError):
        raise _WrongType from None
    if kind is float and not math.isfinite(value):
        raise _WrongType
    return value


def _untyped(node: yaml.Node, fill: Callable[[str], str]) -> Any:
    """Returns the value of a node of any type: text, unless it reads as null, true, false or a number and has no quotes."""
    if isinstance(node, yaml.MappingNode):
        return {_text(name): _untyped(value, fill) for name, value in node.value}
    if isinstance(node, yaml.SequenceNode):
        return [_untyped(item, fill) for item in node.value]
    if _is_null(node):
        return None
    text = fill(node.value)
    if node.style is None:
        if text in ("true", "false"):
            return text == "true"
        with suppress(ValueError):
            return int(text)
        with suppress(ValueError):
            return float(text) if math.isfinite(float(text)) else text
    return text


# ---------------------------------------------------------------- unknown keys


def _is_foreign(key: str, schema: type, sections: Collection[str]) -> bool:
    """Whether a key belongs to another schema: it is no setting, section or part of a setting of this one, and in none of `sections`."""
    related = any(f"{name}.".startswith(f"{key}.") or key.startswith(f"{name}.") for name in settings_of(schema))
    return not related and key.partition(".")[0] not in sections


def _unknown(key: str, names: list[str]) -> str:
    """Returns the problem of a key that is no setting."""
    inside = [name for name in names if name.startswith(f"{key}.")]
    if inside:
        return f"is a section; set one of {', '.join(inside)}"
    near = _nearest_key(key, names)
    return "unknown key" + (f"; did you mean {near}?" if near else "; docs/configuration.md lists all keys")


def _nearest_key(key: str, names: list[str]) -> str | None:
    """Returns the name that was probably meant. A key in the wrong section is as common a slip as a misspelled one."""

    def likeness(name: str) -> tuple[float, float]:
        pairs = (key, name), (key.rpartition(".")[2], name.rpartition(".")[2])
        whole, last = (difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)
        return max(whole, last), whole

    near = max(names, key=likeness)
    return near if max(likeness(near)) > 0.6 else None
