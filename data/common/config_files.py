"""Reads settings files that build on one another, and `key=value` overrides, for any schema of settings (fields.py).

    config, places = resolve(Config, "configs/van_b3_in22k.yaml", ["engine.micro_batch=128", "data.train=/data/in22k/train"], conflicts)

A YAML file names the file that it builds on with `base:` (relative to itself) and overrides its values; the command line overrides all
files. OmegaConf merges the values, converts them to the types of the schema and resolves references. OmegaConf receives every value
outside of mappings as the text in the file, so that `name: 2026_12`, `name: yes` and `name: 1.10` stay text. ConfigError lists every
problem with the key, the place that set it and the nearest valid name.
"""

import dataclasses
import difflib
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, get_args, get_origin

import yaml
from omegaconf import OmegaConf, errors
from omegaconf.errors import OmegaConfBaseException

from data.common.fields import Setting, describe_type, settings_of, to_text
from data.common.text import printable

COMMAND_LINE, DEFAULT = "command line", "default"
Schema = TypeVar("Schema")
# From values of the right types, by dotted key, to (key, problem) for those that conflict with each other. Keys may be absent.
Conflicts = Callable[[Mapping[str, Any]], Iterable[tuple[str, str]]]

_REFERENCE = re.compile(r"(\\*)(\$\{(?:([^{}]*)\})?)")  # ${key} or ${oc.env:NAME}, and the backslashes before it


class ConfigError(ValueError):
    """Lists the problems of a job's settings, one per line."""

    def __init__(self, source: str, problems: list[str]):
        self.problems = [printable(problem) for problem in problems]
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(f"{source}: {count}\n" + "\n".join(f"  {problem}" for problem in self.problems))


class _Given(NamedTuple):
    """A value as a file or the command line sets it."""

    key: str
    value: Any
    source: str


def resolve(
    schema: type[Schema],
    path: str | Path,
    overrides: Sequence[str],
    conflicts: Conflicts,
    *,
    unchecked: Collection[str] = (),
    sections: Collection[str] | None = None,
) -> tuple[Schema, dict[str, str]]:
    """Reads a file, the files that it builds on, and `key=value` overrides. The last value of a key wins.

    Args:
        conflicts: finds values that conflict with each other.
        unchecked: keys whose values are not checked.
        sections: for a schema that covers a part of the files' settings, the sections that it covers whole. Unknown keys that a file
            sets in other sections or at the top level are skipped.

    Returns:
        The schema's object, and the place that set each setting by dotted key.

    Raises:
        ConfigError: lists unknown keys, wrong types, missing values and invalid values.
    """
    overriding, malformed = _parse_overrides(schema, overrides)
    return _load(schema, [*_read_layers(schema, Path(path)), *overriding], str(path), malformed, conflicts, unchecked, sections)


def override(config: Schema, overrides: Sequence[str]) -> Schema:
    """Applies `key=value` overrides to settings. Raises ConfigError for invalid overrides; other values are not checked."""
    schema = type(config)
    overriding, malformed = _parse_overrides(schema, overrides)
    unchecked = settings_of(schema).keys() - {each.key for each in overriding}
    given = [*_parse(schema, to_yaml(config), Path(DEFAULT)), *overriding]
    return _load(schema, given, COMMAND_LINE, malformed, unchecked=unchecked)[0]


def from_dict(schema: type[Schema], settings: Mapping[str, Any]) -> Schema:
    """Rebuilds settings from `dataclasses.asdict`. Unknown keys are skipped; missing ones get their default."""
    given = _parse(schema, to_yaml(settings), Path("settings"))
    return _load(schema, given, "settings", unchecked=settings_of(schema), sections=())[0]


def read_saved(schema: type, path: Path) -> dict[str, Any]:
    """Reads a file written with `to_yaml` as values by dotted key. Unknown keys are skipped; missing ones get their default."""
    return _convert(schema, _parse(schema, path.read_bytes(), path), str(path), sections=())[0]


def to_yaml(config: Any) -> str:
    """Formats settings, or a dictionary of settings, as YAML that parses to the same values."""
    return OmegaConf.to_yaml(OmegaConf.create(_escape(config if isinstance(config, Mapping) else dataclasses.asdict(config))))


def _escape(value: Any, references: Collection[str] = ()) -> Any:
    """Escapes the texts in a value for OmegaConf, except for references to these keys and to environment variables."""
    if isinstance(value, Mapping):
        return {key: _escape(each, references) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_escape(each, references) for each in value)
    if not isinstance(value, str):
        return value

    def escape_reference(match: re.Match[str]) -> str:
        backslashes, reference, name = match.groups()
        is_known = name is not None and references and (name in references or name.startswith("oc.env:"))
        return match[0] if is_known else f"{backslashes * 2}\\{reference}"

    text = _REFERENCE.sub(escape_reference, value)
    return f"\\{text}" if re.fullmatch(r"\\*\?\?\?", text) else text  # ??? is a missing value


# ---------------------------------------------------------------- from text to given values


def _read_layers(schema: type, path: Path) -> list[_Given]:
    """Returns the values of a file and of the files that it builds on, the base first."""
    given: list[_Given] = []
    paths: list[Path] = []
    while True:
        named_by = f", named by {paths[-1]}" if paths else ""
        if not path.is_file():
            near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1)
            raise ConfigError(str(path), [f"no such file{named_by}" + (f"; did you mean {path.parent / near[0]}?" if near else "")])
        if path in paths:
            raise ConfigError(str(path), [f"base: is circular{named_by}"])
        layer = _parse(schema, path.read_bytes(), path)
        paths.append(path)
        given = [each for each in layer if each.key != "base"] + given
        base = next((each for each in layer if each.key == "base"), None)
        if base is None:
            return given
        if not isinstance(base.value, str):
            raise ConfigError(str(path), [f"base = {to_text(base.value)} ({base.source}): must be the name of one file"])
        path = Path(os.path.normpath(path.parent / base.value))


def _parse(schema: type, text: str | bytes, path: Path) -> list[_Given]:
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)  # builds no objects: a scalar keeps its text
        if node is not None and not isinstance(node, yaml.MappingNode):
            raise ConfigError(str(path), ["not a mapping of keys to values"])
        return list(_leaves(node, path, settings_of(schema))) if node else []
    except (yaml.YAMLError, OmegaConfBaseException, RecursionError) as error:  # an alias can lead back to itself
        raise ConfigError(str(path), [f"not valid YAML: {' '.join(str(error).split())}"]) from None


def _leaves(node: yaml.MappingNode, path: Path, settings: Mapping[str, Setting], prefix: str = "") -> Iterator[_Given]:
    """Yields every value that is set below a node."""
    names: set[str] = set()
    for name_node, value in node.value:
        name, source = _to_plain(name_node), f"{path}:{name_node.start_mark.line + 1}"
        key = f"{prefix}{name}"
        if str(name) in names:
            raise ConfigError(str(path), [f"duplicate key {key} ({source})"])
        names.add(str(name))
        is_section = any(setting.startswith(f"{key}.") for setting in settings)
        if isinstance(value, yaml.MappingNode) and (is_section or (value.value and key not in settings)):
            yield from _leaves(value, path, settings, f"{key}.")
        elif isinstance(value, yaml.MappingNode) and value.value and settings[key].is_a(dict):
            # The values of a dict have no declared type, so OmegaConf infers the types from the text.
            yield _Given(key, OmegaConf.to_container(OmegaConf.create(yaml.serialize(value))), source)
        else:
            yield _Given(key, _to_plain(value, key not in settings or settings[key].has_null), source)


def _to_plain(node: yaml.Node, has_null: bool = True) -> Any:
    """Returns a node as mappings and lists of texts; null stays null if the type has it."""
    if isinstance(node, yaml.MappingNode):
        return {_to_plain(name): _to_plain(value) for name, value in node.value}
    if isinstance(node, yaml.SequenceNode):
        return [_to_plain(item, has_null) for item in node.value]
    return None if has_null and node.tag == "tag:yaml.org,2002:null" else node.value


def _parse_overrides(schema: type, overrides: Sequence[str]) -> tuple[list[_Given], list[str]]:
    """Returns the values of `key=value` overrides, and a problem for each malformed one.

    Lists and mappings are YAML. Any other value is the text after the first `=`; `null` means None if the type has it.
    """
    settings = settings_of(schema)
    given = []
    problems = []
    for text in overrides:
        key, equals, value = text.partition("=")
        if not key or not equals:
            problems.append(f"{text!r} ({COMMAND_LINE}): not of the form key=value")
            continue
        mapping = next((name for name in settings if settings[name].is_a(dict) and f"{key}.".startswith(f"{name}.")), None)
        parsed: Any = None if value == "null" and (key not in settings or settings[key].has_null) else value
        try:
            if mapping:
                parsed = OmegaConf.to_container(OmegaConf.from_dotlist([text]))
                for name in mapping.split("."):
                    parsed = parsed[name]
            elif parsed is not None and key in settings and settings[key].is_a(list, tuple):
                parsed = _to_plain(yaml.compose(value, Loader=yaml.SafeLoader) or yaml.ScalarNode("", value), has_null=False)
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            problems.append(f"{text!r} ({COMMAND_LINE}): {str(error).splitlines()[0]}")
        else:
            given.append(_Given(mapping or key, parsed, COMMAND_LINE))
    return given, problems


# ---------------------------------------------------------------- from given values to settings


def _load(
    schema: type[Schema],
    given: Sequence[_Given],
    name: str,
    malformed: Sequence[str] = (),
    conflicts: Conflicts = lambda values: (),
    unchecked: Collection[str] = (),
    sections: Collection[str] | None = None,
) -> tuple[Schema, dict[str, str]]:
    """Returns the schema's object and the place of each setting, or raises ConfigError with `malformed` and all other problems."""
    settings = settings_of(schema)
    values, problems = _convert(schema, given, name, sections)
    places = dict.fromkeys(settings, DEFAULT) | {each.key: each.source for each in given}
    invalid = {key: problem for key, value in values.items() if key not in unchecked and (problem := settings[key].problem(value))}
    conflicting = conflicts({key: value for key, value in values.items() if key not in invalid})
    invalid |= {key: problem for key, problem in conflicting if key not in unchecked}
    problems += [f"{key} = {to_text(values[key])} ({places[key]}): {problem}" for key, problem in invalid.items()]
    if malformed or problems:
        raise ConfigError(name, [*malformed, *problems])
    config = OmegaConf.structured(schema)
    for key, value in values.items():
        OmegaConf.update(config, key, _escape(value))
    return OmegaConf.to_object(config), places  # type: ignore[return-value]


def _convert(schema: type, given: Sequence[_Given], name: str, sections: Collection[str] | None) -> tuple[dict[str, Any], list[str]]:
    """Converts given values to the schema's types: returns values by dotted key, and the problems of all other keys."""
    settings = settings_of(schema)
    keys = list(settings)
    merged = OmegaConf.structured(schema)
    references = {*keys, *(each.key for each in given)}
    shown = {key: f"{key} = {to_text(each.default)} ({DEFAULT})" for key, each in settings.items()}
    problems: dict[str, str] = {}
    for key, value, source in given:
        shown[key] = f"{key} = {to_text(value)} ({source})"
        problems.pop(key, None)
        if sections is not None and source != COMMAND_LINE and _is_foreign(key, keys, sections):
            with suppress(OmegaConfBaseException):  # a value of another schema, for settings that refer to it
                OmegaConf.update(merged, key, value, force_add=True)
        elif key not in settings:
            problems[key] = f"{shown[key]}: {_describe_unknown(key, keys)}"
        else:
            try:
                OmegaConf.update(merged, key, _escape(value, references) if source == COMMAND_LINE else value)
            except OmegaConfBaseException as error:
                problems[key] = f"{shown[key]}: {_describe_rejected(error, settings[key].type, value, keys)}"
    values: dict[str, Any] = {}
    for key in [key for key in keys if key not in problems]:
        try:
            value = OmegaConf.select(merged, key, throw_on_missing=True)
            values[key] = OmegaConf.to_container(value, resolve=True, throw_on_missing=True) if OmegaConf.is_config(value) else value
        except errors.MissingMandatoryValue:
            problems[key] = f"{key}: no value; set it in {name} or as {key}=…"
        except errors.InterpolationToMissingValueError:
            pass  # the missing value has its own problem
        except OmegaConfBaseException as error:
            problems[key] = f"{shown[key]}: {_describe_rejected(error, settings[key].type, None, keys)}"
    return values, list(problems.values())


# ---------------------------------------------------------------- descriptions of problems


def _describe_rejected(error: OmegaConfBaseException, hint: Any, value: Any, keys: list[str]) -> str:
    """Describes why OmegaConf rejects a value: an unresolvable reference, or a wrong type."""
    near = None
    if isinstance(error, errors.GrammarParseError | errors.InterpolationResolutionError):
        problem = str(error).splitlines()[0]
        if isinstance(error, errors.InterpolationKeyError) and (key := _find_nearest_key(problem.split("'")[1], keys)):
            near = f"${{{key}}}"
    else:
        problem = f"must be {describe_type(hint)}"
        if get_origin(hint) is Literal:
            near = next(iter(difflib.get_close_matches(str(value), get_args(hint), n=1)), None)
    return problem + (f"; did you mean {near}?" if near else "")


def _is_foreign(key: str, keys: list[str], sections: Collection[str]) -> bool:
    """Returns whether a key belongs to another schema: it is not part of this one, and in none of `sections`."""
    related = any(f"{name}.".startswith(f"{key}.") or key.startswith(f"{name}.") for name in keys)
    return not related and key.partition(".")[0] not in sections


def _describe_unknown(key: str, keys: list[str]) -> str:
    inside = [name for name in keys if name.startswith(f"{key}.")]
    if inside:
        return f"is a section; set one of {', '.join(inside)}"
    near = _find_nearest_key(key, keys)
    return "unknown key" + (f"; did you mean {near}?" if near else "; docs/configuration.md lists all keys")


def _find_nearest_key(key: str, keys: list[str]) -> str | None:
    """Returns the most similar key, if any. A key in the wrong section is as common a mistake as a misspelled one."""

    def likeness(name: str) -> tuple[float, float]:
        pairs = (key, name), (key.rpartition(".")[2], name.rpartition(".")[2])
        whole, last = (difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)
        return max(whole, last), whole

    near = max(keys, key=likeness)
    return near if max(likeness(near)) > 0.6 else None
