"""Settings files: how they build on one another, what is told of a bad one, and schemas that are a part of what the files hold."""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
from omegaconf import MISSING

from data.common import config_files
from data.common.config_files import ConfigError
from data.settings import JobData, invalid_data
from data.synthetic.synthesize import synthesize
from tests.support import config_errors
from tests.support.config_errors import write


@dataclass
class Optim:
    lr: float = MISSING
    decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)


@dataclass
class Job:
    name: str = MISSING
    seed: int = 0
    epochs: float = MISSING
    device: Literal["cpu", "cuda"] = "cpu"
    dir: str = "runs/${name}"
    optim: Optim = field(default_factory=Optim)


def negative(values: dict[str, Any]) -> list[tuple[str, str]]:
    return [(key, "must be more than 0") for key, value in values.items() if isinstance(value, float) and value <= 0]


def load(path: Path, overrides: list[str] | tuple[str, ...] = ()) -> Job:
    return config_files.load(Job, path, overrides, negative)


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """A file that loads."""
    return write(tmp_path / "job.yaml", "name: tiny\nepochs: 3\noptim: {lr: 1e-3}\n")


problems, the_problem = partial(config_errors.problems, load), partial(config_errors.the_problem, load)


def test_later_files_win_and_the_command_line_wins_last(tmp_path: Path, job: Path) -> None:
    job.rename(tmp_path / "basic.yaml")
    write(tmp_path / "parts" / "middle.yaml", "base: ../basic.yaml\nseed: 1\nepochs: 5\ndevice: cuda\n")
    last = write(tmp_path / "last.yaml", "base: parts/middle.yaml\nseed: 2\noptim: {decay: 0.3}\n")
    config = load(last, ["optim.decay=0.4", "optim.betas=[0.5,0.6]", "optim.decay=0.5"])
    assert config.optim.lr == 1e-3  # of the first
    assert (config.epochs, config.device) == (5, "cuda")  # of the second
    assert config.seed == 2  # of the third
    assert config.optim == Optim(1e-3, 0.5, (0.5, 0.6))  # of the command line
    assert config.dir == "runs/tiny"


def test_circular_base(tmp_path: Path) -> None:
    one = write(tmp_path / "one.yaml", "base: two.yaml\n")
    write(tmp_path / "two.yaml", "base: ./one.yaml\n")
    with pytest.raises(ConfigError, match=rf"{one}: 1 problem\n.*base: is circular, named again by .*two\.yaml"):
        load(one)


def test_missing_base_is_named_with_who_named_it_and_the_nearest(tmp_path: Path) -> None:
    write(tmp_path / "recipes" / "in22k.yaml", "epochs: 1\n")
    path = write(tmp_path / "job.yaml", "base: recipes/in2k.yaml\n")
    with pytest.raises(ConfigError) as caught:
        load(path)
    recipes = tmp_path / "recipes"
    assert str(caught.value).startswith(f"{recipes / 'in2k.yaml'}: 1 problem\n")
    assert caught.value.problems == [f"no such file, named by {path}; did you mean {recipes / 'in22k.yaml'}?"]
    assert the_problem(tmp_path / "jib.yaml") == f"no such file; did you mean {path}?"
    assert the_problem(tmp_path / "nothing_alike.yaml") == "no such file"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("base: 3\n", "base = 3: must be the name of one file"),
        ("base: [a.yaml, b.yaml]\n", "base = ['a.yaml', 'b.yaml']: must be the name of one file"),
        ("epochs: 1\nepochs: 2\n", "duplicate key epochs"),
        ("a: b: c\n", "line 1, column 5"),
        ("- epochs\n", "not a mapping of keys to values"),
        ("3\n", "not valid YAML"),
    ],
)
def test_a_file_that_is_no_settings(tmp_path: Path, text: str, problem: str) -> None:
    path = write(tmp_path / "job.yaml", text)
    with pytest.raises(ConfigError, match=f"^{path}: ") as caught:
        load(path)
    assert problem in caught.value.problems[0]


@pytest.mark.parametrize("text", ["epochs", "=3", "", "optim.lr=${x"])
def test_a_text_that_is_no_override(job: Path, text: str) -> None:
    assert the_problem(job, text).startswith(f"{text!r} (command line): ")


def test_references_between_keys(tmp_path: Path, job: Path) -> None:
    path = write(tmp_path / "more.yaml", "base: job.yaml\ndir: 'out/${name}-${seed}'\n")
    assert load(path, ["seed=7"]).dir == "out/tiny-7"
    write(path, "base: job.yaml\ndir: 'out/${nam}'\n")
    assert the_problem(path) == f"dir ({path}): Interpolation key 'nam' not found"


def test_every_problem_is_told_once_with_its_place(tmp_path: Path) -> None:
    recipe = write(tmp_path / "recipe.yaml", "epochs: many\noptim: {lr: -1, beta: 3}\n")
    path = write(tmp_path / "job.yaml", "base: recipe.yaml\nname: tiny\noptim: 3\ndevice: cud\n")
    assert problems(path, "epochs", "seed=x", "zebra=1") == [
        "'epochs' (command line): not of the form key=value",
        f"epochs = many ({recipe}): must be a number",
        f"optim.beta = 3 ({recipe}): unknown key; did you mean optim.betas?",
        f"optim = 3 ({path}): is a section; set one of optim.lr, optim.decay, optim.betas",
        f"device = cud ({path}): must be one of cpu, cuda; did you mean cuda?",
        "seed = x (command line): must be a whole number",
        "zebra = 1 (command line): unknown key; see tests/data/common/test_config_files.py for all keys",
        f"optim.lr = -1.0 ({recipe}): must be more than 0",
    ]


# ---------------------------------------------------------------- a part of what the files hold

JOB = """
name: tiny
global_batch: 64
seed: 3
epochs: 5
model: {name: van_b0, classes: 4}
engine: {micro_batch: 8, zero_stage: 2}
"""


@pytest.fixture
def whole_job(tmp_path: Path) -> Path:
    """A training job's file, with its data in DATA/train."""
    synthesize(tmp_path / "data", classes=2, train=4, val=2)
    return write(tmp_path / "job.yaml", f"{JOB}data: {{train: {tmp_path}/data/train, flip: 0.25}}\n")


def load_data(path: Path, *overrides: str) -> JobData:
    return config_files.load(JobData, path, overrides, invalid_data, sections=["data"])


def test_keys_of_others_are_passed_over(whole_job: Path) -> None:
    config = load_data(whole_job, "data.window=7")
    assert (config.seed, config.global_batch, config.engine.micro_batch) == (3, 64, 8)
    assert (config.data.flip, config.data.window, config.data.mixup) == (0.25, 7, 0.8)


def test_what_refers_to_a_key_of_others(whole_job: Path) -> None:
    assert load_data(whole_job, "data.cache=/scratch/${name}-${model.classes}").data.cache == "/scratch/tiny-4"


def test_mistakes_in_own_keys_are_told_as_ever(whole_job: Path) -> None:
    path = write(whole_job.parent / "bad.yaml", "base: job.yaml\ndata: {flp: 1, mixup: -1, val: nowhere}\nseed: x\nengine: 3\n")
    with pytest.raises(ConfigError) as caught:
        load_data(path, "engine.micro_batch=3", "data.lane=4", "global_batch.x=1", "optim.lr=1")
    assert caught.value.problems == [
        f"data.flp = 1 ({path}): unknown key; did you mean data.flip?",
        f"seed = x ({path}): must be a whole number",
        f"engine = 3 ({path}): is a section; set one of engine.device, engine.micro_batch",
        "data.lane = 4 (command line): unknown key; did you mean data.lanes?",
        "global_batch.x = 1 (command line): unknown key; did you mean global_batch?",
        # What the command itself is told must be for it.
        "optim.lr = 1 (command line): unknown key; see data/settings.py for all keys",
        f"data.val = nowhere ({path}): no such folder; make it with: python -m data pack IMAGES . --split nowhere",
        f"data.mixup = -1.0 ({path}): must be at least 0 and finite",
        "engine.micro_batch = 3 (command line): must be even: mixup and cutmix mix neighbours in pairs",
    ]
