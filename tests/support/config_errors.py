"""Collects the problems that loading a settings file reports."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data.common.config_files import ConfigError

Load = Callable[[Path, tuple[str, ...]], Any]


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


def problems(load: Load, path: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(path, overrides)
    assert all(problem in str(caught.value) for problem in caught.value.problems)
    return caught.value.problems


def the_problem(load: Load, path: Path, *overrides: str) -> str:
    (problem,) = problems(load, path, *overrides)
    return problem
