"""Ends a job that hangs, with the stacks of all ranks in the log.

Ranks wait for each other in every step, so one rank that hangs stops all of them, and all detect that at about the same time. Each writes
the Python stacks of all its threads to stderr and sends its position to the others, over a separate connection to the store of the process
group. The log names a rank that does not answer, or else the one with the least progress. Then all ranks end with EXIT_HUNG.

The watchdog is a thread and needs the GIL. If another thread never releases the GIL, the thread of faulthandler, which does not need it,
writes the stacks and ends the process.
"""

import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import astuple
from datetime import timedelta

import torch.distributed as dist

from pretrain.run.events import emit_event
from pretrain.run.exit_codes import EXIT_HUNG
from pretrain.run.position import PHASES, Position, SharedPosition

POLL_S = 1.0
ANSWER_S = 10.0  # for the other ranks to send their positions
LONG_PHASES = {PHASES.index(phase) for phase in ("start", "evaluation", "save")}  # have the time limit of the first step


class Watchdog:
    """Ends the process if a step exceeds `step_limit` seconds, or the first step, an evaluation or a save `start_limit` seconds."""

    def __init__(self, position: SharedPosition, hosts: Sequence[str], step_limit: float, start_limit: float):
        self._position, self._hosts = position, hosts
        self._step_limit, self._start_limit = step_limit, start_limit
        self._closed = threading.Event()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def close(self) -> None:
        """Stops watching."""
        self._closed.set()

    def _watch(self) -> None:
        seen, since, first = self._position.get(), time.monotonic(), -1
        while not self._closed.wait(POLL_S):
            faulthandler.dump_traceback_later(self._step_limit + 3 * ANSWER_S, exit=True)
            now = self._position.get()
            if (now.step, now.phase in LONG_PHASES) != (seen.step, seen.phase in LONG_PHASES):
                seen, since = now, time.monotonic()
            if first < 0 and now.phase not in LONG_PHASES:
                first = now.step
            limit = self._start_limit if now.phase in LONG_PHASES or now.step == first else self._step_limit
            if time.monotonic() - since > limit:
                self._end(now, limit)
        faulthandler.cancel_dump_traceback_later()

    def _end(self, position: Position, limit: float) -> None:
        rank = dist.get_rank()
        message = f"rank {rank} on {self._hosts[rank]} has not finished a step for {limit:.0f} s; it is in {position}; its threads:\n"
        os.write(sys.stderr.fileno(), (message + format_stacks()).encode())  # one write, because ranks that share a log all write now
        positions = {rank: position}
        # On a thread: the store is in rank 0's process, and if that is stopped, a client waits regardless of its timeout.
        asking = threading.Thread(target=exchange_positions, args=(rank, positions, len(self._hosts)), daemon=True)
        asking.start()
        asking.join(ANSWER_S)
        positions = dict(positions)
        if rank == min(positions) <= 1:  # rank 0 reports, or rank 1 if rank 0 does not answer
            hung, reason = find_hung_rank(positions, self._hosts)
            print(f"HANG: {reason}", flush=True)
            emit_event("hang", rank=hung, host=self._hosts[hung], step=position.computed_step, reason=reason)
        if rank == 0:
            time.sleep(POLL_S)  # the store ends with this process, and other ranks may still be asking
        os._exit(EXIT_HUNG)


def format_stacks() -> str:
    """Returns the Python stacks of this process's threads."""
    with open(os.memfd_create("stacks"), "r+") as file:  # faulthandler needs a file, and writes it word by word
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()


def exchange_positions(rank: int, positions: dict[int, Position], ranks: int) -> None:
    """Sends this rank's position to the other ranks, and adds theirs to `positions` until the caller stops waiting.

    Ranks above 1 only ask for ranks 0 and 1, to limit the load on the store of a large job. `positions` must hold this rank's position.
    """
    wanted = set(range(ranks)) if rank <= 1 else {0, 1}
    # A separate client, because the process's other client may be what hangs.
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    with suppress(dist.DistError):  # the store is gone with rank 0
        store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=ANSWER_S), wait_for_workers=False)
        store.set(f"hang/{rank}", json.dumps([*astuple(positions[rank])]))
        while missing := wanted - set(positions):
            for other in missing:
                if store.check([f"hang/{other}"]):
                    positions[other] = Position(*json.loads(store.get(f"hang/{other}")))
            time.sleep(POLL_S / 10)
        return
    time.sleep(ANSWER_S)


def find_hung_rank(positions: Mapping[int, Position], hosts: Sequence[str]) -> tuple[int, str]:
    """Returns the rank that stops the others and the reason: no answer (no position), or the least progress."""
    most = max(positions.values())
    silent = sorted(set(range(len(hosts))) - set(positions))
    if silent:
        return silent[0], f"rank {silent[0]} on {hosts[silent[0]]} gives no answer, while others wait in {most}"
    rank = min(positions, key=lambda other: (positions[other], other))
    if positions[rank] == most:
        return rank, f"no rank has less progress than the others: all are in {most}"
    return rank, f"rank {rank} on {hosts[rank]} has the least progress: it is in {positions[rank]}, while others wait in {most}"
