"""A run's attempts: a job on Slurm is started many times, and each start ends somehow.

RUN/attempts.jsonl has two lines for each, one when it begins and one when it has ended; launch/attempt.py writes them, and
`python -m pretrain status` shows them. An attempt with one line runs, or was lost with its node.

What happens in a job's processes reaches that writer through the job's own output, as lines of one kind: no file system, whose copies on
other nodes may be seconds old, has to carry it.

    tell("rank", rank=3, host="n1", code=137)       in any process: prints such a line
    heard(line)                                     where they arrive: ("rank", {"rank": 3, …}), or None for ordinary output
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

ATTEMPTS = "attempts.jsonl"
FAILED = "FAILED.md"  # what stopped a job for good
STOP = "STOP"  # asks a run to save and end, while it exists
MARK = "@van-pretrain "

# complete: nothing is left to do. stopped: saved on a signal, goes on. ended: saved on RUN/STOP. settings: they can't work, nor will they.
# unfit: preflight named nodes. crashed, hung: as they say.
Outcome = Literal["complete", "stopped", "ended", "settings", "unfit", "crashed", "hung"]


@dataclass(frozen=True)
class End:
    at: float  # seconds since the epoch
    outcome: Outcome
    reason: str  # a line for people
    saved: int  # step of the newest checkpoint
    step: int | None = None  # that was being computed when it failed, counted from 0; None: none was
    rank: int | None = None  # which failed first
    host: str | None = None
    excluded: tuple[str, ...] = ()  # nodes that the next attempt does without
    again: bool = False  # whether the job goes back to the queue


@dataclass(frozen=True)
class Attempt:
    job: str  # Slurm's id
    restart: int  # 0 for the first
    began: float  # seconds since the epoch
    nodes: tuple[str, ...]
    ranks: int
    saved: int  # step of the newest checkpoint it found
    end: End | None = None


def read(run: Path) -> list[Attempt]:
    """All attempts of a run, the first one first. Lines that are cut short, as by a node's end, or are of another kind are passed over."""
    found: dict[tuple[str, int], Attempt] = {}
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
                found[key] = replace(found[key], end=End(**end))
            else:
                numbers = {"began": float(values["began"]), "saved": int(values["saved"])}
                found[key] = Attempt(*key, **values | numbers | {"nodes": tuple(values["nodes"])})
        except (ValueError, TypeError, KeyError, AttributeError):
            continue
    return list(found.values())


def write(run: Path, attempt: Attempt) -> None:
    """Appends that an attempt has begun, or, where it has an end, that it ended."""
    values = asdict(attempt)
    line = {key: values[key] for key in ("job", "restart", "end")} if attempt.end else {k: v for k, v in values.items() if k != "end"}
    with open(run / ATTEMPTS, "a") as file:
        file.write(json.dumps(line) + "\n")


def tell(kind: str, **values: Any) -> None:
    """Prints a line for the job's batch script. Keep it below 1,000 bytes: Slurm passes on longer ones in pieces."""
    print(f"{MARK}{json.dumps({'kind': kind, **values})}", flush=True)


def heard(line: str) -> tuple[str, dict[str, Any]] | None:
    """What `tell` printed: its kind and values; None for another line."""
    if not line.startswith(MARK):
        return None
    values = json.loads(line.removeprefix(MARK))
    return values.pop("kind"), values
