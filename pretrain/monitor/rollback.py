"""When training goes back: how bad steps are told, what is kept of them, and which batches are left out from then on.

A step that is not finite has changed nothing (pretrain/engine/guard.py). After many in a row, or after a loss far above those before it,
training goes back to the newest checkpoint from before them, and leaves out the batches that led there and a number ahead of them
(as PaLM was trained, arXiv 2204.02311, section 5.1). Step and batch stay bound to each other: a step whose batch is left out makes no
update, and learning rate, order and randomness of all others are as they were.

    RUN/bad_steps.jsonl     each bad step: losses of the ranks, gradient norm, keys of the samples
    RUN/rollbacks.json      each time that training went back, and the steps whose batches are left out
"""

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.common.files import publish
from data.dataset.index import Index
from data.loader.order import SampleOrder, select_rank_slots
from data.loader.quarantine import try_read_key
from pretrain.config import GuardConfig
from pretrain.monitor.interval import Steps

_SPAN = 100  # steps that the average of losses goes over


@dataclass(frozen=True)
class Bad:
    """Steps `first` to `last`, counted from 0, that training should not have made."""

    first: int
    last: int
    reason: str


class Watch:
    """Sees each step's loss go by, and tells when training should go back. The same on all ranks, and a function of the steps alone."""

    def __init__(self, guard: GuardConfig):
        self.guard = guard
        self.mean, self.seen = 0.0, 0  # of losses
        self.run = 0  # steps in a row that were skipped, up to now

    def judge(self, steps: Steps) -> Bad | None:
        for number, loss, skipped in zip(steps.numbers, steps.loss.tolist(), steps.skipped.tolist(), strict=True):
            if skipped:
                self.run += 1
                if self.run == self.guard.skipped:
                    return Bad(number - self.run + 1, number, f"{self.run} steps in a row were not finite")
                continue
            self.run = 0
            if self.guard.spike and self.seen >= _SPAN and loss > self.guard.spike * self.mean:
                return Bad(number, number, f"a loss of {loss:.4f}, where those before it are {self.mean:.4f} on average")
            self.seen += 1
            self.mean += (loss - self.mean) / min(self.seen, _SPAN)
        return None

    def state(self) -> dict[str, float]:
        return {"mean": self.mean, "seen": self.seen, "run": self.run}

    def load(self, state: dict[str, Any]) -> None:
        self.mean, self.seen, self.run = state["mean"], state["seen"], state["run"]


class Rollbacks:
    """Those of a run so far. `entries` are the file's; ranks other than 0 are given them."""

    def __init__(self, file: Path, entries: list[dict[str, Any]]):
        self.file, self.entries = file, entries

    def is_skipped(self, step: int) -> bool:
        """Whether a step's batch is left out."""
        return any(entry["first"] <= step <= entry["last"] for entry in self.entries)

    def add(self, bad: Bad, pass_over: int, to_step: int) -> dict[str, Any]:
        """Leaves out the batches of the bad steps and of the `pass_over` steps ahead of them."""
        entry = {"first": max(0, bad.first - pass_over), "last": bad.last, "reason": bad.reason, "to_step": to_step}
        self.entries = [*self.entries, entry]
        return entry

    def write(self) -> None:
        with self.file.with_suffix(".part").open("w") as file:
            json.dump(self.entries, file, indent=1)
            publish(file, self.file)


def recorded(file: Path) -> list[dict[str, Any]]:
    return json.loads(file.read_text()) if file.exists() else []


def bad_steps(steps: Steps, bad: Bad | None, scales: bool) -> list[int]:
    """Positions in `steps` of those to keep evidence of: skipped ones and what `bad` names. Where a loss scale is being found (`scales`),
    gradients that are not finite are nothing special, unless the loss itself isn't."""
    finite = np.isfinite(steps.losses).all(0)
    return [
        position
        for position, number in enumerate(steps.numbers)
        if (steps.skipped[position] and not (scales and finite[position])) or (bad is not None and bad.first <= number <= bad.last)
    ]


def evidence(steps: Steps, position: int, order: SampleOrder, index: Index, hosts: list[str]) -> dict[str, Any]:
    """What is known of a bad step: which ranks had a loss that is not finite, all of them if none had, and on what samples."""
    losses = steps.losses[:, position].tolist()
    concerned = [rank for rank, loss in enumerate(losses) if not math.isfinite(loss)] or list(range(len(losses)))
    epoch, step_in_epoch = order.locate(steps.numbers[position])
    batch = order.batch(epoch, step_in_epoch)

    def about(rank: int) -> dict[str, Any]:
        samples = batch[select_rank_slots(order.global_batch, rank, len(losses))].tolist()
        keys = [try_read_key(index, sample) for sample in samples]
        return {"rank": rank, "host": hosts[rank], "loss": _number(losses[rank]), "samples": samples, "keys": keys}

    return {
        "time": round(time.time(), 3),
        "step": steps.numbers[position],
        "epoch": epoch,
        "loss": _number(float(steps.loss[position])),
        "grad_norm": _number(float(steps.norms[position])),
        "skipped": bool(steps.skipped[position]),
        "ranks": [about(rank) for rank in concerned],
    }


def _number(value: float) -> float | str:
    """JSON has no word for what is not finite."""
    return value if math.isfinite(value) else str(value)
