"""`python -m pretrain status [RUN…] [--follow]`: how runs stand, from any machine that sees their directories.

One run is shown with its details, several as a table with a row each. A folder that is no run stands for the runs below it.
"""

import sys
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import NoReturn

from data.common.progress import duration
from pretrain.run.attempts import Attempt
from pretrain.run.standing import Record, Run, date, find, judge, number, read

REDRAW_S = 3.0
ATTEMPTS_SHOWN = 6  # the last ones
_CLEAR = "\x1b[H\x1b[J"
_HEAD = ("run", "state", "step", "loss", "lr", "images/s", "left", "next save", "restarts", "checkpoints", "")


def status(folders: Sequence[Path], follow: bool) -> int:
    """Prints how the runs stand, once or until Ctrl-C; returns the exit code.

    Raises:
        ValueError: there is no run in any of them. A folder that does not exist is a run that has not started.
    """
    if not (found := _find(folders)):
        raise ValueError(f"there is no run in {', '.join(map(str, folders))}")
    alone = found == list(folders)[:1]
    if not follow:
        print(show(read(found), alone, time.time()))
        return 0
    try:
        _follow(folders, alone)
    except KeyboardInterrupt:
        return 0


def _find(folders: Sequence[Path]) -> list[Path]:
    return list(dict.fromkeys(run for folder in folders for run in (find(folder) if folder.exists() else [folder])))


def _follow(folders: Sequence[Path], alone: bool) -> NoReturn:
    """On a terminal draws in place, elsewhere prints what has changed."""
    before = None
    while True:
        runs, now = read(_find(folders)), time.time()
        if sys.stdout.isatty():
            print(_CLEAR + show(runs, alone, now), flush=True)
        elif (found := [(run, judge(run, now)[0]) for run in runs]) != before:
            before = found
            print(f"{datetime.now():%Y-%m-%d %H:%M:%S}\n{show(runs, alone, now)}\n", flush=True)
        time.sleep(REDRAW_S)


def show(runs: Sequence[Run], alone: bool, now: float) -> str:
    return details(runs[0], now) if alone and runs else table(runs, now)


# ---------------------------------------------------------------- several runs


def table(runs: Sequence[Run], now: float) -> str:
    rows = [_HEAD, *(_row(run, now) for run in runs)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEAD))]
    left = (0, 1, len(_HEAD) - 1)  # columns of text
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width) for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _row(run: Run, now: float) -> tuple[str, ...]:
    state, told = judge(run, now)
    record, moving = run.records.get("train", {}), state in ("training", "evaluating")
    ends = [attempt.end.reason for attempt in run.attempts if attempt.end is not None]
    if moving and ends and not told:
        told = f"last restart: {ends[-1]}"
    return (
        str(run.folder), state, _step(run), _joined(record, ("loss", "{:.4f}")), _joined(record, ("lr", "{:.2e}")),
        _joined(record, ("images_per_s", "{:,.0f}")),
        _left(run, now) if moving else "", _next_save(run, now) if moving else "", str(run.restarts or ""),
        _disk(run), told,
    )  # fmt: skip


# ---------------------------------------------------------------- one run


def details(run: Run, now: float) -> str:
    state, told = judge(run, now)
    record, moving = run.records.get("train", {}), state in ("training", "evaluating")
    rows = {
        "step": _step(run) + (f", epoch {record['epoch']:.2f}" if number(record, "epoch") is not None else ""),
        "loss": _joined(record, ("loss", "{:.4f}"), ("lr", "learning rate {:.2e}"), ("grad_norm", "gradient {:.2f}")),
        "speed": _joined(
            record, ("images_per_s", "{:,.0f} images/s"), ("data_wait", "waiting for data {:.0%}"),
            ("host_wait", "GPUs waiting for the host in {:.0%} of steps"), ("mfu", "MFU {:.0%}"), ("memory_gb", "{:.1f} GB a rank"),
        ),
        "last record": f"{duration(now - record['time'])} ago" if record else "",
        "left": _left(run, now) if moving else "",
        "next save": f"step {_next_save(run, now)}" if moving and _next_save(run, now) else "",
        "checkpoints": _checkpoints(run, now),
        "evaluation": _evaluation(run),
        "job": _job(run),
        "trouble": _trouble(run),
        "restarts": str(run.restarts) if run.restarts else "",
    }  # fmt: skip
    lines = [f"{run.folder}: {state}" + (f": {told}" if told else "")]
    lines += [f"  {name:12} {text}" for name, text in rows.items() if text]
    if run.attempts:
        lines += ["  last attempts", *(f"    {_attempt(attempt, now)}" for attempt in run.attempts[-ATTEMPTS_SHOWN:])]
    return "\n".join(lines)


def _joined(record: Record, *parts: tuple[str, str]) -> str:
    """The numbers that a record has, each in its form."""
    return ", ".join(form.format(value) for key, form in parts if (value := number(record, key)) is not None)


def _step(run: Run) -> str:
    if run.step is None:
        return f"of {run.total:,}" if run.total else ""
    return f"{run.step:,}" + (f" of {run.total:,} ({run.step / run.total:.0%})" if run.total else "")


def _seconds_to(run: Run, step: float, now: float) -> float | None:
    """Until training comes to a step, at the last record's speed."""
    record = run.records.get("train", {})
    left, total, time_ = (number(record, key) for key in ("left_s", "total", "time"))
    if left is None or total is None or time_ is None or total <= record["step"]:
        return None
    return max(0.0, left * (step - record["step"]) / (total - record["step"]) - (now - time_))


def _left(run: Run, now: float) -> str:
    seconds = _seconds_to(run, run.total, now) if run.total else None
    return duration(seconds) if seconds is not None else ""


def _next_save(run: Run, now: float) -> str:
    step = number(run.records.get("train", {}), "next_save")
    seconds = _seconds_to(run, step, now) if step is not None else None
    return f"{step:,.0f} in {duration(seconds)}" if seconds is not None else ""


def _checkpoints(run: Run, now: float) -> str:
    if not run.saved:
        return f"none; {size(run.free)} free"
    age = f", {duration(now - run.saved_at)} old" if run.saved_at is not None else ""
    return f"{len(run.saved)}, {_disk(run)}; newest {run.saved[-1]:,}{age}"


def _disk(run: Run) -> str:
    return f"{size(run.bytes)}, {size(run.free)} free"


def size(count: float) -> str:
    """Of bytes: `3.3 GB`."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _evaluation(run: Run) -> str:
    record = run.records.get("evaluation", {})
    told = []
    for kind, name in (("weight", "weights"), ("ema", "moving average")):
        if isinstance(found := record.get(kind), dict):
            told.append(f"{name} {_joined(found, ('top1', 'top-1 {:.2%}'), ('top5', 'top-5 {:.2%}'), ('loss', 'loss {:.4f}'))}")
    return f"step {record.get('step')}: {'; '.join(told)}" if told else ""


def _job(run: Run) -> str:
    told = [f"{run.job_id} on Slurm"] if run.job_id else []
    told += [run.holder.process] if run.holder else []
    told += [f"{len(attempt.nodes)} nodes, {attempt.ranks} ranks" for attempt in run.attempts[-1:] if attempt.end is None]
    return ", ".join(told)


def _trouble(run: Run) -> str:
    failed = run.records.get("save_failed")
    counts = ((run.bad_images, "bad images"), (run.skipped, "skipped steps"), (run.rollbacks, "rollbacks"))
    told = [f"{count} {name}" for count, name in counts if count]
    if failed and failed["step"] > (run.saved[-1] if run.saved else 0):
        told.append(f"saving failed at step {failed['step']}: {failed.get('reason')}")
    return ", ".join(told)


def _attempt(attempt: Attempt, now: float) -> str:
    end = attempt.end
    lasted = duration((end.at if end else now) - attempt.began)
    told = f"{date(attempt.began)}  {lasted:>12}  from step {attempt.saved:<9,}"
    return f"{told} {end.outcome} at {end.saved:,}: {end.reason}" if end else f"{told} has not ended"
