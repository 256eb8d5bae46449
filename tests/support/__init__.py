"""Helpers of several test packages: training jobs, ranks, datasets, servers, and paths of the repository."""

from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
REFERENCE = REPOSITORY / "tests" / "reference"
