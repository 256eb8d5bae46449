"""What draws a run's records as curves: TensorBoard always, Weights & Biases and MLflow where a job asks for them.

    trackers = Trackers(log.line)
    trackers.open(config, folder, step)          # after the run's checkpoint is loaded
    trackers.send("train", {"step": 50, "loss": 9.1})
    trackers.close()

RUN/tensorboard       event files, one a start: tensorboard --logdir runs
run.wandb=PROJECT     or ENTITY/PROJECT; key, server and mode are wandb's own business (wandb login, WANDB_MODE=offline)
run.mlflow=EXPERIMENT the store is MLflow's own business (MLFLOW_TRACKING_URI)

A run that goes on continues the same curves: TensorBoard leaves out what an earlier start wrote behind the step that this one goes on
from, the other two get the ids that RUN/trackers.json keeps. Records travel on a thread of their own, so neither a slow disk nor a
server that does not answer holds training up, and what can't be written is lost and said.
"""

import json
import os
import queue
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from data.common.files import publish
from pretrain import config as settings
from pretrain.config import Config

IDS = "trackers.json"
_PLANS = ("step", "total", "next_save", "evaluates")  # numbers of a record that say where in the training it is
LEAVE = 30.0  # seconds that the end of training waits for a server


class Tracker(Protocol):
    name: str

    def write(self, step: int, scalars: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class Trackers:
    """Sends records to what is open; before `open`, and on a rank where it isn't called, nowhere.

    Args:
        line: tells a person of what is lost.
    """

    def __init__(self, line: Callable[[str], None]):
        self._line = line
        self._queue: queue.SimpleQueue[tuple[int, dict[str, float]] | None] = queue.SimpleQueue()
        self._open: list[Tracker] = []
        self._thread: threading.Thread | None = None

    def open(self, config: Config, folder: Path, step: int) -> None:
        """Opens all that the settings ask for, for a run that has come to `step`.

        Raises:
            ValueError: one refuses what is asked for, at step 0. A run that goes on does so without it, and says so.
        """
        self._open = [TensorBoard(folder / "tensorboard", step)]
        for key, project, start in (("run.wandb", config.run.wandb, WandB), ("run.mlflow", config.run.mlflow, MLflow)):
            if project is None:
                continue
            try:
                self._open.append(start(project, config, folder))
            except Exception as error:  # each of these libraries raises kinds of its own
                told = f"{key} = {project}: {' '.join(str(error).split()) or type(error).__name__}"
                if step == 0:
                    raise ValueError(f"{told}; mend that, or train without it: {key}=null") from error
                self._line(f"{told}; going on without it")
        self._thread = threading.Thread(target=self._work, name="trackers", daemon=True)
        self._thread.start()

    def send(self, kind: str, values: dict[str, Any]) -> None:
        """Returns at once."""
        if self._thread is not None:
            self._queue.put((values["step"], scalars(kind, values)))

    def close(self) -> None:
        """Returns when all is written, or after LEAVE seconds."""
        if self._thread is None:
            return
        self._queue.put(None)
        self._thread.join(LEAVE)
        if self._thread.is_alive():
            self._line(f"{', '.join(tracker.name for tracker in self._open)}: not all was written within {LEAVE:.0f} s; the rest is lost")

    def _work(self) -> None:
        while (record := self._queue.get()) is not None:
            for tracker in self._open:
                with self._told(tracker):
                    tracker.write(*record)
        for tracker in self._open:
            with self._told(tracker):
                tracker.close()

    @contextmanager
    def _told(self, tracker: Tracker) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # each of these libraries raises kinds of its own
            self._line(f"{tracker.name} could not be written: {error}; what it was to be told is lost there")


def scalars(kind: str, values: dict[str, Any]) -> dict[str, float]:
    """The numbers in a record by name, such as train/loss or evaluation/ema/top1; texts are left out, and what is no curve."""
    found: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= scalars(f"{kind}/{key}", value)
        elif isinstance(value, int | float) and key not in _PLANS:
            found[f"{kind}/{key}"] = value
    return found


class TensorBoard:
    """Event files in a folder; an earlier start's curves end at the step that this one goes on from."""

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
            # Its thread has ended with the error: the next record begins another file.
            self._writer, self._first = None, step + 1
            raise

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class WandB:
    name = "Weights & Biases"

    def __init__(self, project: str, config: Config, folder: Path):
        import wandb

        entity, _, project = project.rpartition("/")
        found = _recorded(folder).get("wandb", uuid.uuid4().hex[:12])
        self._run = wandb.init(
            entity=entity or None, project=project, id=found, resume="allow", name=config.name, dir=folder, config=settings.as_dict(config),
            settings=wandb.Settings(silent=True, console="off"),
        )  # fmt: skip
        # Its own count of steps refuses what is behind its newest record, and a run that was cut short comes by there again.
        self._run.define_metric("*", step_metric="step")
        _record(folder, "wandb", found)

    def write(self, step: int, scalars: dict[str, float]) -> None:
        self._run.log({"step": step, **scalars})

    def close(self) -> None:
        self._run.finish()


class MLflow:
    name = "MLflow"

    def __init__(self, experiment: str, config: Config, folder: Path):
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._metric, self._client = Metric, MlflowClient()
        found = _recorded(folder).get("mlflow")
        if found is None:
            there = self._client.get_experiment_by_name(experiment)
            place = there.experiment_id if there else self._client.create_experiment(experiment)
            found = self._client.create_run(place, run_name=config.name).info.run_id
            flat = settings.flat(settings.as_dict(config))
            self._client.log_batch(found, params=[Param(key, str(value)) for key, value in flat.items()])
            _record(folder, "mlflow", found)
        else:
            self._client.update_run(found, status="RUNNING")
        self._id = found

    def write(self, step: int, scalars: dict[str, float]) -> None:
        now = int(time.time() * 1000)
        self._client.log_batch(self._id, metrics=[self._metric(name, value, now, step) for name, value in scalars.items()])

    def close(self) -> None:
        self._client.set_terminated(self._id)


def _recorded(folder: Path) -> dict[str, str]:
    path = folder / IDS
    return json.loads(path.read_text()) if path.exists() else {}


def _record(folder: Path, name: str, found: str) -> None:
    with open(folder / f"{IDS}.{os.getpid()}", "w") as file:
        json.dump(_recorded(folder) | {name: found}, file)
        publish(file, folder / IDS)
