"""Records the attempts of a run: each start of its Slurm job, and how it ended.

RUN/attempts.jsonl has one line for the start of an attempt and one for its end. launch/supervisor.py writes the file,
`python -m pretrain status` shows it. An attempt without an end is running, or was canceled or lost with its node.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

ATTEMPTS = "attempts.jsonl"
FAILED = "FAILED.md"  # summary of a job that failed for good
STOP = "STOP"  # while this file exists, the run saves and ends

# complete: nothing is left to do. stopped: saved on a signal, to be resumed. ended: saved on RUN/STOP. settings: wrong settings or data.
# unfit: preflight rejected nodes. crashed: a rank failed. hung: a step exceeded its time limit.
Outcome = Literal["complete", "stopped", "ended", "settings", "unfit", "crashed", "hung"]


@dataclass(frozen=True)
class End:
    at: float  # seconds since the epoch
    outcome: Outcome
    reason: str  # one line
    saved: int  # step of the newest checkpoint
    step: int | None = None  # computed at the time of the failure, counted from 0; None before the first step
    rank: int | None = None  # the first that failed
    host: str | None = None
    excluded: tuple[str, ...] = ()  # nodes that the next attempt must avoid
    again: bool = False  # whether the job is requeued


@dataclass(frozen=True)
class Attempt:
    job: str  # Slurm's id
    restart: int  # 0 for the first
    began: float  # seconds since the epoch
    nodes: tuple[str, ...]
    ranks: int
    saved: int  # step of the newest checkpoint at the start
    end: End | None = None


def read(run: Path) -> list[Attempt]:
    """Returns all attempts of a run, oldest first; skips invalid lines, such as those cut short by a lost node."""
    attempts: dict[tuple[str, int], Attempt] = {}
    try:
        lines = (run / ATTEMPTS).read_text(errors="replace").splitlines()
    except OSError:
        return []
    for line in lines:
        try:
            values = json.loads(line)
            key = str(values.pop("job")), int(values.pop("restart"))
            if "end" in values:
                end = values["end"]
                end |= {"at": float(end["at"]), "saved": int(end["saved"]), "excluded": tuple(end["excluded"])}
                attempts[key] = replace(attempts[key], end=End(**end))
            else:
                numbers = {"began": float(values["began"]), "saved": int(values["saved"])}
                attempts[key] = Attempt(*key, **values | numbers | {"nodes": tuple(values["nodes"])})
        except (ValueError, TypeError, KeyError, AttributeError):
            continue
    return list(attempts.values())


def write(run: Path, attempt: Attempt) -> None:
    """Appends the end of an attempt, or its start if it has no end yet."""
    values = asdict(attempt)
    line = {key: values[key] for key in ("job", "restart", "end")} if attempt.end else {k: v for k, v in values.items() if k != "end"}
    with open(run / ATTEMPTS, "a") as file:
        file.write(json.dumps(line) + "\n")
