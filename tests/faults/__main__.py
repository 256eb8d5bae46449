"""The sweep of jobs as a table; see the package."""

import argparse
import os
import tempfile
import time
from datetime import date
from pathlib import Path

import torch

from data.synthetic.synthesize import synthesize
from tests.faults import jobs
from tests.faults.sweep import STAGES, Case, Result, cases, play
from tests.support import REPOSITORY

DOCUMENT = REPOSITORY / "docs" / "reliability.md"
BEGIN, END = "<!-- sweep: written by python -m tests.faults --write -->", "<!-- end of the sweep -->"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"put the table into {DOCUMENT.name}")
    args = parser.parse_args()
    began = time.monotonic()
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        synthesize(place / "images", classes=4, train=32, val=8)
        for stage in STAGES:
            folder = place / f"undisturbed-{stage}"
            assert jobs.run(folder, place / "images", f"engine.zero_stage={stage}").codes == [0, 0], jobs.log_of(folder)
        for number, case in enumerate(cases()):
            folder = place / str(number)
            rows.append(row(case, play(case, folder, place / "images", place / f"undisturbed-{case.stage}")))
            print(rows[-1], flush=True)
            jobs.clear(folder)
    minutes = (time.monotonic() - began) / 60
    table = "\n".join(
        [
            f"`python -m tests.faults --write`, {date.today()}, {os.cpu_count()} cores, torch {torch.__version__}, {minutes:.0f} minutes:",
            "",
            "| signal to one rank of two | at | ZeRO | the job | made | goes on from | lost | same end |",
            "|---|---|---|---|---|---|---|---|",
            *rows,
        ]
    )
    if args.write:
        before, _, rest = DOCUMENT.read_text().partition(BEGIN)
        DOCUMENT.write_text(f"{before}{BEGIN}\n\n{table}\n\n{END}{rest.partition(END)[2]}")


def row(case: Case, result: Result) -> str:
    goes_on = "complete" if result.resumed is None else f"step {result.resumed}"
    steps = f"{result.lost} step{'' if result.lost == 1 else 's'}"
    same = "yes, bit for bit" if result.same else "NO"
    values = (case.signal.name, case.point, case.stage, result.outcome, f"{result.reached} steps", goes_on, steps, same)
    return f"| {' | '.join(map(str, values))} |"


if __name__ == "__main__":
    main()
