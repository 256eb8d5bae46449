"""What lies where in a run directory, and who trains there: for the job, and for those who only look (status.py).

Nothing here imports torch, so that a look at a run takes tenths of a second.

    RUN/checkpoints/step-000012500    steps(run / CHECKPOINTS), the oldest first
    RUN/lock-000007                   locks(run), the newest last; holder(path) says who, and started(pid) whether it runs, on its machine()
"""

import json
import os
from pathlib import Path
from typing import Any

CHECKPOINTS, METRICS, CONFIG = "checkpoints", "metrics.jsonl", "config.yaml"
MANIFEST, TRAINER, LATEST = "MANIFEST.json", "trainer.json", "latest"  # of a checkpoint, and the newest one's name beside them
BEAT_S, PATIENCE_S = 10.0, 60.0  # a lock's holder touches it so often, and is gone when it has not for so long


def steps(folder: Path) -> list[Path]:
    """A run's checkpoints, whole or not, the oldest first."""
    return sorted(folder.glob("step-" + "[0-9]" * 9))


def name_of(step: int) -> str:
    return f"step-{step:09d}"


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def locks(run: Path) -> list[Path]:
    return sorted(run.glob("lock-" + "[0-9]" * 6))


def holder(path: Path) -> dict[str, Any] | None:
    """Who holds a lock; None while that is being written, or was cut short."""
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None


def machine() -> str:
    """What tells apart all places in which a process number can mean another process: machine, its start, container."""
    return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}/{os.readlink('/proc/self/ns/pid')}"


def started(pid: int) -> int | None:
    """When a process started, in the machine's own count; None where there is no such process, or it has ended."""
    try:
        # proc(5): after the name in brackets, the state is the 3rd field and the start the 22nd.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])
