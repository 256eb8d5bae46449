"""How a job ends before its time: stop signals, agreed on by all ranks, and errors, told by one of them."""

import signal
import time
from types import FrameType, TracebackType

import torch
import torch.distributed as dist

LINGER = 2.0  # seconds: ranks that fail of the same do so within these

SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """Turns USR1 (Slurm, ahead of the time limit), TERM (preemption) and INT (Ctrl-C) into a stop that all ranks agree on.

    with StopSignals() as stop:
        for each step: …; if stop.agreed(): break
    """

    def __init__(self) -> None:
        self.group = dist.new_group(backend="gloo")
        self.received = torch.zeros(1, dtype=torch.int32)
        self._asking: tuple[torch.Tensor, dist.Work] | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopSignals":
        self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})  # `python -m pretrain train` keeps it waiting during the start
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})  # what it asks for is done; it could only change the exit code
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received.fill_(1)

    def agreed(self) -> bool:
        """Whether any rank had a signal when it asked at the step before; the same answer on every rank. Call once a step.

        Each call asks and takes the answer to the last call's question, which travelled during the step, on the host: nobody
        waits for the device.
        """
        answer = False
        if self._asking is not None:
            told, work = self._asking
            work.wait()
            answer = bool(told.item())
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
