"""Shares the position of a process in its work with its launcher, through memory that outlives the process. No torch."""

import mmap
import os
import socket
from dataclasses import dataclass
from typing import Literal, get_args

Phase = Literal["start", "data", "forward", "backward", "optimizer", "log", "evaluation", "save", "end"]
PHASES: tuple[Phase, ...] = get_args(Phase)  # in the order of a step
PAGE = "VAN_PRETRAIN_POSITION"  # environment variable with the file descriptor of the shared memory
_BYTES = 3 * 8


@dataclass(frozen=True, order=True)
class Position:
    """Describes how far a process has come; positions are ordered by progress."""

    step: int  # counted from 0
    micro_step: int
    phase: int  # index into PHASES

    def __str__(self) -> str:
        if self.computed_step is None:
            return f"its {PHASES[self.phase]}"
        return f"step {self.step} ({PHASES[self.phase]})"

    @property
    def computed_step(self) -> int | None:
        """Returns the step that is being computed; None at the start and the end of a job."""
        return None if PHASES[self.phase] in ("start", "end") else self.step

    @classmethod
    def read(cls, page: int) -> "Position":
        """Returns the position in shared memory."""
        with mmap.mmap(page, _BYTES) as memory, memoryview(memory).cast("q") as numbers:
            return cls(*numbers)


class SharedPosition:
    """Holds the position of this process, in memory shared with its launcher if there is one."""

    def __init__(self) -> None:
        page = os.environ.get(PAGE)
        self._numbers = memoryview(mmap.mmap(int(page) if page else -1, _BYTES)).cast("q")

    def set(self, step: int, phase: Phase, micro_step: int | None = None) -> None:
        """Sets the position; without a micro-step, the phase belongs to the last one that was set."""
        micro_step = self._numbers[1] if micro_step is None else micro_step
        self._numbers[0], self._numbers[1], self._numbers[2] = step, micro_step, PHASES.index(phase)

    def get(self) -> Position:
        """Returns the position."""
        return Position(*self._numbers)


def host_name() -> str:
    """Returns the name of this machine; in a Slurm job, Slurm's name for it."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def create_page() -> int:
    """Returns the file descriptor of memory for `SharedPosition`, to be inherited by the process."""
    page = os.memfd_create("position")
    os.ftruncate(page, _BYTES)
    return page
