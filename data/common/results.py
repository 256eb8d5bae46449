"""Results of measurements, kept in a file with what it takes to judge and repeat them.

record(Path("benchmarks/results/packing.json"), "python -m benchmarks.packing", ["numpy", "pillow"], rows=[…])
"""

import json
import os
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any


def record(out: Path, command: str, packages: Sequence[str], **result: Any) -> None:
    """Puts a result into a list of them in JSON, in place of an earlier one of the same command, with machine, commit and versions."""
    found = {
        "command": command,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "commit": git_commit(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
        **result,
    }
    found = json.loads(json.dumps(found), parse_float=lambda text: float(f"{float(text):.4g}"))  # figures to four digits
    others = json.loads(out.read_text()) if out.exists() else []
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps([*(other for other in others if other["command"] != command), found], indent=1) + "\n")


def git_commit() -> str:
    """Of this code, with a mark where files were changed since."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"], cwd=Path(__file__).parent, capture_output=True, text=True
        )
    except OSError:  # no git on this machine
        return "unknown"
    return described.stdout.strip() or "unknown"
