"""A small model that trains and saves for real, in one process a rank (tests/support/ranks.py), for tests of failing disks."""

import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from pretrain import checkpoint
from pretrain import config as settings
from pretrain.engine import distributed, zero_state
from pretrain.engine.batch_stats import BatchStats
from pretrain.engine.engine import build_engine
from pretrain.run.log import RunLog
from tests.support.configs import make_config

KINDS = ("weight", "exp_avg", "exp_avg_sq", "ema", "buffer", "buffer_ema")


class Memory(RunLog):
    """Keeps a run's log in memory."""

    def __init__(self) -> None:
        super().__init__(None)
        self.lines: list[str] = []
        self.records: list[dict[str, Any]] = []

    def line(self, text: str) -> None:
        self.lines.append(text)

    def record(self, kind: str, **values: Any) -> None:
        self.records.append({"kind": kind, **values})


class Session:
    """One rank of a run in `folder`. `states` holds the state after each step that was saved, or should have been."""

    def __init__(self, folder: str, keep: int = 2, width: int = 4, **engine: Any):
        self.run = Path(folder)
        self.folder = self.run / "checkpoints"
        self.keep = keep
        config = make_config(engine={"ema_decay": 0.9, "micro_batch": 1} | engine)
        distributed.start(config.engine)
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        torch.manual_seed(config.seed)
        self.model = nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.Flatten(), nn.Linear(width * 36, 3))
        self.engine = build_engine(config, self.model, settings.accumulation(config, self.ranks))
        self.stats = BatchStats(self.model, config.engine.ema_decay)
        self.log = Memory()
        self.lock = checkpoint.lock_run(self.run, self.log.line)
        self.step = 0
        self.states: dict[int, dict[str, torch.Tensor]] = {}
        self.start()

    def start(self) -> int | None:
        """Opens the run's checkpoints and loads the newest whole one, as the start of a job does; returns its step."""
        self.checkpoints = checkpoint.Checkpoints(
            self.folder, self.engine, self.stats, retention=checkpoint.Retention(self.keep), lock=self.lock, log=self.log
        )
        trainer = self.checkpoints.load({})
        self.step = trainer["step"] if trainer else 0
        return self.step if trainer else None

    def train(self) -> None:
        """Makes one step on images that follow from its number."""
        images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(self.step))
        for number in range(self.rank * 4 // self.ranks, (self.rank + 1) * 4 // self.ranks):
            loss = nn.functional.cross_entropy(self.engine(images[number : number + 1]), torch.tensor([number % 3]))
            self.engine.backward(loss)
            self.checkpoints.before_update()
            self.engine.step()
        self.stats.start_averaging()
        self.stats.finish()
        self.step += 1

    def save(self, on: AbstractContextManager[None] | None = None) -> BaseException | None:
        """Makes a step and a save on the disk `on`, and waits for it; returns the error that `wait` raised."""
        self.train()
        self.states[self.step] = self.state()
        with on or nullcontext():
            self.begin_save()
            try:
                self.checkpoints.wait()
            except RuntimeError as error:
                return error
        return None

    def begin_save(self) -> None:
        self.checkpoints.save({"step": self.step, "identity": {}, "evaluation": None})

    def state(self) -> dict[str, torch.Tensor]:
        """Returns copies of everything that a checkpoint holds. Collective."""
        whole = {key: zero_state.assemble_tensors(self.engine, key) for key in ("weight", "exp_avg", "exp_avg_sq", "ema")}
        state = {f"{key}/{name}": tensor.flatten() for key, tensors in whole.items() for name, tensor in tensors.items()}
        state |= {f"buffer/{name}": buffer for name, buffer in self.model.named_buffers()}
        state |= {f"buffer_ema/{name}": average for name, average in self.stats.averages.items()}
        return {name: tensor.detach().clone() for name, tensor in state.items()}

    def on_disk(self) -> int:
        """Returns the step of the newest whole checkpoint; raises AssertionError if its content differs from the state at that step."""
        path = checkpoint.find_newest_whole(self.folder, self.log.line)
        assert path is not None
        step = int(path.name.removeprefix("step-"))
        assert different(checkpoint.read_tensors(path, KINDS), self.states[step]) == []
        return step

    def kinds(self) -> list[str]:
        """Returns the kinds of the records so far, and forgets these."""
        found = [record["kind"] for record in self.log.records]
        self.log.records.clear()
        return found

    def end(self) -> None:
        self.lock.release()
        distributed.stop()


def different(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    """Returns the names of the tensors that differ in a bit."""
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


def everywhere(value: Any, rank: int) -> Any:
    """Returns the value of one rank on all ranks. Collective."""
    holder = [value]
    dist.broadcast_object_list(holder, src=rank)
    return holder[0]


def hidden(folder: Path) -> list[str]:
    return sorted(name for name in os.listdir(folder) if name.startswith("."))
