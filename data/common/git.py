"""Identifies the version of this code."""

import subprocess
from pathlib import Path


def git_commit() -> str:
    """Returns the commit of this code, with "-dirty" if files have changed; "unknown" without git or a repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        described = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:  # no git on this machine
        return "unknown"
    return described.stdout.strip() or "unknown"
