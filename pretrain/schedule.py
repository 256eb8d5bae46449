"""Decides after each optimizer step whether to log, evaluate or save.

schedule = make_schedule(config.run, total, steps_per_epoch, evaluates=True)
due = schedule.due(step, is_save_requested=False)
if due.evaluate: …
"""

from dataclasses import dataclass

from pretrain.config import RunConfig


@dataclass(frozen=True)
class Due:
    """Holds the work that follows one optimizer step, in order of execution."""

    log: bool
    evaluate: bool
    save: bool


@dataclass(frozen=True)
class Schedule:
    """Holds the periods of a job, in optimizer steps; None: never."""

    total: int  # steps of the whole training; the last one logs and saves, and evaluates if the job has validation data
    log_every: int
    evaluate_every: int | None
    save_every: int | None
    keep_every: int | None  # checkpoints at multiples of this are saved and kept for good
    saves_evaluations: bool  # whether each evaluated state is saved, so that the best one can be kept

    def due(self, step: int, *, is_save_requested: bool) -> Due:
        """Returns the work due after `step` steps; `is_save_requested`: by the clock or a stop request."""
        is_last = step == self.total
        evaluate = _is_multiple(step, self.evaluate_every) or (is_last and self.evaluate_every is not None)
        is_periodic = _is_multiple(step, self.save_every) or _is_multiple(step, self.keep_every)
        save = is_save_requested or is_last or is_periodic or (evaluate and self.saves_evaluations)
        return Due(log=save or evaluate or _is_multiple(step, self.log_every), evaluate=evaluate, save=save)


def make_schedule(run: RunConfig, total: int, steps_per_epoch: int, *, evaluates: bool) -> Schedule:
    """Returns the schedule of a job of `total` steps; `evaluates`: it has validation data."""
    return Schedule(
        total=total,
        log_every=run.log_every,
        evaluate_every=max(1, round(run.eval_every * steps_per_epoch)) if evaluates else None,
        save_every=run.save_every,
        keep_every=round(run.keep_every * steps_per_epoch) or None,
        saves_evaluations=run.keep_best != "none",
    )


def _is_multiple(step: int, period: int | None) -> bool:
    return period is not None and step % period == 0
