"""What tests share: jobs and ranks to start, drawn data sets, servers, and where things lie in the repository."""

from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
REFERENCE = REPOSITORY / "tests" / "reference"
