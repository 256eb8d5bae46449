"""Settings files: layers, text as typed, problems of bad files, and schemas that are a part of the settings in the files."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest

from data.common import config_files
from data.common.config_files import ConfigError
from data.common.fields import MISSING, at_least, positive, setting
from data.settings import load_job
from data.synthetic.synthesize import synthesize
from tests.support import config_errors
from tests.support.config_errors import write


@dataclass
class Optim:
    lr: float = setting(MISSING, "Learning rate.", positive)
    decay: float = setting(0.05, "Weight decay.", at_least(0))
    betas: tuple[float, float] = setting((0.9, 0.999), "Decay of the moments.")


@dataclass
class Job:
    name: str = setting(MISSING, "Name.")
    seed: int = setting(0, "Seed.")
    epochs: float = setting(MISSING, "Length.", positive)
    device: Literal["cpu", "cuda"] = setting("cpu", "Device.")
    fast: bool = setting(False, "Speed.")
    dir: str = setting("runs/${name}", "Folder.")
    cache: str | None = setting(None, "Cache.")
    labels: list[str] = setting([], "Labels.")
    kwargs: dict[str, Any] = setting({}, "Arguments.")
    optim: Optim = field(default_factory=Optim)


def conflicts(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if values.get("optim.decay", 0) > values.get("optim.lr", 1e9):
        yield "optim.decay", "must be below optim.lr"


def load(path: Path, overrides: list[str] | tuple[str, ...] = ()) -> Job:
    return config_files.resolve(Job, path, overrides, conflicts)[0]


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """A file that loads."""
    return write(tmp_path / "job.yaml", "name: tiny\nepochs: 3\noptim: {lr: 1}\n")


problems, the_problem = partial(config_errors.problems, load), partial(config_errors.the_problem, load)


# ---------------------------------------------------------------- layers


def test_later_files_win_and_the_command_line_wins_last(tmp_path: Path, job: Path) -> None:
    job.rename(tmp_path / "basic.yaml")
    write(tmp_path / "parts" / "middle.yaml", "base: ../basic.yaml\nseed: 1\nepochs: 5\ndevice: cuda\n")
    last = write(tmp_path / "last.yaml", "base: parts/middle.yaml\nseed: 2\noptim: {decay: 0.3}\n")
    config = load(last, ["optim.decay=0.4", "optim.betas=[0.5,0.6]", "optim.decay=0.5"])
    assert config.optim.lr == 1  # of the first
    assert (config.epochs, config.device) == (5, "cuda")  # of the second
    assert config.seed == 2  # of the third
    assert config.optim == Optim(1, 0.5, (0.5, 0.6))  # of the command line
    assert config.dir == "runs/tiny"


def test_each_value_has_the_place_that_set_it(tmp_path: Path, job: Path) -> None:
    last = write(tmp_path / "last.yaml", "base: job.yaml\n\noptim:\n  decay: 0.3\n")
    places = config_files.resolve(Job, last, ["seed=1"], conflicts)[1]
    assert [places[key] for key in ("name", "optim.decay", "seed", "dir")] == [f"{job}:1", f"{last}:4", "command line", "default"]


def test_mappings_are_merged_by_name(tmp_path: Path, job: Path) -> None:
    last = write(tmp_path / "last.yaml", "base: job.yaml\nkwargs: {a: 1, b: {c: 1e-3}}\n")
    config = load(last, ["kwargs.b=yes", "kwargs.d=[1_000, '1', x, null, true]", "kwargs.e=2026-12-01", "kwargs={f: {}}"])
    assert config.kwargs == {"a": 1, "b": True, "d": [1000, "1", "x", None, True], "e": "2026-12-01", "f": {}}
    assert load(last).kwargs == {"a": 1, "b": {"c": 0.001}}


def test_values_of_a_mapping_keep_their_types(tmp_path: Path, job: Path) -> None:
    config = load(job, ["kwargs.quoted=['1e3', 'true', '${name}']", "kwargs.plain=[1e3, 010, true, ~, inf, .inf, 2026-12-01, yes]"])
    assert config.kwargs["quoted"] == ["1e3", "true", "tiny"]
    assert config.kwargs["plain"] == [1000.0, 8, True, None, "inf", math.inf, "2026-12-01", True]
    assert load(write(tmp_path / "saved.yaml", config_files.to_yaml(config))) == config


def test_circular_base_is_an_error(tmp_path: Path) -> None:
    one = write(tmp_path / "one.yaml", "base: two.yaml\n")
    write(tmp_path / "two.yaml", "base: ./one.yaml\n")
    with pytest.raises(ConfigError, match=rf"{one}: 1 problem\n.*base: is circular, named by .*two\.yaml"):
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
        ("base: [a.yaml, b.yaml]\n", "base = [a.yaml, b.yaml] (PATH:1): must be the name of one file"),
        ("epochs: 1\nepochs: 2\n", "duplicate key epochs (PATH:2)"),
        ("a: b: c\n", "line 1, column 5"),
        ("- epochs\n", "not a mapping of keys to values"),
        ("labels: &x [*x]\n", "not valid YAML: maximum recursion depth"),
        ("kwargs: {a: 1, a: 2}\n", "found duplicate key a"),
        ("a: !!python/object/apply:os.getcwd []\n", "unknown key"),
    ],
)
def test_file_without_settings_is_an_error(tmp_path: Path, text: str, problem: str) -> None:
    path = write(tmp_path / "job.yaml", text)
    with pytest.raises(ConfigError, match=f"^{path}: ") as caught:
        load(path)
    assert problem.replace("PATH", str(path)) in caught.value.problems[0]


@pytest.mark.parametrize("text", ["epochs", "=3", "", "labels=[a", "kwargs.x={"])
def test_text_that_is_no_override_is_an_error(job: Path, text: str) -> None:
    assert the_problem(job, text).startswith(f"{text!r} (command line): ")


def test_every_problem_is_reported_once_with_its_place(tmp_path: Path) -> None:
    recipe = write(tmp_path / "recipe.yaml", "epochs: many\noptim:\n  lr: -1\n  beta: 3\nseed: []\n")
    path = write(tmp_path / "job.yaml", "base: recipe.yaml\nname: tiny\noptim: 3\ndevice: cud\n")
    assert problems(path, "epochs", "seed=x", "zebra=1") == [
        "'epochs' (command line): not of the form key=value",
        f"epochs = many ({recipe}:1): must be a number",
        f"optim.beta = 3 ({recipe}:4): unknown key; did you mean optim.betas?",
        f"optim = 3 ({path}:3): is a section; set one of optim.lr, optim.decay, optim.betas",
        f"device = cud ({path}:4): must be one of cpu, cuda; did you mean cuda?",
        "seed = x (command line): must be a whole number",
        "zebra = 1 (command line): unknown key; docs/configuration.md lists all keys",
        f"optim.lr = -1.0 ({recipe}:3): must be more than 0",
    ]


def test_problem_is_one_line_without_control_characters(tmp_path: Path, job: Path) -> None:
    assert the_problem(job, "device=\x1b[2Ja\nb") == "device = \\x1b[2Ja\\nb (command line): must be one of cpu, cuda"


def test_conflict_is_a_problem_of_one_key(job: Path) -> None:
    assert problems(job, "optim.decay=3", "optim.lr=2") == ["optim.decay = 3.0 (command line): must be below optim.lr"]


# ---------------------------------------------------------------- text as typed

TYPED = ["2026_12", "010", "1.10", "1e3", "yes", "0x1f", "1:30", ".5", "2026-12-01", "true", "~", "????", "-0", ".inf", "=", "<<"]
TYPED += ["a b", "a=b=c", "C:\\new", "größe", "a'b", 'a"b', "a, b", "http://h:1/a?b=c#d"]
ONLY_ON_THE_COMMAND_LINE = [
    "a #b",
    " a ",
    "[a",
    "{a}",
    "'a'",
    "a: b",
    "*a",
    "!a",
    "- a",
    "|",
    "???",
    "\\???",
    "${nam}",
    "x${",
    "a\\${x}",
    "a\nb",
]


@pytest.mark.parametrize("text", [*TYPED, *ONLY_ON_THE_COMMAND_LINE, "null"])
def test_text_on_the_command_line_is_taken_as_typed(tmp_path: Path, job: Path, text: str) -> None:
    config = load(job, [f"name={text}", f"cache={text}"])
    assert (config.name, config.cache) == (text, None if text == "null" else text)
    assert load(write(tmp_path / "saved.yaml", config_files.to_yaml(config))) == config
    assert config_files.from_dict(Job, asdict(config)) == config
    assert config_files.override(config, []) == config


@pytest.mark.parametrize("text", [*TYPED, "null"])
def test_text_in_a_file_is_taken_as_typed(tmp_path: Path, job: Path, text: str) -> None:
    is_null = text in ("null", "NULL", "~")
    config = load(write(tmp_path / "more.yaml", f"base: job.yaml\ndir: {text}\ncache: {text}\nlabels:\n- {text}\n- x\n"))
    assert (config.dir, config.cache, config.labels) == (text, None if is_null else text, [text, "x"])
    if not {"'", "\\"} & set(text):
        config = load(write(tmp_path / "more.yaml", f"base: job.yaml\ndir: '{text}'\ncache: '{text}'\n"))
        assert (config.dir, config.cache) == (text, text)


def test_text_of_lists_is_taken_as_typed(job: Path) -> None:
    assert load(job, ["labels=[010, 1.10, yes, 'a, b', ~, n1:2]"]).labels == ["010", "1.10", "yes", "a, b", "~", "n1:2"]


def test_yaml_comments_and_quotes_apply_in_a_file(tmp_path: Path, job: Path) -> None:
    assert load(write(tmp_path / "more.yaml", "base: job.yaml\ndir: a #b\n")).dir == "a"
    assert load(write(tmp_path / "more.yaml", 'base: job.yaml\ndir: "a #\\t"\n')).dir == "a #\t"


def test_empty_text_is_an_error(tmp_path: Path, job: Path) -> None:
    assert the_problem(job, "name=") == "name =  (command line): is empty"
    assert the_problem(job, "cache=") == "cache =  (command line): is empty"
    path = write(tmp_path / "more.yaml", "base: job.yaml\nname:\ncache:\n")
    assert the_problem(path) == f"name =  ({path}:2): is empty"


NUMBERS = {"seed": {"010": 10, "1_000": 1000, "-3": -3}, "epochs": {"1e-3": 0.001, ".5": 0.5, "5": 5}}
NO_NUMBERS = {"seed": ("0x1f", "1.0", "1:30", "yes", ""), "epochs": ("inf", ".inf", "nan", "1:30")}


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [(key, text, NUMBERS[key].get(text)) for key in NUMBERS for text in (*NUMBERS[key], *NO_NUMBERS[key])],
)
def test_numbers_are_decimal_and_finite(tmp_path: Path, job: Path, key: str, text: str, value: float | None) -> None:
    path = write(tmp_path / "more.yaml", f"base: job.yaml\n{key}: {text}\n")
    for arguments in ((job, [f"{key}={text}"]), (path, [])):
        if value is None:
            assert the_problem(arguments[0], *arguments[1]).endswith((": must be a whole number", ": must be a number", ": must be finite"))
        else:
            assert getattr(load(*arguments), key) == value


def test_booleans_are_words_of_yaml(job: Path) -> None:
    assert [load(job, [f"fast={text}"]).fast for text in ("Yes", "on", "1", "false", "NO", "0")] == [True] * 3 + [False] * 3
    assert the_problem(job, "fast=maybe") == "fast = maybe (command line): must be true or false"


# ---------------------------------------------------------------- references


def test_references_are_resolved(tmp_path: Path, job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRATCH", "/scratch/${x}")
    path = write(
        tmp_path / "more.yaml", "base: job.yaml\ndir: out/${name}-${seed}\ncache: ${oc.env:SCRATCH}/${dir}\noptim: {decay: '${optim.lr}'}\n"
    )
    config = load(path, ["seed=007", "name=${epochs}"])
    assert (config.dir, config.cache, config.optim.decay) == ("out/3.0-7", "/scratch/${x}/out/3.0-7", 1)
    assert load(path, ["dir=${name}/\\${name}/${nam}/\\${nam}"]).dir == "tiny/${name}/${nam}/\\${nam}"
    config = load(path, ["dir=${oc.env:NOWHERE,there}", "kwargs.a=${name}", "kwargs.b=${nam}"])
    assert (config.dir, config.kwargs) == ("there", {"a": "tiny", "b": "${nam}"})
    assert load(write(path, "base: job.yaml\ndir: \\${nam}-\\${name}\n")).dir == "${nam}-${name}"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("out/${nam}", "Interpolation key 'nam' not found; did you mean ${name}?"),
        ("out/${zebra.x}", "Interpolation key 'zebra.x' not found"),
        ("out/${name", "no viable alternative at input '${name'"),
        ("${dir}", "Recursive interpolation detected"),
        ("${env:HOME}", "Unsupported interpolation type env"),
        ("${oc.env:NOWHERE}", "KeyError raised while resolving interpolation: \"Environment variable 'NOWHERE' not found\""),
    ],
)
def test_broken_reference_is_an_error(tmp_path: Path, job: Path, text: str, problem: str) -> None:
    path = write(tmp_path / "more.yaml", f"base: job.yaml\ncache: ~\ndir: '{text}'\n")
    assert f"dir = {text} ({path}:3): {problem}" in problems(path)


def test_missing_value_is_an_error(tmp_path: Path, job: Path) -> None:
    path = write(tmp_path / "more.yaml", "base: job.yaml\ndir: ???\nlabels:\n- ???\n")
    assert problems(path) == [f"{key}: no value; set it in {path} or as {key}=…" for key in ("dir", "labels")]
    assert load(path, ["dir=x", "labels=[]"]).dir == "x"


def test_a_reference_to_a_missing_setting_is_not_reported_twice(tmp_path: Path) -> None:
    path = write(tmp_path / "job.yaml", "epochs: 3\noptim: {lr: 1}\ncache: ${name}\n")
    assert problems(path) == [f"name: no value; set it in {path} or as name=…"]


# ---------------------------------------------------------------- saved settings


def test_settings_of_another_version_are_read(tmp_path: Path, job: Path) -> None:
    values = asdict(load(job)) | {"gone": 1, "optim": {"lr": 2, "gone": {"deeper": 1}}}
    del values["seed"]
    config = config_files.from_dict(Job, values)
    assert (config.seed, config.optim) == (0, Optim(lr=2))
    path = write(tmp_path / "saved.yaml", config_files.to_yaml(values))
    saved = config_files.read_saved(Job, path)
    assert (saved["seed"], saved["optim.lr"], saved["dir"]) == (0, 2, "runs/tiny")


def test_override_checks_what_it_sets(job: Path) -> None:
    config = config_files.override(load(job), ["seed=2", "kwargs.a=1"])
    assert (config.seed, config.epochs, config.kwargs) == (2, 3, {"a": 1})
    config.optim.lr = -1  # not set here, so not checked here
    with pytest.raises(ConfigError) as caught:
        config_files.override(config, ["sed=1", "epochs=-1", "y"])
    assert caught.value.problems == [
        "'y' (command line): not of the form key=value",
        "sed = 1 (command line): unknown key; did you mean seed?",
        "epochs = -1.0 (command line): must be more than 0",
    ]


# ---------------------------------------------------------------- a part of the settings in the files

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


def test_keys_of_other_schemas_are_skipped(whole_job: Path) -> None:
    config = load_job(whole_job, ["data.window=7"])
    assert (config.seed, config.global_batch, config.engine.micro_batch) == (3, 64, 8)
    assert (config.data.flip, config.data.window, config.data.mixup) == (0.25, 7, 0.8)


def test_references_to_keys_of_other_schemas_are_resolved(whole_job: Path) -> None:
    assert load_job(whole_job, ["data.cache=/scratch/${name}-${model.classes}"]).data.cache == "/scratch/tiny-4"


def test_problems_of_the_known_keys_are_all_reported(whole_job: Path) -> None:
    path = write(whole_job.parent / "bad.yaml", "base: job.yaml\ndata: {flp: 1, mixup: -1, val: nowhere}\nseed: x\nengine: 3\n")
    overrides = ["engine.micro_batch=3", "data.lane=4", "global_batch.x=1", "optim.lr=1"]
    assert config_errors.problems(load_job, path, *overrides) == [
        f"data.flp = 1 ({path}:2): unknown key; did you mean data.flip?",
        f"seed = x ({path}:3): must be a whole number",
        f"engine = 3 ({path}:4): is a section; set one of engine.device, engine.micro_batch",
        "data.lane = 4 (command line): unknown key; did you mean data.lanes?",
        "global_batch.x = 1 (command line): unknown key; did you mean global_batch?",
        # A file may hold settings of training; the command line of a data command may not.
        "optim.lr = 1 (command line): unknown key; docs/configuration.md lists all keys",
        f"data.val = nowhere ({path}:2): no such folder; make it with: python -m data pack IMAGES . --split nowhere",
        f"data.mixup = -1.0 ({path}:2): must be at least 0",
        "engine.micro_batch = 3 (command line): must be even: mixup and cutmix mix neighbors in pairs",
    ]
