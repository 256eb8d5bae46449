"""Runs `python -m pretrain status [RUN …] [--follow]`: shows the state of runs, on any machine that can read their directories.

One run is shown in detail, several in a table with one row each. For a folder that is not a run directory, shows all runs below it.
"""

import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from data.common.text import format_duration, format_table
from pretrain.run.attempts import Attempt
from pretrain.run.state import Record, Run, find_runs, get_number, read, state_of

REDRAW_S = 3.0
ATTEMPTS_SHOWN = 6
_CLEAR = "\x1b[H\x1b[J"
_COLUMNS = ("run", "state", "step", "loss", "images/s", "left", "restarts", "checkpoints", "")
_TEXT_COLUMNS = (0, 1, len(_COLUMNS) - 1)  # aligned left, the others right


def status(folders: Sequence[Path], follow: bool) -> int:
    """Prints the state of runs, once or until Ctrl-C; returns the exit code.

    Raises:
        ValueError: the folders contain no run. A folder that does not exist counts as a run that has not started.
    """
    if not (runs := _find(folders)):
        raise ValueError(f"there is no run in {', '.join(map(str, folders))}")
    in_detail = runs == list(folders)[:1]
    with suppress(KeyboardInterrupt):
        _print(folders, in_detail, follow)
    return 0


def _find(folders: Sequence[Path]) -> list[Path]:
    return list(dict.fromkeys(run for folder in folders for run in (find_runs(folder) if folder.exists() else [folder])))


def _print(folders: Sequence[Path], in_detail: bool, follow: bool) -> None:
    """Prints the state once, or with `follow` repeatedly: redraws a terminal; appends a block to other output after each change."""
    previous = None
    while True:
        runs, now = read(_find(folders)), time.time()
        text = format_details(runs[0], now) if in_detail and runs else format_overview(runs, now)
        if not follow:
            print(text)
            return
        current = [(run, state_of(run, now)[0]) for run in runs]
        if sys.stdout.isatty():
            print(_CLEAR + text, flush=True)
        elif current != previous:
            print(f"{datetime.now():%Y-%m-%d %H:%M:%S}\n{text}\n", flush=True)
        previous = current
        time.sleep(REDRAW_S)


def format_overview(runs: Sequence[Run], now: float) -> str:
    rows = [_COLUMNS, *(_row(run, now) for run in runs)]
    return format_table(rows, left=_TEXT_COLUMNS)


def _row(run: Run, now: float) -> tuple[str, ...]:
    state, remark = state_of(run, now)
    ends = [attempt.end.reason for attempt in run.attempts if attempt.end is not None]
    if state == "running" and ends and not remark:
        remark = f"last restart: {ends[-1]}"
    record = run.records.get("train", {})
    left = _left(run, now) if state == "running" else ""
    loss, speed = _numbers(record, ("loss", "{:.4f}")), _numbers(record, ("images_per_s", "{:,.0f}"))
    return (str(run.folder), state, _step(run), loss, speed, left, str(run.restarts or ""), _disk(run), remark)


def format_details(run: Run, now: float) -> str:
    state, remark = state_of(run, now)
    record, is_running = run.records.get("train", {}), state == "running"
    rows = {
        "step": _step(run) + _numbers(record, ("epoch", ", epoch {:.2f}")),
        "loss": _numbers(record, ("loss", "{:.4f}"), ("lr", "learning rate {:.2e}"), ("grad_norm", "gradient norm {:.2f}")),
        "speed": _numbers(
            record, ("images_per_s", "{:,.0f} images/s"), ("data_wait", "waiting for data {:.0%}"), ("mfu", "MFU {:.0%}"),
            ("launch_bound", "launch-bound in {:.0%} of steps"), ("memory_gb", "{:.1f} GB a rank"),
        ),
        "last record": f"{format_duration(now - record['time'])} ago" if record else "",
        "left": _left(run, now) if is_running else "",
        "checkpoints": _checkpoints(run),
        "evaluation": _evaluation(run),
        "job": _job(run),
        "problems": _problems(run),
        "restarts": str(run.restarts or ""),
    }  # fmt: skip
    lines = [f"{run.folder}: {state}" + (f": {remark}" if remark else "")]
    lines += [f"  {name:12} {text}" for name, text in rows.items() if text]
    if run.attempts:
        lines += ["  last attempts", *(f"    {_attempt(attempt, now)}" for attempt in run.attempts[-ATTEMPTS_SHOWN:])]
    return "\n".join(lines)


def _numbers(record: Record, *parts: tuple[str, str]) -> str:
    """Formats the numbers that the record has; `parts` are (key, format)."""
    return ", ".join(text.format(value) for key, text in parts if (value := get_number(record, key)) is not None)


def _step(run: Run) -> str:
    if run.step is None:
        return f"of {run.total:,}" if run.total else ""
    return f"{run.step:,}" + (f" of {run.total:,} ({run.step / run.total:.0%})" if run.total else "")


def _left(run: Run, now: float) -> str:
    record = run.records.get("train", {})
    left = get_number(record, "left_s")
    return format_duration(max(0.0, left - (now - record["time"]))) if left is not None else ""


def _checkpoints(run: Run) -> str:
    count = ", ".join(filter(None, [str(len(run.saved) or "none"), _disk(run)]))
    return f"{count}; newest {run.saved[-1]:,}" if run.saved else count


def _disk(run: Run) -> str:
    return f"{format_size(run.size)}, {format_size(run.free)} free" if run.free is not None else ""


def format_size(count: float) -> str:
    """Formats a number of bytes in its largest unit: `3.34 GB`."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _evaluation(run: Run) -> str:
    record = run.records.get("evaluation", {})
    results = [(name, record[key]) for key, name in (("weight", "weights"), ("ema", "EMA")) if isinstance(record.get(key), dict)]
    parts = [
        f"{name} {_numbers(result, ('top1', 'top-1 {:.2%}'), ('top5', 'top-5 {:.2%}'), ('loss', 'loss {:.4f}'))}"
        for name, result in results
    ]
    return f"step {record.get('step')}: {'; '.join(parts)}" if parts else ""


def _job(run: Run) -> str:
    parts = [f"{run.job_id} on Slurm"] if run.job_id else []
    parts += [run.holder.process] if run.holder else []
    parts += [f"{len(attempt.nodes)} nodes, {attempt.ranks} ranks" for attempt in run.attempts[-1:] if attempt.end is None]
    return ", ".join(parts)


def _problems(run: Run) -> str:
    parts = [f"{count} {name}" for count, name in ((run.bad_images, "bad images"), (run.skipped, "skipped steps")) if count]
    rollback, failed_save = run.records.get("rollback"), run.records.get("save_failed")
    parts += [f"rolled back to step {rollback['step']}"] if rollback else []
    if failed_save and failed_save["step"] > (run.saved[-1] if run.saved else 0):
        parts.append(f"save failed at step {failed_save['step']}: {failed_save.get('reason')}")
    return ", ".join(parts)


def _attempt(attempt: Attempt, now: float) -> str:
    end = attempt.end
    lasted = format_duration((end.at if end else now) - attempt.began)
    text = f"{datetime.fromtimestamp(attempt.began):%Y-%m-%d %H:%M}  {lasted:>12}  from step {attempt.saved:<9,}"
    return f"{text} {end.outcome} at {end.saved:,}: {end.reason}" if end else f"{text} has not ended"
