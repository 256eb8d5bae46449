"""Shared parts of all benchmarks: command line, interleaved measurement, tables, result files.

A benchmark compares cases. Its `main` adds options to `make_parser`, measures all cases with `run_in_turns`, and ends with `report`. That
prints the rows as a table and stores them with machine, commit and versions, enough to judge and repeat the measurement.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from data.common.git import git_commit
from data.common.text import format_table

if TYPE_CHECKING:
    import torch

RESULTS = Path(__file__).parent / "results"
T = TypeVar("T")


def make_parser(module: str, description: str | None) -> argparse.ArgumentParser:
    """Makes the parser of `python -m module`, with the option --out FOLDER."""
    result = argparse.ArgumentParser(
        prog=f"python -m {module}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("--out", type=Path, metavar="FOLDER", default=RESULTS, help="for the result as JSON (benchmarks/results)")
    return result


def format_command(module: str, options: Mapping[str, Any]) -> str:
    """Formats the command of a measurement: `python -m module` with the options that are neither None nor False."""
    words = ["python", "-m", module]
    for name, value in options.items():
        if value is None or value is False:
            continue
        words.append(f"--{name.replace('_', '-')}")
        if value is not True:
            words += map(str, value) if isinstance(value, list) else [str(value)]
    return " ".join(words)


def time_call(run: Callable[[], object]) -> float:
    """Returns the wall-clock seconds of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def synchronize(device: "torch.device") -> None:
    """Waits until a GPU has finished all launched work; does nothing for a CPU."""
    if device.type == "cuda":
        import torch  # slow to import, and some benchmarks need no torch

        torch.cuda.synchronize(device)


def run_in_turns(cases: Mapping[str, Callable[[], T]], rounds: int, *, warm_up: bool = False) -> dict[str, list[T]]:
    """Calls every case once per round and returns the results of each case.

    Load and temperature of the machine then affect all cases alike, so ratios between cases are more reliable than their times.

    Args:
        cases: measurements by name.
        rounds: number of results per case. Every second round calls the cases in reverse order.
        warm_up: whether to add a first round whose results are discarded.
    """
    results: dict[str, list[T]] = {name: [] for name in cases}
    for number in range(-1 if warm_up else 0, rounds):
        for name in cases if number % 2 == 0 else reversed(list(cases)):
            result = cases[name]()
            if number >= 0:
                results[name].append(result)
    return results


def median_ratio(values: Sequence[float], others: Sequence[float]) -> float:
    """Returns the median over the rounds of value / other value."""
    return statistics.median(value / other for value, other in zip(values, others, strict=True))


def deciles(values: Sequence[float]) -> dict[str, float]:
    """Returns the median, the 10th and the 90th percentile."""
    tenths = statistics.quantiles(values, n=10, method="inclusive") if len(values) > 1 else [values[0]]
    return {"median": statistics.median(values), "tenth": tenths[0], "ninetieth": tenths[-1]}


def format_rows(rows: Sequence[Mapping[str, Any]]) -> str:
    """Formats the rows as a table with a column for each key.

    A list of numbers (one for each round) and a result of `deciles` become "median (10th to 90th percentile)".
    """
    keys = list(dict.fromkeys(key for row in rows for key in row))
    heads = [key.replace("_per_", "/").replace("_", " ") for key in keys]
    return format_table([heads, *([_cell(row.get(key)) for key in keys] for row in rows)], left={0})


def _cell(value: Any) -> str:
    match value:
        case None:
            return ""
        case float():
            return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
        case list():
            return _cell(deciles(value))
        case {"median": median, "tenth": tenth, "ninetieth": ninetieth}:
            return f"{_cell(median)} ({_cell(tenth)} to {_cell(ninetieth)})"
        case _:
            return str(value)


def report(path: Path, command: str, packages: Iterable[str], **content: Any) -> None:
    """Prints the rows as tables and stores a measurement in a result file.

    Args:
        path: a JSON list of measurements. An earlier measurement with the same command is replaced, others stay.
        command: the command that repeats the measurement.
        packages: distributions whose versions matter.
        content: figures and facts by name; a list of dicts is a table. Numbers are stored with four significant digits.
    """
    for value in content.values():
        if _is_table(value):
            print(f"{format_rows(value)}\n", flush=True)
    versions = {"python": platform.python_version()} | {name: version(name) for name in packages}
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    measurement = {"command": command, "machine": machine, "commit": git_commit(), "versions": versions, **content}
    measurement = json.loads(json.dumps(measurement), parse_float=lambda text: float(f"{float(text):.4g}"))
    others = json.loads(path.read_text()) if path.exists() else []
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(to_json([*(other for other in others if other["command"] != command), measurement]))


def to_json(measurements: Sequence[Mapping[str, Any]]) -> str:
    """Returns the measurements as JSON with one line for each key and for each row of a table."""
    texts = []
    for measurement in measurements:
        lines = []
        for key, value in measurement.items():
            text = json.dumps(value, ensure_ascii=False)
            if _is_table(value):
                text = "[\n" + ",\n".join(f"   {json.dumps(row, ensure_ascii=False)}" for row in value) + "\n  ]"
            lines.append(f"  {json.dumps(key)}: {text}")
        texts.append(" {\n" + ",\n".join(lines) + "\n }")
    return "[\n" + ",\n".join(texts) + "\n]\n"


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)
