"""Declares settings: each field of a schema carries its meaning, its constraint and its rule on resume.

@dataclass
class OptimConfig:
    lr: float = setting(MISSING, "Peak learning rate.", positive)
    min_lr: float = setting(1e-6, "Learning rate of the last step.", at_least(0))

settings_of(Config)["optim.lr"].problem(-1.0)      # "must be more than 0"
"""

import copy
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from omegaconf import MISSING as MISSING  # the default of a setting that has none

# On resume: free may change; asks needs --force-config; fixed can't change during a run.
Resume = Literal["free", "asks", "fixed"]


@dataclass(frozen=True)
class Check:
    """A constraint on a value: `words` follow "must be"; `problem` returns what is wrong with a value, or None."""

    words: str
    problem: Callable[[Any], str | None]


def must_be(words: str, holds: Callable[[Any], bool]) -> Check:
    return Check(words, lambda value: None if holds(value) else f"must be {words}")


def parsed_by(words: str, parse: Callable[[Any], Any]) -> Check:
    """Constrains values to those that `parse` accepts; the message of its ValueError is the problem."""

    def problem(value: Any) -> str | None:
        try:
            parse(value)
        except ValueError as error:
            return str(error)
        return None

    return Check(words, problem)


def at_least(least: float) -> Check:
    return must_be(f"at least {least}", lambda value: value >= least)


positive = must_be("more than 0", lambda value: value > 0)
from_0_to_1 = must_be("from 0 to 1", lambda value: 0 <= value <= 1)
below_1 = must_be("at least 0 and less than 1", lambda value: 0 <= value < 1)
above_0_to_1 = must_be("more than 0 and at most 1", lambda value: 0 < value <= 1)


@dataclass(frozen=True)
class Setting:
    """A field of a schema, as `setting` declares it."""

    type: Any
    default: Any
    meaning: str
    check: Check | None
    resume: Resume
    on_node: bool

    def is_a(self, *kinds: type) -> bool:
        return any(get_origin(part) in kinds for part in (self.type, *get_args(self.type)))

    @property
    def has_null(self) -> bool:
        return NoneType in get_args(self.type)

    def problem(self, value: Any) -> str | None:
        """Returns what is wrong with a value of the right type, or None."""
        parts = value if isinstance(value, list | tuple) else (value,)
        if parts is value and any(isinstance(part, list | tuple | dict) for part in parts):  # OmegaConf accepts lists in a list of texts
            return f"must be {describe_type(self.type)}"
        if "" in parts:
            return "is empty"
        if any(isinstance(part, float) and not math.isfinite(part) for part in parts):
            return "must be finite"
        return self.check.problem(value) if self.check and value is not None else None

    @property
    def allowed(self) -> str:
        """Describes the values that the setting accepts."""
        return describe_type(self.type) + (f", {self.check.words}" if self.check else "")


def setting(default: Any, meaning: str, check: Check | None = None, *, resume: Resume = "asks", on_node: bool = False) -> Any:
    """Declares a field of a schema.

    Args:
        default: the value if nothing sets one; MISSING if one must be set.
        meaning: one or two sentences of the manual, with the unit.
        check: the constraint on the value; null is not checked.
        resume: whether the value may change when a run resumes.
        on_node: whether the value names a file or folder that may exist on some nodes only.
    """
    metadata = {"meaning": meaning, "check": check, "resume": resume, "on_node": on_node}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: copy.copy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def settings_of(schema: type) -> dict[str, Setting]:
    """Returns the settings of a schema by dotted key; a field that is a dataclass itself is a section."""
    settings: dict[str, Setting] = {}
    for f in dataclasses.fields(schema):
        if dataclasses.is_dataclass(f.type):
            settings |= {f"{f.name}.{key}": inner for key, inner in settings_of(f.type).items()}  # type: ignore[arg-type]
        else:
            default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
            settings[f.name] = Setting(f.type, default, **f.metadata)
    return settings


def describe_type(hint: Any) -> str:
    parts = get_args(hint)
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, parts))}"
    if get_origin(hint) is tuple:
        return f"a list of {len(parts)} numbers"
    if get_origin(hint) is dict:
        return "a mapping"
    if get_origin(hint) is list:
        return f"a list of {describe_type(parts[0]).removeprefix('a ')}s"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", NoneType: "null"}
    return " or ".join(words[part] if part in words else describe_type(part) for part in parts or (hint,))


def to_text(value: Any) -> str:
    """Formats a value as the command line accepts it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {to_text(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(to_text, value)) + "]"
    return str(value)
