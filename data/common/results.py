"""Results of measurements, kept in a JSON file together with the machine, commit and versions.

record_result(Path("benchmarks/results/packing.json"), "python -m benchmarks.packing", ["numpy", "pillow"], rows=[…])
"""

import json
import os
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any


def record_result(out: Path, command: str, packages: Sequence[str], **result: Any) -> None:
    """Adds a result to a list in a JSON file and replaces an earlier result of the same command.

    Args:
        out: the file, which is created if it does not exist.
        command: repeats the measurement.
        packages: names of those whose versions matter.
        result: the measured values; numbers are rounded to four digits.
    """
    entry = {
        "command": command,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "commit": git_commit(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
        **result,
    }
    entry = json.loads(json.dumps(entry), parse_float=lambda text: float(f"{float(text):.4g}"))
    others = json.loads(out.read_text()) if out.exists() else []
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps([*(other for other in others if other["command"] != command), entry], indent=1) + "\n")


def git_commit() -> str:
    """Returns the commit of this code, with `-dirty` where files were changed since; "unknown" outside of a repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        described = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:  # git is not installed
        return "unknown"
    return described.stdout.strip() or "unknown"
