"""All ranks of a step at one end of a line to rank 0, before any of them has imported torch, which may take a cold file system a minute.

    with Lead(port, ranks=16, patience=20) as lead:        # on rank 0, which follows itself like all others
        absent = lead.call()
        answers, silent = lead.ask({3: {"task": "looking", …}}, patience=20)
        lead.end(code)

    code = follow((address, port), {"rank": 3, "node": "n1"}, {"looking": look}, patience=20)

Lines of JSON over TCP, so that nothing which arrives is executed. A rank that dies closes its line, and is told from one that hangs.
"""

import json
import queue
import socket
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

_HELLO_SECONDS = 5.0
_PINGS = 5
Task = Callable[[dict[str, Any], Callable[[str], None]], Any]


@dataclass(frozen=True)
class Silent:
    """What became of a rank that gave no answer. `failed`: it has said why; the text goes on after "rank 3"."""

    kind: Literal["ended", "hung", "failed"]
    text: str


@dataclass
class _Line:
    """To a rank: what it said of itself, and what it said last that it is doing."""

    hello: dict[str, Any]
    socket: socket.socket
    doing: str = ""
    arrived: deque[dict[str, Any]] = field(default_factory=deque)
    rest: bytes = b""  # of a message that has not wholly arrived

    def send(self, message: dict[str, Any]) -> None:
        self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> dict[str, Any] | None:
        """The next message; None where the other side has ended."""
        while not self.arrived:
            try:
                data = self.socket.recv(1 << 16)
            except ConnectionError:
                return None
            if not data:
                return None
            *whole, self.rest = (self.rest + data).split(b"\n")
            self.arrived.extend(map(json.loads, whole))
        return self.arrived.popleft()


class Lead:
    """Raises OSError where the port is taken."""

    def __init__(self, port: int, ranks: int, patience: float) -> None:
        self.ranks, self.patience = ranks, patience
        self.lines: dict[int, _Line] = {}
        self.server = socket.create_server(("", port), backlog=ranks)
        self.port: int = self.server.getsockname()[1]

    def call(self) -> list[int]:
        """Waits for the ranks, until none has come for `patience` seconds; returns those that did not come."""
        deadline = time.monotonic() + self.patience
        while len(self.lines) < self.ranks and (left := deadline - time.monotonic()) > 0:
            self.server.settimeout(left)
            try:
                line = _greet(self.server.accept()[0])
            except (OSError, ValueError):  # time is up, or somebody who is no rank
                continue
            self.lines[line.hello["rank"]] = line
            deadline = time.monotonic() + self.patience
        return [rank for rank in range(self.ranks) if rank not in self.lines]

    def ask(self, tasks: Mapping[int, dict[str, Any]], patience: float) -> tuple[dict[int, Any], dict[int, Silent]]:
        """Gives ranks their tasks, each named by what a rank then does; returns the answers, and what became of ranks that gave none.

        A rank has `patience` seconds from one thing that it says it is doing to the next.
        """
        answers: dict[int, Any] = {}
        silent: dict[int, Silent] = {}
        waiting, deadlines = {}, {}
        for rank, task in tasks.items():
            line = self.lines[rank]
            line.doing = task["task"]
            try:
                line.send(task)
            except OSError:
                silent[rank] = Silent("ended", "has ended")
                continue
            waiting[line.socket] = rank
            deadlines[rank] = time.monotonic() + patience
        while waiting:
            ready = wait(list(waiting), timeout=max(0, min(deadlines[rank] for rank in waiting.values()) - time.monotonic()))
            for source in ready:
                rank = waiting[source]  # type: ignore[index]
                line = self.lines[rank]
                message = line.receive()
                while message is not None and "doing" in message and line.arrived:  # what has come with it is not waited for
                    line.doing, message = message["doing"], line.receive()
                if message is not None and "doing" in message:
                    line.doing, deadlines[rank] = message["doing"], time.monotonic() + patience
                    continue
                del waiting[source]  # type: ignore[arg-type]
                if message is None:
                    silent[rank] = Silent("ended", f"ended while {line.doing}")
                elif "error" in message:
                    silent[rank] = Silent("failed", f"failed while {line.doing}: {message['error']}")
                else:
                    answers[rank] = message["answer"]
            for source, rank in list(waiting.items()):
                if source not in ready and time.monotonic() >= deadlines[rank]:
                    silent[rank] = Silent("hung", f"has not answered for {patience:g} s while {self.lines[rank].doing}")
                    del waiting[source]
        return answers, silent

    def clock(self, rank: int) -> float | None:
        """Seconds that this rank's clock is ahead of rank 0's; None where it does not answer. Only between `ask`s."""
        line = self.lines[rank]
        line.socket.settimeout(self.patience)
        samples = []
        try:
            for _ in range(_PINGS):
                sent = time.time()
                line.send({"task": "time"})
                answer = line.receive()
                if answer is None:
                    return None
                samples.append((sent, answer["answer"], time.time()))
        except OSError:
            return None
        line.socket.settimeout(None)
        return offset(samples)

    def end(self, code: int) -> None:
        """Every rank's `follow` returns `code`."""
        for line in self.lines.values():
            try:
                line.send({"end": code})
            except OSError:  # it has ended
                continue

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.server.close()


def offset(samples: list[tuple[float, float, float]]) -> float:
    """How far a remote clock is ahead, in seconds, of (sent, its time, received): by the quickest, as NTP does. Off by half of that
    round trip at most."""
    sent, there, received = min(samples, key=lambda sample: sample[2] - sample[0])
    return there - (sent + received) / 2


def _greet(connection: socket.socket) -> _Line:
    """Raises OSError or ValueError for who does not speak like a rank."""
    connection.settimeout(_HELLO_SECONDS)
    line = _Line({}, connection)
    hello = line.receive()
    if not isinstance(hello, dict) or not isinstance(hello.get("rank"), int):
        raise ValueError("no rank")
    connection.settimeout(None)
    line.hello = hello
    return line


def follow(address: tuple[str, int], hello: dict[str, Any], tasks: Mapping[str, Task], patience: float) -> int:
    """Does what the lead asks for, until it gives the exit code, also when a task hangs.

    A task is called with the lead's message and with a function to say what it is doing. Raises OSError where the lead does not answer
    within `patience` seconds, or ends.
    """
    connection = _connect(address, patience)
    line = _Line(hello, connection)
    line.send(hello)
    asked: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_work, args=(line, tasks, asked), daemon=True).start()
    while message := line.receive():
        if "end" in message:
            return message["end"]
        if message["task"] == "time":
            line.send({"answer": time.time()})
        else:
            asked.put(message)
    raise ConnectionError(f"the line to rank 0 at {address[0]}:{address[1]} is closed")


def _work(line: _Line, tasks: Mapping[str, Task], asked: "queue.SimpleQueue[dict[str, Any]]") -> None:
    while True:
        message = asked.get()
        try:
            answer = {"answer": tasks[message["task"]](message, lambda doing: line.send({"doing": doing}))}
        except Exception as error:  # whatever it is, rank 0 is to name this rank
            at = traceback.extract_tb(error.__traceback__)[-1]
            answer = {"error": f"{type(error).__name__}: {error}".splitlines()[0] + f" ({Path(at.filename).name}, line {at.lineno})"}
        line.send(answer)


def _connect(address: tuple[str, int], patience: float) -> socket.socket:
    deadline = time.monotonic() + patience
    while True:
        try:
            connection = socket.create_connection(address, timeout=max(0.1, deadline - time.monotonic()))
            connection.settimeout(None)
            return connection
        except OSError as error:
            if time.monotonic() >= deadline:
                raise OSError(f"rank 0 at {address[0]}:{address[1]} has not answered for {patience:g} s ({error})") from error
            time.sleep(0.1)
