"""Sends the records of a run to experiment trackers: TensorBoard always, Weights & Biases and MLflow by setting.

RUN/tensorboard       event files, one for each start: tensorboard --logdir runs
run.wandb=PROJECT     or ENTITY/PROJECT; wandb finds its key, server and mode by itself (wandb login, WANDB_MODE=offline)
run.mlflow=EXPERIMENT MLflow finds its store by itself (MLFLOW_TRACKING_URI)

A resumed run continues the same curves: TensorBoard drops the records of an earlier start after the step at which this start resumes, and
RUN/trackers.json keeps the run ids of the other two. A thread sends the records, so neither a slow disk nor an unresponsive server delays
training. Records that can't be written are lost and logged.
"""

import json
import queue
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from data.common.files import open_to_replace
from pretrain import config as settings
from pretrain.config import Config

IDS = "trackers.json"
NO_CURVES = ("step", "total", "evaluates")  # numbers of a record that are not measurements
CLOSE_S = 30.0  # wait for a server at the end of training


class Tracker(Protocol):
    name: str

    def write(self, step: int, scalars: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class Trackers:
    """Sends records to the open trackers; discards records before `open`, and on ranks that do not call it."""

    def __init__(self, log_line: Callable[[str], None]):
        self._log_line = log_line
        self._queue: queue.SimpleQueue[tuple[int, dict[str, float]] | None] = queue.SimpleQueue()
        self._open: list[Tracker] = []
        self._thread: threading.Thread | None = None

    def open(self, config: Config, folder: Path, step: int) -> None:
        """Opens the trackers of the settings for a run at `step`.

        Raises:
            ValueError: a tracker fails at step 0. A resumed run logs the failure and continues without the tracker.
        """
        self._open = [TensorBoard(folder / "tensorboard", step)]
        for key, project, start in (("run.wandb", config.run.wandb, WandB), ("run.mlflow", config.run.mlflow, MLflow)):
            if project is None:
                continue
            try:
                self._open.append(start(project, config, folder))
            except Exception as error:  # each of these libraries raises its own types
                reason = f"{key} = {project}: {' '.join(str(error).split()) or type(error).__name__}"
                if step == 0:
                    raise ValueError(f"{reason}; fix that, or train without it: {key}=null") from error
                self._log_line(f"{reason}; continuing without it")
        self._thread = threading.Thread(target=self._work, name="trackers", daemon=True)
        self._thread.start()

    def send(self, kind: str, values: dict[str, Any]) -> None:
        """Queues a record and returns at once."""
        if self._thread is not None:
            self._queue.put((values["step"], scalars(kind, values)))

    def close(self) -> None:
        """Waits until all records are written, at most CLOSE_S seconds."""
        if self._thread is None:
            return
        self._queue.put(None)
        self._thread.join(CLOSE_S)
        if self._thread.is_alive():
            names = ", ".join(tracker.name for tracker in self._open)
            self._log_line(f"{names}: not all records were written within {CLOSE_S:.0f} s; the others are lost")

    def _work(self) -> None:
        while (record := self._queue.get()) is not None:
            for tracker in self._open:
                with self._logging_errors(tracker):
                    tracker.write(*record)
        for tracker in self._open:
            with self._logging_errors(tracker):
                tracker.close()

    @contextmanager
    def _logging_errors(self, tracker: Tracker) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # each of these libraries raises its own types
            self._log_line(f"{tracker.name} could not be written: {error}; the record is lost there")


def scalars(kind: str, values: dict[str, Any]) -> dict[str, float]:
    """Returns the numbers of a record by curve, such as train/loss or evaluation/ema/top1."""
    curves: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            curves |= scalars(f"{kind}/{key}", value)
        elif isinstance(value, int | float) and key not in NO_CURVES:
            curves[f"{kind}/{key}"] = value
    return curves


class TensorBoard:
    """Writes event files to a folder. The curves of an earlier start end at the step at which this one resumes."""

    name = "TensorBoard"

    def __init__(self, folder: Path, step: int):
        from torch.utils.tensorboard import SummaryWriter  # a second of imports, for one rank

        self._begin: Callable[[int], SummaryWriter] = lambda first: SummaryWriter(str(folder), purge_step=first)
        self._first = step + 1
        self._writer: SummaryWriter | None = None

    def write(self, step: int, scalars: dict[str, float]) -> None:
        try:
            if self._writer is None:
                self._writer = self._begin(self._first)
            for name, value in scalars.items():
                self._writer.add_scalar(name, value, step)
            self._writer.flush()
        except Exception:
            # The error ended the writer's thread, so the next record begins another file.
            self._writer, self._first = None, step + 1
            raise

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class WandB:
    """Sends records to a run of Weights & Biases."""

    name = "Weights & Biases"

    def __init__(self, project: str, config: Config, folder: Path):
        import wandb

        entity, _, project = project.rpartition("/")
        run_id = _read_ids(folder).get("wandb", uuid.uuid4().hex[:12])
        self._run = wandb.init(
            entity=entity or None, project=project, id=run_id, resume="allow", name=config.name, dir=folder,
            config=settings.as_dict(config), settings=wandb.Settings(silent=True, console="off"),
        )  # fmt: skip
        # wandb's own step counter rejects steps before its newest record, which a resumed run computes again.
        self._run.define_metric("*", step_metric="step")
        _write_id(folder, "wandb", run_id)

    def write(self, step: int, scalars: dict[str, float]) -> None:
        self._run.log({"step": step, **scalars})

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """Sends records to a run of MLflow."""

    name = "MLflow"

    def __init__(self, experiment: str, config: Config, folder: Path):
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._metric, self._client = Metric, MlflowClient()
        run_id = _read_ids(folder).get("mlflow")
        if run_id is None:
            existing = self._client.get_experiment_by_name(experiment)
            experiment_id = existing.experiment_id if existing else self._client.create_experiment(experiment)
            run_id = self._client.create_run(experiment_id, run_name=config.name).info.run_id
            flat = settings.flat(config)
            self._client.log_batch(run_id, params=[Param(key, str(value)) for key, value in flat.items()])
            _write_id(folder, "mlflow", run_id)
        else:
            self._client.update_run(run_id, status="RUNNING")
        self._id = run_id

    def write(self, step: int, scalars: dict[str, float]) -> None:
        now = int(time.time() * 1000)
        self._client.log_batch(self._id, metrics=[self._metric(name, value, now, step) for name, value in scalars.items()])

    def close(self) -> None:
        self._client.set_terminated(self._id)


def _read_ids(folder: Path) -> dict[str, str]:
    path = folder / IDS
    return json.loads(path.read_text()) if path.exists() else {}


def _write_id(folder: Path, name: str, run_id: str) -> None:
    with open_to_replace(folder / IDS) as file:
        json.dump(_read_ids(folder) | {name: run_id}, file)
