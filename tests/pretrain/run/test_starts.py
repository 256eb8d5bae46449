"""Whole jobs of two ranks: the records of a start, settings that it refuses, a trace of some steps, memory that is too small."""

import gzip
import itertools
import json
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import torch

from data.dataset.index import open_index
from pretrain import checkpoint
from pretrain.run.provenance import diff, variables
from tests.faults import jobs
from tests.support.jobs import differing, final_state, metrics

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(four_classes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder of a job of seven steps; not to be changed."""
    folder = tmp_path_factory.mktemp("finished")
    run(folder, four_classes)
    return folder


def run(folder: Path, four_classes: Path, *options: str, code: int = 0, change: jobs.Change | None = None) -> str:
    """Runs a job whose ranks all end with this exit code; returns its output."""
    before = len((folder / "log").read_text()) if (folder / "log").exists() else 0
    codes = jobs.run(folder, four_classes, *options, change=change).codes
    output = (folder / "log").read_text()[before:]
    assert codes == [code, code], output[-4000:]
    return output


@pytest.fixture(scope="module")
def stopped(four_classes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder of a job whose newest checkpoint is of step 4; not to be changed."""
    folder = tmp_path_factory.mktemp("stopped")
    run(folder, four_classes, "run.keep=9")
    for later in checkpoint.list_checkpoints(folder / "run" / "checkpoints"):
        if later.name > "step-000000004":
            shutil.rmtree(later)
    return folder


# ---------------------------------------------------------------- records


def test_a_start_records_everything_needed_to_repeat_it(finished: Path, four_classes: Path) -> None:
    start = finished / "run" / "starts" / "0001"
    assert (start / "config.yaml").read_text() == (finished / "run" / "config.yaml").read_text()
    found = json.loads((start / "environment.json").read_text())
    assert found["command"].startswith("python -m pretrain train ")
    assert f"data.train={four_classes / 'train'}" in found["command"]
    assert found["data"] == {split: open_index(four_classes / split).fingerprint for split in ("train", "val")}
    assert [set(rank) for rank in found["ranks"]] == [{"host"}] * 2
    assert (found["variables"]["WORLD_SIZE"], found["variables"]["SLURM_JOB_ID"]) == ("2", "1")
    packages = (start / "packages.txt").read_text().splitlines()
    assert f"torch=={torch.__version__.partition('+')[0]}" in [package.partition("+")[0] for package in packages]
    assert all("==" in package for package in packages)
    assert (start / "diff.patch").exists()


def test_recorded_variables_have_no_secrets() -> None:
    secrets = {"SLURM_JWT": "x", "WANDB_API_KEY": "x", "AWS_SECRET_ACCESS_KEY": "x", "NCCL_TOKEN": "x", "HOME": "/root"}
    matter = {"SLURM_JOB_ID": "1", "NCCL_DEBUG": "INFO", "CUDA_VISIBLE_DEVICES": "0", "OMP_NUM_THREADS": "1", "RANK": "3", "PATH": "/bin"}
    assert variables(secrets | matter) == dict(sorted(matter.items()))


def test_a_diff_is_complete_or_marked_as_cut(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    (tmp_path / "code.py").write_text("one\n")
    git("add", ".")
    git("commit", "-m", "one")
    (tmp_path / "inner").mkdir()
    assert diff(tmp_path / "inner") == b""
    (tmp_path / "code.py").write_text("two\n")
    patch = diff(tmp_path / "inner")
    git("checkout", "code.py")
    (tmp_path / "changes").write_bytes(patch)
    git("apply", "changes")
    assert (tmp_path / "code.py").read_text() == "two\n"
    (tmp_path / "code.py").write_text("much\n" * 100_000)
    assert len(diff(tmp_path)) < 270_000
    assert diff(tmp_path).endswith(b" bytes in all\n")


# ---------------------------------------------------------------- settings that changed


def test_a_run_resumes_with_other_settings_only_if_forced(stopped: Path, four_classes: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(stopped, tmp_path / "job"))
    changed = ("optim.lr=2e-3", "data.flip=0", f"run.dir={folder / 'run'}")
    output = run(folder, four_classes, *changed, code=2)
    changes = "  data.flip: 0.5 -> 0.0\n  optim.lr: 0.001 -> 0.002\n"
    assert output.count(f"{folder / 'run'} was trained with other settings:\n{changes}give this job a run.dir of its own, ") == 1
    assert "step 5/7" not in output
    assert len(list((folder / "run" / "starts").iterdir())) == 1

    output = run(folder, four_classes, "--force-config", *changed)
    assert "changed by --force-config: optim.lr: 0.001 -> 0.002\n" in output
    assert "resumed at step 4 of 7" in output
    assert [record["lr"] for record in metrics(folder, "train")[-3:]] == pytest.approx(
        [2 * record["lr"] for record in metrics(stopped, "train")[-3:]], rel=0.02
    )
    assert sorted(path.name for path in (folder / "run" / "starts").iterdir()) == ["0001", "0002"]
    assert "lr: 0.002" in (folder / "run" / "config.yaml").read_text()


def test_settings_that_decide_the_samples_can_not_be_forced(stopped: Path, four_classes: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(stopped, tmp_path / "job"))
    output = run(folder, four_classes, "--force-config", "seed=6", code=2)
    assert "belongs to another job: seed was 5, is 6" in output


# ---------------------------------------------------------------- a trace


@pytest.mark.long
def test_a_trace_holds_the_phases_of_its_steps_and_changes_nothing(finished: Path, four_classes: Path, tmp_path: Path) -> None:
    output = run(tmp_path, four_classes, "profile=2:4")
    path = tmp_path / "run" / "profile" / "steps-2-4-rank-0.json.gz"
    assert [found.name for found in path.parent.iterdir()] == [path.name]  # both ranks are of one node
    assert f"profile of steps 2 to 3: {path}\n" in output
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    parts = sorted((event for event in events if event.get("cat") == "user_annotation"), key=lambda event: event["ts"])
    names = [event["name"] for event in parts if event["name"] in ("data", "forward", "backward", "optimizer")]
    assert names == ["data", "forward", "backward", "optimizer"] * 4  # two steps of two micro-steps
    assert Counter(event["name"] for event in events)["aten::conv2d"] > 0
    assert differing(final_state(tmp_path, 7), final_state(finished, 7)) == []
    assert [r["loss"] for r in metrics(tmp_path, "train")] == [r["loss"] for r in metrics(finished, "train")]


# ---------------------------------------------------------------- memory


def too_small_at_first() -> None:
    too_small(0)


def too_small_later() -> None:
    too_small(6)


def too_small(steps: int) -> None:
    """Makes the memory of a GPU of 60 MB run out after so many steps of two micro-steps."""
    from pretrain import train
    from pretrain.monitor import memory

    calls, loss = itertools.count(), train.mixed_cross_entropy

    def out_of_memory(*arguments: object) -> torch.Tensor:
        if next(calls) >= 2 * steps:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return loss(*arguments)  # type: ignore[arg-type]

    train.mixed_cross_entropy = out_of_memory  # type: ignore[assignment]
    memory.measure_memory = lambda device: (30_000_000, 60_000_000)


def test_too_little_memory_for_the_first_step_is_an_error_in_the_settings(four_classes: Path, tmp_path: Path) -> None:
    output = run(tmp_path, four_classes, "engine.micro_batch=4", code=2, change=too_small_at_first)
    assert output.count("out of memory with engine.micro_batch=4: of 0.1 GB ") == 1
    assert "engine.micro_batch=2 should fit, by this estimate; the global batch stays 8" in output
    assert "or model.checkpoint_stages=[0,1,2,3], or engine.zero_stage=2" in output
    assert "Traceback" not in output


def test_memory_that_runs_out_later_is_a_crash(four_classes: Path, tmp_path: Path) -> None:
    codes = jobs.run(tmp_path, four_classes, change=too_small_later).codes
    assert 2 not in codes
    assert 0 not in codes
    assert "OutOfMemoryError: CUDA out of memory" in (tmp_path / "log").read_text()
    assert checkpoint.list_checkpoints(tmp_path / "run" / "checkpoints") != []
