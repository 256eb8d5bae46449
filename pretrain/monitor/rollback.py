"""Rolls training back from bad steps: detects them, keeps evidence of them, and remembers the batches to skip.

A step whose numbers are not finite changes nothing (pretrain/engine/guard.py). After many such steps in a row, or after a loss far above
the average, training rolls back to the newest checkpoint from before them, and skips the batches that led there and a number of batches
before them (as PaLM was trained, arXiv 2204.02311, section 5.1). Step and batch stay bound to each other: a step whose batch is skipped
makes no update, and learning rate, order and randomness of all other steps stay as they were.

    RUN/bad_steps.jsonl     each bad step: losses of the ranks, gradient norm, keys of the samples
    RUN/rollbacks.json      each rollback, and the steps whose batches are skipped
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
from pretrain.run.metrics import RunLog

AVERAGED_STEPS = 100  # that the moving average of losses covers


@dataclass(frozen=True)
class BadSteps:
    """Names the steps `first` to `last`, counted from 0, that training has to be rolled back from."""

    first: int
    last: int
    reason: str


class DivergenceWatch:
    """Detects bad steps by their losses. The result depends on the steps alone, and is the same on all ranks."""

    def __init__(self, guard: GuardConfig):
        self.guard = guard
        self.mean, self.seen = 0.0, 0  # of losses
        self.run = 0  # steps in a row that were skipped, up to now

    def find_bad(self, steps: Steps) -> BadSteps | None:
        """Returns the first steps that training has to be rolled back from, if there are any."""
        for number, loss, skipped in zip(steps.numbers, steps.mean_losses.tolist(), steps.skipped.tolist(), strict=True):
            if skipped:
                self.run += 1
                if self.run == self.guard.skipped:
                    return BadSteps(number - self.run + 1, number, f"{self.run} steps in a row were not finite")
                continue
            self.run = 0
            if self.guard.spike and self.seen >= AVERAGED_STEPS and loss > self.guard.spike * self.mean:
                return BadSteps(number, number, f"a loss of {loss:.4f}, where the average before it is {self.mean:.4f}")
            self.seen += 1
            self.mean += (loss - self.mean) / min(self.seen, AVERAGED_STEPS)
        return None

    def state(self) -> dict[str, float]:
        """Returns the state for a checkpoint."""
        return {"mean": self.mean, "seen": self.seen, "run": self.run}

    def load(self, state: dict[str, Any]) -> None:
        """Restores the state of a checkpoint."""
        self.mean, self.seen, self.run = state["mean"], state["seen"], state["run"]


class Rollbacks:
    """Remembers the rollbacks of a run. `entries` are those of its file, which rank 0 reads for all ranks."""

    def __init__(self, file: Path, entries: list[dict[str, Any]]):
        self.file, self.entries = file, entries

    def is_skipped(self, step: int) -> bool:
        """Returns whether the batch of a step is skipped."""
        return any(entry["first"] <= step <= entry["last"] for entry in self.entries)

    def add(self, bad: BadSteps, skipped_before: int, to_step: int) -> dict[str, Any]:
        """Adds a rollback to step `to_step`, which skips the batches of the bad steps and of `skipped_before` steps before them."""
        entry = {"first": max(0, bad.first - skipped_before), "last": bad.last, "reason": bad.reason, "to_step": to_step}
        self.entries = [*self.entries, entry]
        return entry

    def write(self) -> None:
        """Replaces the file."""
        with self.file.with_suffix(".part").open("w") as file:
            json.dump(self.entries, file, indent=1)
            publish(file, self.file)


def read_rollbacks(file: Path) -> list[dict[str, Any]]:
    """Returns the entries of a run's file; none without the file."""
    return json.loads(file.read_text()) if file.exists() else []


# ---------------------------------------------------------------- evidence


@dataclass(frozen=True)
class Evidence:
    """Writes evidence of bad steps to a file and to the log."""

    file: Path  # RUN/bad_steps.jsonl
    log: RunLog
    order: SampleOrder
    index: Index  # of the training data
    hosts: list[str]  # of all ranks
    has_loss_scale: bool  # whether losses are scaled (fp16): gradients that are not finite are normal then, as long as the loss is

    def keep(self, steps: Steps, bad: BadSteps | None) -> None:
        """Writes all steps of an interval that were skipped or that `bad` names."""
        for position in self.find(steps, bad):
            facts = self.describe(steps, position)
            self.log.append(self.file, facts)
            first, others = facts["ranks"][0], len(facts["ranks"]) - 1
            self.log.line(
                f"bad step {facts['step']}{' skipped' if facts['skipped'] else ''}: loss {facts['loss']}, "
                f"gradient norm {facts['grad_norm']}; rank {first['rank']} on {first['host']}{f' and {others} more' if others else ''}; "
                f"the samples are in {self.file}"
            )

    def find(self, steps: Steps, bad: BadSteps | None) -> list[int]:
        """Returns the positions in `steps` to keep evidence of."""
        is_finite = np.isfinite(steps.losses).all(0)
        return [
            position
            for position, number in enumerate(steps.numbers)
            if (steps.skipped[position] and not (self.has_loss_scale and is_finite[position]))
            or (bad is not None and bad.first <= number <= bad.last)
        ]

    def describe(self, steps: Steps, position: int) -> dict[str, Any]:
        """Returns the facts of a bad step: the ranks whose loss is not finite, or else all ranks, and their samples."""
        losses = steps.losses[:, position].tolist()
        ranks = [rank for rank, loss in enumerate(losses) if not math.isfinite(loss)] or list(range(len(losses)))
        epoch, step_in_epoch = self.order.locate(steps.numbers[position])
        batch = self.order.batch(epoch, step_in_epoch)
        parts = []
        for rank in ranks:
            samples = batch[select_rank_slots(self.order.global_batch, rank, len(losses))].tolist()
            keys = [try_read_key(self.index, sample) for sample in samples]
            parts.append({"rank": rank, "host": self.hosts[rank], "loss": _as_json(losses[rank]), "samples": samples, "keys": keys})
        return {
            "time": round(time.time(), 3),
            "step": steps.numbers[position],
            "epoch": epoch,
            "loss": _as_json(float(steps.mean_losses[position])),
            "grad_norm": _as_json(float(steps.grad_norms[position])),
            "skipped": bool(steps.skipped[position]),
            "ranks": parts,
        }


def _as_json(value: float) -> float | str:
    """Returns a string for a number that is not finite, which JSON lacks."""
    return value if math.isfinite(value) else str(value)
