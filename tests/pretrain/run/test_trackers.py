"""A run's records as curves: TensorBoard read back with its own reader, Weights & Biases and MLflow (where installed) offline."""

import json
import threading
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter

from pretrain import config as settings
from pretrain.config import Config
from pretrain.run import trackers
from pretrain.run.log import RunLog
from tests.support.configs import make_config


def config(**run: Any) -> Config:
    return make_config(run=run)


def train(folder: Path, job: Config, first: int, last: int, loss: float) -> None:
    """Makes a start of a run that resumes at step `first`, and records each step to `last`."""
    log = RunLog(folder / "metrics.jsonl")
    log.trackers.open(job, folder, first)
    for step in range(first + 1, last + 1):
        log.record("train", step=step, loss=loss + step, slowest_host="node3", total=9, evaluates=False)
    log.record("evaluation", step=last, ema={"top1": 0.5, "images": 20})
    log.close()


def curve(folder: Path, name: str) -> list[tuple[int, float]]:
    found = EventAccumulator(str(folder / "tensorboard")).Reload()
    return [(event.step, event.value) for event in found.Scalars(name)]


def test_tensorboard_gets_every_number(tmp_path: Path) -> None:
    train(tmp_path, config(), 0, 3, loss=10.0)
    assert curve(tmp_path, "train/loss") == [(1, 11.0), (2, 12.0), (3, 13.0)]
    assert curve(tmp_path, "evaluation/ema/top1") == [(3, 0.5)]
    names = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Tags()["scalars"]
    assert sorted(names) == ["evaluation/ema/images", "evaluation/ema/top1", "train/loss"]


def test_a_run_that_was_cut_short_has_one_curve(tmp_path: Path) -> None:
    train(tmp_path, config(), 0, 5, loss=10.0)
    time.sleep(1.1)  # event files are read in the order of their names, which hold whole seconds
    train(tmp_path, config(), 3, 6, loss=20.0)  # the last checkpoint was of step 3
    assert curve(tmp_path, "train/loss") == [(1, 11.0), (2, 12.0), (3, 13.0), (4, 24.0), (5, 25.0), (6, 26.0)]


@pytest.mark.filterwarnings("ignore:Exception in thread:pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's own
def test_a_record_that_the_disk_refuses_is_logged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the file is opened, and later; the next record is written again."""
    log = RunLog(tmp_path / "metrics.jsonl")
    (tmp_path / "tensorboard").touch()
    log.trackers.open(config(), tmp_path, 0)
    log.record("train", step=1, loss=1.0)
    wait_for_output(capsys, "TensorBoard could not be written: ")
    (tmp_path / "tensorboard").unlink()
    log.record("train", step=2, loss=2.0)
    wait_for_curve(tmp_path, [(2, 2.0)])
    with monkeypatch.context() as patch:
        patch.setattr(RecordWriter, "write", refuse)
        log.record("train", step=3, loss=3.0)
        wait_for_output(capsys, "TensorBoard could not be written: disk full")
    time.sleep(1.1)  # as above
    log.record("train", step=4, loss=4.0)
    log.close()
    assert curve(tmp_path, "train/loss") == [(2, 2.0), (4, 4.0)]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4


def refuse(self: RecordWriter, data: bytes) -> None:
    raise OSError("disk full")


def wait_for_output(capsys: pytest.CaptureFixture[str], text: str) -> None:
    deadline, output = time.monotonic() + 20, ""
    while text not in output:
        assert time.monotonic() < deadline, output
        time.sleep(0.02)
        output += capsys.readouterr().out


def wait_for_curve(folder: Path, expected: list[tuple[int, float]]) -> None:
    deadline = time.monotonic() + 20
    while not list((folder / "tensorboard").glob("*")) or curve(folder, "train/loss") != expected:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_tracker_that_hangs_does_not_delay_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    answered = threading.Event()
    monkeypatch.setattr(trackers.TensorBoard, "write", lambda self, step, scalars: answered.wait(60))
    monkeypatch.setattr(trackers, "CLOSE_S", 0.2)
    log = RunLog(tmp_path / "metrics.jsonl")
    log.trackers.open(config(), tmp_path, 0)
    began = time.monotonic()
    for step in range(1, 1001):
        log.record("train", step=step, loss=1.0)
    log.close()
    assert time.monotonic() - began < 10
    answered.set()
    assert "TensorBoard: not all records were written within 0 s; the others are lost" in capsys.readouterr().out


@pytest.mark.parametrize(("key", "module"), [("run.wandb", "wandb"), ("run.mlflow", "mlflow")])
def test_a_tracker_that_is_not_installed_is_an_error_before_the_start(tmp_path: Path, drawn: Path, key: str, module: str) -> None:
    if find_spec(module):
        pytest.skip(f"{module} is installed")
    (tmp_path / "job.yaml").write_text("name: tiny\nglobal_batch: 4\nepochs: 1\nmodel: {name: van_b0, classes: 10}\noptim: {lr: 1e-3}\n")
    overrides = [f"data.train={drawn / 'train'}", f"run.dir={tmp_path}"]
    settings.load(tmp_path / "job.yaml", overrides)
    with pytest.raises(
        settings.ConfigError, match=rf"{key} = van \(command line\): {module} is not installed: .venv/bin/pip install {module}"
    ):
        settings.load(tmp_path / "job.yaml", [*overrides, f"{key}=van"])


@pytest.mark.skipif(find_spec("mlflow") is None, reason="mlflow is not installed")
def test_mlflow_continues_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'store.db'}")
    train(tmp_path, config(mlflow="van"), 0, 3, loss=10.0)
    train(tmp_path, config(mlflow="van"), 3, 5, loss=10.0)
    client = MlflowClient()
    experiment = client.get_experiment_by_name("van")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["model.name"] == "van_b0"
    found = [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, "train/loss")]
    assert sorted(found) == [(step, 10.0 + step) for step in range(1, 6)]


@pytest.mark.skipif(find_spec("mlflow") is None, reason="mlflow is not installed")
def test_a_store_that_refuses_ends_only_a_first_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://nowhere")
    with pytest.raises(ValueError, match=r"^run.mlflow = van: .*nonsense.*; fix that, or train without it: run.mlflow=null"):
        RunLog(tmp_path / "metrics.jsonl").trackers.open(config(mlflow="van"), tmp_path, 0)
    train(tmp_path, config(mlflow="van"), 3, 4, loss=10.0)
    assert "; continuing without it" in capsys.readouterr().out
    assert curve(tmp_path, "train/loss") == [(4, 14.0)]


@pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_continues_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    train(tmp_path, config(wandb="us/van"), 0, 3, loss=10.0)
    time.sleep(1.1)  # the folders' names hold whole seconds
    train(tmp_path, config(wandb="us/van"), 2, 4, loss=20.0)
    found = json.loads((tmp_path / "trackers.json").read_text())["wandb"]
    assert len(list((tmp_path / "wandb").glob(f"offline-run-*-{found}/run-{found}.wandb"))) == 2
