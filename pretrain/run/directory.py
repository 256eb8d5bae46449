"""Names the files of a run directory and reads its lock. Does not import torch, so `status` starts in tenths of a second."""

import json
import os
from pathlib import Path
from typing import Any

CHECKPOINTS, METRICS, CONFIG = "checkpoints", "metrics.jsonl", "config.yaml"
MANIFEST, TRAINER = "MANIFEST.json", "trainer.json"  # files of a checkpoint
LATEST = "latest"  # file next to the checkpoints that names the newest
# The holder of a lock touches the lock file every BEAT_S seconds, and counts as gone after PATIENCE_S seconds without a touch.
BEAT_S, PATIENCE_S = 10.0, 60.0


def list_checkpoints(folder: Path) -> list[Path]:
    """Returns a run's checkpoints, oldest first, complete or not."""
    return sorted(folder.glob("step-" + "[0-9]" * 9))


def checkpoint_name(step: int) -> str:
    return f"step-{step:09d}"


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def list_locks(run: Path) -> list[Path]:
    return sorted(run.glob("lock-" + "[0-9]" * 6))


def read_lock(path: Path) -> dict[str, Any] | None:
    """Returns the holder of a lock, or None for a file that is incomplete or gone."""
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None


def machine_id() -> str:
    """Returns an id of the boot and the PID namespace, within which a process id is unique."""
    return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}/{os.readlink('/proc/self/ns/pid')}"


def process_start(pid: int) -> int | None:
    """Returns the start time of a process in clock ticks since boot, or None if there is no such running process."""
    try:
        # proc(5): after the name in parentheses, the state is field 3 and the start time field 22.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])
