"""Detects bad steps, keeps evidence of them, and records the batches that a rollback skips.

A step whose loss or gradient is not finite changes nothing (pretrain/engine/guard.py). After many such steps in a row, or after a loss far
above the average, training rolls back to the newest checkpoint from before them and skips their batches and a number of batches before
(as in the training of PaLM, arXiv 2204.02311, section 5.1). Each step keeps its batch: a step whose batch is skipped makes no update, and
learning rate, order and randomness of all other steps do not change.

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

from data.common.files import open_to_replace
from data.dataset.index import Index
from data.loader.order import SampleOrder, select_rank_slots
from data.loader.quarantine import try_read_key
from pretrain.config import GuardConfig
from pretrain.monitor.interval import Steps
from pretrain.run.log import RunLog

AVERAGED_STEPS = 100  # that the moving average of losses covers


@dataclass(frozen=True)
class BadSteps:
    """Names the steps `first` to `last`, counted from 0, that require a rollback."""

    first: int
    last: int
    reason: str


class DivergenceWatch:
    """Detects bad steps by their losses; the same steps give the same result on all ranks."""

    def __init__(self, guard: GuardConfig):
        self.guard = guard
        self.mean, self.seen = 0.0, 0  # moving average and number of the losses
        self.run = 0  # consecutive skipped steps so far

    def find_bad(self, steps: Steps) -> BadSteps | None:
        """Returns the first steps that require a rollback, or None."""
        for number, loss, skipped in zip(steps.numbers, steps.mean_losses.tolist(), steps.skipped.tolist(), strict=True):
            if skipped:
                self.run += 1
                if self.run == self.guard.skipped:
                    return BadSteps(number - self.run + 1, number, f"{self.run} steps in a row were not finite")
                continue
            self.run = 0
            if self.guard.spike and self.seen >= AVERAGED_STEPS and loss > self.guard.spike * self.mean:
                return BadSteps(number, number, f"a loss of {loss:.4f} after an average of {self.mean:.4f}")
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
    """Holds the rollbacks of a run. `entries` are the contents of its file, which rank 0 reads for all ranks."""

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
        with open_to_replace(self.file) as file:
            json.dump(self.entries, file, indent=1)


def read_rollbacks(file: Path) -> list[dict[str, Any]]:
    """Returns the entries of a run's file, none if it does not exist."""
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
    has_loss_scale: bool  # whether losses are scaled (fp16); non-finite gradients of a finite loss are normal then

    def keep(self, steps: Steps, bad: BadSteps | None) -> None:
        """Writes all steps of an interval that were skipped or belong to `bad`."""
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
        """Returns the positions in `steps` of which to keep evidence."""
        is_finite = np.isfinite(steps.losses).all(0)
        return [
            position
            for position, number in enumerate(steps.numbers)
            if (steps.skipped[position] and not (self.has_loss_scale and is_finite[position]))
            or (bad is not None and bad.first <= number <= bad.last)
        ]

    def describe(self, steps: Steps, position: int) -> dict[str, Any]:
        """Returns the record of a bad step, with the samples of the ranks with a non-finite loss, or else of all."""
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
    """Returns numbers that are not finite, which JSON lacks, as strings."""
    return value if math.isfinite(value) else str(value)
