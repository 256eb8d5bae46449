"""A job's settings: errors, batch sizes, changes on resume, the config command and the recipes of the job files."""

import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import yaml

from data.common.fields import settings_of
from data.synthetic.synthesize import synthesize
from pretrain import config as settings
from pretrain.config import Config, ConfigError, accumulation, load, save
from pretrain.config_command import listing, markdown, resolved
from tests.support import REPOSITORY, config_errors
from tests.support.config_errors import write

JOB = """
name: tiny
global_batch: 64
epochs: 3
model: {name: van_b0, classes: 4}
optim: {lr: 1e-3}
"""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DATASET/train and DATASET/val; not to be changed."""
    folder = tmp_path_factory.mktemp("data") / "packed"
    synthesize(folder, classes=4, train=8, val=4)
    return folder


@pytest.fixture
def job(tmp_path: Path, dataset: Path) -> Path:
    """A file that loads."""
    return write(tmp_path / "job.yaml", f"{JOB}\ndata: {{train: {dataset / 'train'}}}\n")


problems, the_problem = partial(config_errors.problems, load), partial(config_errors.the_problem, load)


# ---------------------------------------------------------------- what is wrong with a value


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        # unknown keys
        ("engine.zero_stag", "1", "unknown key; did you mean engine.zero_stage?"),
        ("microbatch", "1", "unknown key; did you mean engine.micro_batch?"),
        ("model.weight_decay", "0.1", "unknown key; did you mean optim.weight_decay?"),
        ("zebra", "1", "unknown key; docs/configuration.md lists all keys"),
        # wrong types
        ("global_batch", "1.5", "must be a whole number"),
        ("steps", "soon", "must be a whole number or null"),
        ("data.val_except", "n04399382", "must be a list of texts"),
        ("data.val_except", "[a, [b]]", "must be a list of texts"),
        ("data.mean", "[0.5, 0.5]", "must be a list of 3 numbers"),
        ("engine", "3", "is a section; set one of engine.device, engine.micro_batch, "),
        # not one of the choices
        ("engine.precision", "fp23", "must be one of bf16, fp16, fp32; did you mean fp32?"),
        # of the right type, but they can't work
        ("global_batch", "0", "must be more than 0"),
        ("epochs", "inf", "must be finite"),
        ("run.export", "[timm, pth]", "must be of timm, official, mmseg, mmpretrain, hf"),
        ("run.keep_best", "top1", "needs data.val to evaluate on"),
        ("data.eval_crop", "0.0", "must be more than 0 and at most 1"),
        ("data.crop_area", "[1.0, 0.08]", "must be two fractions of an area, the smaller first"),
        ("engine.micro_batch", "3", "must be even: mixup and cutmix mix neighbors in pairs"),
        ("model.init_from", "nowhere.pth", "no such file or run directory"),
        ("profile", "7", "must be START:STOP, two whole numbers of steps"),
        ("profile", "300:200", "is empty: START must be less than STOP"),
    ],
)
@pytest.mark.parametrize("place", ["file", "command line"])
def test_a_bad_value_is_named_with_where_it_was_set(tmp_path: Path, job: Path, key: str, value: str, problem: str, place: str) -> None:
    if place == "file":
        nested = "".join(f"{'  ' * depth}{part}:\n" for depth, part in enumerate(key.split(".")))[:-1] + f" {value}\n"
        path = write(tmp_path / "bad.yaml", f"base: job.yaml\n{nested}")
        source, problem_there = f"{path}:{len(key.split('.')) + 1}", the_problem(path)
    else:
        source, problem_there = "command line", the_problem(job, f"{key}={value}")
    assert problem_there.startswith(f"{key} = {value} ({source}): {problem}")


def test_without_mixing_a_micro_batch_may_be_odd(job: Path) -> None:
    assert load(job, ["engine.micro_batch=3", "data.mixup=0", "data.cutmix=0"]).engine.micro_batch == 3


def test_missing_folders_name_the_command_that_makes_them(tmp_path: Path, job: Path, dataset: Path) -> None:
    nowhere, empty = tmp_path / "nowhere", tmp_path / "empty"
    empty.mkdir()
    make = f"make it with: python -m data pack IMAGES {tmp_path} --split"
    assert the_problem(job, f"data.train={nowhere}") == f"data.train = {nowhere} (command line): no such folder; {make} nowhere"
    assert the_problem(job, f"data.val={empty}") == f"data.val = {empty} (command line): no dataset.json in it; {make} empty"
    assert load(job, [f"data.val={dataset / 'val'}"]).data.val == str(dataset / "val")


def test_a_run_with_a_checkpoint_does_not_need_the_weights_it_started_from(tmp_path: Path, job: Path) -> None:
    settings = [f"run.dir={tmp_path / 'run'}", "model.init_from=gone.pth"]
    assert the_problem(job, *settings) == "model.init_from = gone.pth (command line): no such file or run directory"
    (tmp_path / "run" / "checkpoints" / "step-000000001").mkdir(parents=True)
    assert load(job, settings).model.init_from == "gone.pth"


def test_settings_that_conflict_with_graphs_are_named(job: Path) -> None:
    assert load(job, ["model.graphs=true", "engine.zero_stage=0"]).model.graphs
    found = the_problem(job, "model.graphs=true", "engine.zero_stage=2", "engine.sync_bn=true", "model.checkpoint_stages=[1]")
    assert found.endswith("can't be combined with engine.sync_bn, model.checkpoint_stages, engine.zero_stage 2 or 3")


# ---------------------------------------------------------------- there and back


def test_profiled_steps_are_a_range() -> None:
    assert settings.profiled_steps("200:205") == range(200, 205)
    assert len(settings.profiled_steps(None)) == 0


# ---------------------------------------------------------------- resume with other settings

ASKS = ", or add --force-config to resume with the changed settings"
FIXED = ", which can start from these weights with model.init_from={}; {} can't change during a run"


@pytest.mark.parametrize(
    ("override", "line", "advice"),
    [
        ("optim.lr=2e-3", "optim.lr: 0.001 -> 0.002", ASKS),
        ("optim.betas=[0.9,0.99]", "optim.betas: [0.9, 0.999] -> [0.9, 0.99]", ASKS),
        ("model.kwargs.drop_rate=0.1", "model.kwargs: {} -> {drop_rate: 0.1}", ASKS),
        ("model.classes=5", "model.classes: 4 -> 5", FIXED),
    ],
)
def test_changed_settings_are_confirmed(tmp_path: Path, job: Path, override: str, line: str, advice: str) -> None:
    save(load(job), tmp_path / "config.yaml")
    with pytest.raises(ValueError, match=f"^{tmp_path} was trained with other settings:") as caught:
        settings.confirm(load(job, [override]), tmp_path / "config.yaml", force=False)
    advice = advice.format(tmp_path, override.partition("=")[0])
    assert str(caught.value).splitlines()[1:] == [f"  {line}", f"give this job a run.dir of its own{advice}"]
    assert settings.confirm(load(job, [override]), tmp_path / "config.yaml", force=True) == [line]


def test_settings_of_machine_and_place_may_change(tmp_path: Path, job: Path, dataset: Path) -> None:
    save(load(job), tmp_path / "config.yaml")
    moved = ["engine.zero_stage=3", "engine.micro_batch=2", "engine.device=cpu", "run.dir=elsewhere", "run.keep=9", "run.eval_every=2"]
    moved += ["model.kernels=auto", f"data.train={dataset}/../packed/train", f"data.val={dataset / 'val'}", "data.read_threads=9"]
    assert settings.confirm(load(job, moved), tmp_path / "config.yaml", force=False) == []


def test_a_setting_that_the_saved_file_lacks_had_its_default(tmp_path: Path, job: Path) -> None:
    save(load(job), tmp_path / "config.yaml")
    old = yaml.safe_load((tmp_path / "config.yaml").read_text())
    del old["data"]["flip"], old["optim"]["label_smoothing"]
    old["optim"]["gone"] = 1
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(old))
    assert settings.confirm(load(job), tmp_path / "config.yaml", force=False) == []
    assert settings.confirm(load(job, ["data.flip=0"]), tmp_path / "config.yaml", force=True) == ["data.flip: 0.5 -> 0.0"]


def test_settings_that_decide_the_samples_are_fixed() -> None:
    assert {key for key, each in settings_of(Config).items() if each.resume == "fixed"} == {
        "seed", "global_batch", "epochs", "steps", "samples", "model.name", "model.classes", "data.lanes", "data.window", "data.repeats",
    }  # fmt: skip


# ---------------------------------------------------------------- the config command


def test_the_reference_page_is_up_to_date() -> None:
    assert (REPOSITORY / "docs" / "configuration.md").read_text() == markdown(), "make docs"


def test_every_setting_is_documented_by_a_sentence() -> None:
    for key, each in settings_of(Config).items():
        assert re.fullmatch(r"[A-Z$].*[.]", each.meaning, re.IGNORECASE), key


def test_the_list_is_searched_by_key_and_meaning() -> None:
    lines = listing("warm-up")
    assert [line.partition(":")[0] for line in lines[::2]] == [f"optim.warmup_{end}" for end in ("lr", "epochs", "steps", "samples")]
    assert listing("clip_grad")[0] == "optim.clip_grad: a number, at least 0; default 0.0; on resume: asks"
    with pytest.raises(ValueError, match="no setting has 'zebra'"):
        listing("zebra")


def test_resolved_settings_name_their_places(tmp_path: Path, job: Path) -> None:
    path = write(tmp_path / "more.yaml", "base: job.yaml\n\ndata: {train: /not/on/this/node}\n")
    lines = resolved(path, ["name=1.10", "data.val=null"])
    assert len(lines) == len(settings_of(Config))
    for line in (
        "name = 1.10    (command line)", "run.dir = runs/1.10    (default)", f"data.train = /not/on/this/node    ({path}:3)",
    ):  # fmt: skip
        assert line in lines


def run_without_torch(job: Path, *arguments: str, rank: int = 0) -> subprocess.CompletedProcess:
    """Runs a command where importing torch ends the process."""
    write(job.parent / "broken" / "torch.py", "raise SystemExit('torch was imported')\n")
    environment = os.environ | {"RANK": str(rank), "PYTHONPATH": str(job.parent / "broken")}
    command = [sys.executable, "-m", "pretrain", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_the_config_command_imports_no_torch(job: Path) -> None:
    for arguments, line in ((["--list", "clip"], "optim.clip_grad: "), ([str(job), "seed=3"], "seed = 3    (command line)")):
        ended = run_without_torch(job, "config", *arguments)
        assert (ended.returncode, ended.stderr) == (0, "")
        assert line in ended.stdout


@pytest.mark.parametrize("rank", [0, 1])
def test_wrong_settings_end_the_process_before_torch_is_imported(job: Path, rank: int) -> None:
    ended = run_without_torch(job, "train", str(job), "bad.key=1", "engine.zero_stage=9", rank=rank)
    assert (ended.returncode, ended.stdout) == (2, "")
    message = (
        f"error: {job}: 2 problems\n"
        "  bad.key = 1 (command line): unknown key; docs/configuration.md lists all keys\n"
        "  engine.zero_stage = 9 (command line): must be one of 0, 1, 2, 3\n"
    )
    assert ended.stderr == (message if rank == 0 else "")


# ---------------------------------------------------------------- batch sizes


def sizes(job: Path, global_batch: int, micro_batch: int) -> Config:
    return load(job, [f"global_batch={global_batch}", f"engine.micro_batch={micro_batch}"])


@pytest.mark.parametrize(
    ("global_batch", "micro_batch", "ranks", "expected"),
    [(8192, 64, 64, 2), (8192, 64, 128, 1), (512, 32, 1, 16), (12, 2, 3, 2), (6, 6, 1, 1)],
)
def test_accumulation_fills_the_global_batch(job: Path, global_batch: int, micro_batch: int, ranks: int, expected: int) -> None:
    assert accumulation(sizes(job, global_batch, micro_batch), ranks) == expected


@pytest.mark.parametrize(
    ("global_batch", "micro_batch", "ranks", "micro_batches", "rank_counts", "batches"),
    [
        (8192, 96, 64, [64, 128], [], [6144]),  # 96 has a factor of 3: no number of ranks will do
        (8192, 64, 48, [], [32, 64], [9216]),
        (4, 2, 8, [], [2], [16]),
    ],
)
def test_an_indivisible_global_batch_names_sizes_that_divide(
    job: Path, global_batch: int, micro_batch: int, ranks: int, micro_batches: list[int], rank_counts: list[int], batches: list[int]
) -> None:
    with pytest.raises(ConfigError) as caught:
        accumulation(sizes(job, global_batch, micro_batch), ranks)
    (problem,) = caught.value.problems
    expected = [f"global_batch = {global_batch} can't be divided over {ranks} ranks of engine.micro_batch = {micro_batch}"]
    expected += [f"with {ranks} ranks, engine.micro_batch={' or '.join(map(str, micro_batches))}"] if micro_batches else []
    expected += [f"with engine.micro_batch={micro_batch}, {' or '.join(map(str, rank_counts))} ranks"] if rank_counts else []
    expected += [f"or another recipe with global_batch={batches[0]}"]
    assert problem.split("; ") == expected
    # The named values divide.
    for other in micro_batches:
        assert accumulation(sizes(job, global_batch, other), ranks) * other * ranks == global_batch
    for other in rank_counts:
        assert accumulation(sizes(job, global_batch, micro_batch), other) * micro_batch * other == global_batch
    assert accumulation(sizes(job, batches[0], micro_batch), ranks) * micro_batch * ranks == batches[0]


# ---------------------------------------------------------------- the recipes

# As the ImageNet-22K and fine-tuning scripts have them; epochs and warm-up in epochs.
IN22K = {
    "global_batch": 8192, "epochs": 90, "model.classes": 21841, "data.image_size": 224, "data.mixup": 0.8, "data.cutmix": 1.0,
    "data.mix_switch": 0.5, "data.flip": 0.5, "data.crop_area": (0.08, 1.0), "data.mean": (0.485, 0.456, 0.406),
    "data.std": (0.229, 0.224, 0.225), "data.eval_resize": "crop", "data.eval_crop": 0.875, "optim.lr": 4e-3, "optim.min_lr": 1e-6,
    "optim.warmup_lr": 1e-6, "optim.warmup_epochs": 5, "optim.weight_decay": 0.05, "optim.label_smoothing": 0.1,
    "optim.betas": (0.9, 0.999), "optim.eps": 1e-8, "optim.clip_grad": 0, "engine.ema_decay": 0, "engine.precision": "bf16",
}  # fmt: skip
FT_224 = IN22K | {
    "global_batch": 512, "epochs": 30, "model.classes": 1000, "data.mixup": 0, "data.cutmix": 0, "optim.lr": 5e-5,
    "optim.warmup_epochs": 0, "optim.weight_decay": 1e-8,
}  # fmt: skip
FT_384 = FT_224 | {"data.image_size": 384, "data.eval_resize": "squash"}
# What differs: recipe, drop path, and ranks, micro-batch and accumulation of the authors' runs.
JOBS = {
    f"van_{size}_in22k{suffix}": {**recipe, "model.name": f"van_{size}", "model.drop_path": drop_path, "batches": batches}
    for size, fine_tuning_drop_path in (("b3", 0.2), ("b4", 0.2), ("b5", 0.2), ("b6", 0.3))
    for suffix, recipe, drop_path, batches in (
        ("", IN22K, 0.1, (64, 64, 2)),
        ("_ft_in1k_224", FT_224, fine_tuning_drop_path, (16, 32, 1)),
        ("_ft_in1k_384", FT_384, fine_tuning_drop_path, (32, 16, 1)),
    )
}
EXAMPLES = ("demo", "figures", "other_figures")


def test_the_table_has_all_job_files() -> None:
    assert {path.stem for path in (REPOSITORY / "configs").glob("*.yaml")} == {*JOBS, *EXAMPLES}


@pytest.mark.parametrize("name", [*JOBS, *EXAMPLES])
def test_a_job_file_holds_its_recipe(name: str, dataset: Path) -> None:
    places = [f"data.train={dataset / 'train'}", f"data.val={dataset / 'val'}", "model.init_from=null"]
    path = REPOSITORY / "configs" / f"{name}.yaml"
    config = load(path, places)
    assert (config.name, config.run.dir) == (name, f"runs/{name}")
    if name in EXAMPLES:
        assert accumulation(config, 2) == 1
        return
    *expected, (ranks, micro_batch, steps) = JOBS[name].values()
    values = settings.flat(config)
    assert [values[key] for key in JOBS[name] if key != "batches"] == [list(v) if isinstance(v, tuple) else v for v in expected]
    assert (config.engine.micro_batch, accumulation(config, ranks)) == (micro_batch, steps)
    if "_ft_" in name:  # starts from what the pretraining job of the same variant leaves
        start = f"runs/{name.partition('_ft_')[0]}"
        with pytest.raises(ConfigError, match=rf"model\.init_from = {start} \({path}:\d+\): no such file or run directory"):
            load(path, places[:2])
