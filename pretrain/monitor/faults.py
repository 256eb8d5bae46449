"""How a job ends before its time: asked to stop, which all ranks agree on, and by errors, told by one of them."""

import signal
import threading
import time
from pathlib import Path
from types import FrameType, TracebackType

import torch
import torch.distributed as dist

from pretrain.run.exit_codes import EXIT_AGAIN, EXIT_ENDED

LOOK_S = 2.0  # between looks for the file that asks for an end
LINGER = 2.0  # seconds: ranks that fail of the same do so within these

SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)


class StopRequests:
    """What asks a job to save and end, agreed on by all ranks: USR1 (Slurm, ahead of the time limit), TERM (preemption) and INT (Ctrl-C),
    which any rank may have had alone, and a file, which rank 0 looks for.

    with StopRequests(run / "STOP") as stop:
        for each step: …; if code := stop.agreed(): break
    """

    def __init__(self, file: Path):
        self.file = file
        self.group = dist.new_group(backend="gloo")
        self.received = torch.zeros(1, dtype=torch.int32)
        self._asking: tuple[torch.Tensor, dist.Work] | None = None
        self._before: dict[int, object] = {}
        self._closed = threading.Event()

    def __enter__(self) -> "StopRequests":
        self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})  # `python -m pretrain train` keeps it waiting during the start
        if dist.get_rank() == 0:
            threading.Thread(target=self._look, name="stop file", daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._closed.set()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
        for number, handler in self._before.items():
            # What a signal asks for is done, and one more could only change the exit code.
            signal.signal(number, signal.SIG_IGN if self.received else handler)  # type: ignore[arg-type]

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received.clamp_(min=EXIT_AGAIN)

    def _look(self) -> None:
        while not self._closed.wait(LOOK_S):
            if self.file.exists():  # on a thread: a file server may take its time
                self.received.fill_(EXIT_ENDED)

    def agreed(self) -> int:
        """The exit code that is asked for: EXIT_AGAIN after a signal to any rank, EXIT_ENDED (which outweighs it) with the file, or 0.
        It is about what ranks had when they asked at the step before; the same on every rank. Call once a step.

        Each call asks and takes the answer to the last call's question, which travelled during the step, on the host: nobody
        waits for the device.
        """
        answer = 0
        if self._asking is not None:
            told, work = self._asking
            work.wait()
            answer = int(told.item())
        told = self.received.clone()
        self._asking = (told, dist.all_reduce(told, op=dist.ReduceOp.MAX, group=self.group, async_op=True))
        return answer


def first_to_say(message: str) -> bool:
    """Whether no other rank has failed with the very same message, as far as one can know: true also where ranks are not joined yet."""
    if not dist.is_initialized():
        return True
    store = dist.distributed_c10d._get_default_store()
    try:
        said = store.add(message, 1)
        # The store ends with rank 0, so that waits for those that are about to ask.
        deadline = time.monotonic() + LINGER
        while dist.get_rank() == 0 and store.add(message, 0) < dist.get_world_size() and time.monotonic() < deadline:
            time.sleep(0.02)
    except dist.DistError:  # rank 0 has ended, and some time ago: of something else
        return True
    return said == 1
