"""Turns a hang into stacks in the log and an end.

    watchdog = Watchdog(place, hosts, step_limit, start_limit)
    for each step: place.at(step, "data", micro_step); …; place.at(step, "forward", micro_step); …          place.py
    watchdog.close()

Ranks meet in every step, so one that hangs holds all of them up, and all notice within moments. Each writes the Python stacks of all its
threads to stderr, and tells the others where it is, by a connection of its own to the store that joined them. The rank that gives no
answer, or else is furthest behind, is named; then all end, with EXIT_HUNG.

The watchdog is a thread and needs the interpreter's lock now and then. Should something hold that for good, faulthandler's thread, which
does without, writes the stacks and ends the process.
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

from pretrain.run.attempts import tell
from pretrain.run.exit_codes import EXIT_HUNG
from pretrain.run.place import PARTS, Place, Where

POLL_S = 1.0
ANSWER_S = 10.0  # for the other ranks to tell where they are
LONG = {PARTS.index(part) for part in ("start", "evaluation", "save")}  # parts that may take as long as the first step


class Watchdog:
    """Args:
    hosts: of the ranks.
    step_limit: seconds that a step may take.
    start_limit: seconds that the first step, an evaluation or a save may take.
    """

    def __init__(self, place: Place, hosts: Sequence[str], step_limit: float, start_limit: float):
        self._place, self._hosts = place, hosts
        self._step_limit, self._start_limit = step_limit, start_limit
        self._closed = threading.Event()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def close(self) -> None:
        self._closed.set()

    def _watch(self) -> None:
        seen, since, first = self._place.now(), time.monotonic(), -1
        while not self._closed.wait(POLL_S):
            faulthandler.dump_traceback_later(self._step_limit + 3 * ANSWER_S, exit=True)
            now = self._place.now()
            if (now.step, now.part in LONG) != (seen.step, seen.part in LONG):
                seen, since = now, time.monotonic()
            if first < 0 and now.part not in LONG:
                first = now.step
            limit = self._start_limit if now.part in LONG or now.step == first else self._step_limit
            if time.monotonic() - since > limit:
                self._end(now, limit)
        faulthandler.cancel_dump_traceback_later()

    def _end(self, where: Where, limit: float) -> None:
        rank = dist.get_rank()
        here = f"rank {rank} on {self._hosts[rank]}"
        told = f"{here} has not finished a step for {limit:.0f} s; it is in {where}; its threads:\n{stacks()}"
        os.write(sys.stderr.fileno(), told.encode())  # in one piece: ranks that share a log all write at this moment
        answers = {rank: where}
        # On a thread: the store is of rank 0's process, and its client waits for one that is stopped, whatever its timeout says.
        asking = threading.Thread(target=exchange, args=(rank, answers, len(self._hosts)), daemon=True)
        asking.start()
        asking.join(ANSWER_S)
        answers = dict(answers)
        if rank == min(answers) <= 1:  # rank 0 speaks, or, where that gives no answer, rank 1
            rank_behind, reason = behind(answers, self._hosts)
            print(f"HANG: {reason}", flush=True)
            tell("hang", rank=rank_behind, host=self._hosts[rank_behind], step=where.computing, reason=reason)
        if rank == 0:
            time.sleep(POLL_S)  # the store ends with this process, and others may still be asking
        os._exit(EXIT_HUNG)


def stacks() -> str:
    """Where this process's threads are."""
    with open(os.memfd_create("stacks"), "r+") as file:  # faulthandler writes to a file alone, word by word
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()


def exchange(rank: int, answers: dict[int, Where], ranks: int) -> None:
    """Tells the other ranks where this one is, and fills in where they are, for as long as it is let. Ranks above 1 ask 0 and 1 alone, so
    that a large job does not ask the store too much."""
    wanted = set(range(ranks)) if rank <= 1 else {0, 1}
    # A client of this thread's own: the process's other one may be what hangs.
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    with suppress(dist.DistError):  # the store is gone with rank 0
        store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=ANSWER_S), wait_for_workers=False)
        store.set(f"hang/{rank}", json.dumps([*astuple(answers[rank])]))
        while missing := wanted - set(answers):
            for other in missing:
                if store.check([f"hang/{other}"]):
                    answers[other] = Where(*json.loads(store.get(f"hang/{other}")))
            time.sleep(POLL_S / 10)
        return
    time.sleep(ANSWER_S)


def behind(answers: Mapping[int, Where], hosts: Sequence[str]) -> tuple[int, str]:
    """The rank that holds the others up, and why that is thought: it gave no answer, or has the least work done."""
    ahead = max(answers.values())
    silent = sorted(set(range(len(hosts))) - set(answers))
    if silent:
        return silent[0], f"rank {silent[0]} on {hosts[silent[0]]} gives no answer, while others wait in {ahead}"
    rank = min(answers, key=lambda other: (answers[other], other))
    if answers[rank] == ahead:
        return rank, f"no rank is behind the others: all are in {ahead}"
    return rank, f"rank {rank} on {hosts[rank]} is behind: it is in {answers[rank]}, while others wait in {ahead}"
