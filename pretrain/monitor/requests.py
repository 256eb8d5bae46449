"""Collects stop and save requests, on which all ranks agree at a step boundary.

    with Requests(run / "STOP", save_seconds=600) as requests:
        for each step:
            requests.ask()
            …
            request = requests.answer()     # the same on every rank

A stop is requested by a signal to any rank, USR1 (Slurm, before the time limit), TERM (preemption) or INT (Ctrl-C), or by the file, for
which rank 0 looks. A save is requested by rank 0's clock. The hosts exchange requests during a step, without waiting for the device, and
grant them at its end.
"""

import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType

import torch
import torch.distributed as dist

from pretrain.run.exit_codes import EXIT_REQUEUE, EXIT_STOP_FILE

FILE_POLL_S = 2.0
SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)


@dataclass(frozen=True)
class Request:
    """Holds the requests on which all ranks agree. `exit_code` is 0 unless the job has to stop."""

    exit_code: int
    save: bool


class Requests:
    """Collects the requests of this rank and shares them with the other ranks.

    `file` requests a stop while it exists. Rank 0's `clock` requests a save `save_seconds` after the start or the last save; None: never.
    """

    def __init__(self, file: Path, save_seconds: float | None, clock: Callable[[], float] = time.monotonic):
        self._file, self._save_seconds, self._clock = file, save_seconds, clock
        self._group = dist.new_group(backend="gloo")
        self._is_rank_0 = dist.get_rank() == 0
        self.exit_code = 0  # requested on this rank
        self._saved_at = clock()
        self._handlers: dict[int, object] = {}
        self._closed = threading.Event()

    def __enter__(self) -> "Requests":
        self._handlers = {number: signal.signal(number, self._receive) for number in SIGNALS}
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})  # `python -m pretrain train` blocks it during the start
        if self._is_rank_0:
            threading.Thread(target=self._watch_file, name="stop file", daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._closed.set()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
        for number, handler in self._handlers.items():
            # A job that stops already ignores later signals, which could only change its exit code.
            signal.signal(number, signal.SIG_IGN if self.exit_code else handler)  # type: ignore[arg-type]

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.exit_code = max(self.exit_code, EXIT_REQUEUE)

    def _watch_file(self) -> None:
        while not self._closed.wait(FILE_POLL_S):
            if self._file.exists():  # on a thread, because a file server may be slow
                self.exit_code = EXIT_STOP_FILE

    def ask(self) -> None:
        """Sends this rank's requests to the other ranks and returns at once; call at the beginning of each step. Collective."""
        is_save_due = self._is_rank_0 and self._save_seconds is not None and self._clock() >= self._saved_at + self._save_seconds
        self._requests = torch.tensor([self.exit_code, is_save_due], dtype=torch.int32)
        self._work = dist.all_reduce(self._requests, op=dist.ReduceOp.MAX, group=self._group, async_op=True)

    def answer(self) -> Request:
        """Returns the requests of all ranks as of the last `ask`. Collective.

        A signal to any rank gives EXIT_REQUEUE. The file gives EXIT_STOP_FILE, which takes precedence.
        """
        self._work.wait()
        exit_code, save = self._requests.tolist()
        return Request(exit_code, bool(save))

    def restart_clock(self) -> None:
        """Restarts the time to the next requested save; call after each save."""
        self._saved_at = self._clock()
