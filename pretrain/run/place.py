"""Where a process is: its host, and where in its work, in memory that it shares with the process that started it.

    launcher: page = shared_page(); start(command, environment | {PAGE: str(page)}, pass_fds=[page]); …; Where.of(page)
    the process itself: place = Place(); place.at(step, "forward", micro_step)

So it is known of a process that was killed as well, in which step it was. Nothing of this needs torch.
"""

import mmap
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

Part = Literal["start", "data", "forward", "backward", "optimizer", "log", "evaluation", "save", "end"]
PARTS: tuple[Part, ...] = get_args(Part)  # in the order of their turn in a step
PAGE = "VAN_PRETRAIN_PLACE"  # environment variable: file descriptor of the shared memory
_BYTES = 3 * 8


@dataclass(frozen=True, order=True)
class Where:
    """Of two places that which is further behind is the lesser."""

    step: int  # counted from 0
    micro_step: int
    part: int  # of PARTS

    def __str__(self) -> str:
        if PARTS[self.part] in ("start", "end"):
            return f"its {PARTS[self.part]}"
        return f"step {self.step} ({PARTS[self.part]})"

    @property
    def computing(self) -> int | None:
        """The step that is being computed, or None before the first one."""
        return None if PARTS[self.part] in ("start", "end") else self.step

    @classmethod
    def of(cls, page: int) -> "Where":
        with mmap.mmap(page, _BYTES) as memory, memoryview(memory).cast("q") as numbers:
            return cls(*numbers)


class Place:
    """This process's, in the memory that its launcher shares with it, if there is one."""

    def __init__(self) -> None:
        shared = os.environ.get(PAGE)
        self._numbers = memoryview(mmap.mmap(int(shared) if shared else -1, _BYTES)).cast("q")

    def at(self, step: int, part: Part, micro_step: int = 0) -> None:
        self._numbers[0], self._numbers[1], self._numbers[2] = step, micro_step, PARTS.index(part)

    def now(self) -> Where:
        return Where(*self._numbers)


def host(environment: Mapping[str, str] = os.environ) -> str:
    """The name of this machine: Slurm's, in a job of Slurm."""
    return environment.get("SLURMD_NODENAME") or socket.gethostname()


def shared_page() -> int:
    """A file descriptor of memory for `Place`, to be inherited."""
    page = os.memfd_create("place")
    os.ftruncate(page, _BYTES)
    return page
