"""Runs one task of a Slurm step: starts a rank, prints its output and reports how it ended.

When a rank fails, the job's log has the rank's number, node, cause of failure, current step and last lines; an event carries the same to
launch/supervisor.py. The task's exit code is 0 for a rank that completed or that saved on request, because any other code makes srun end
all tasks at once (--kill-on-bad-exit), including those that are still saving.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from pretrain.run.events import emit_event
from pretrain.run.exit_codes import EXIT_CONFIG, EXIT_HUNG, EXIT_REQUEUE, EXIT_STOP_FILE
from pretrain.run.position import PAGE, Position, create_page, host_name

LAST_LINES = 20
# Errors of a rank that lost its connection to another rank: consequences of the other rank's end.
LOST_PEER = re.compile(
    r"connection (was )?(closed|reset)|remote process exited|broken pipe|Dist(Backend|Network|Store)Error", re.IGNORECASE
)
FLUSH_S = 1.0  # srun drops output that arrives after the message about the end of its last task (seen with Slurm 22.05)
LEAVE_S = 3.0  # delay before srun ends the other ranks; a rank with the same fault can still report it


def run(command: Sequence[str]) -> int:
    """Runs rank RANK; returns the task's exit code."""
    rank, node, page = int(os.environ["RANK"]), host_name(), create_page()
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, lambda *_: None)  # Slurm signals the rank itself; SIG_IGN would be inherited by it
    with hold_usr1():
        process = subprocess.Popen(
            command,
            env=os.environ | {PAGE: str(page)},
            pass_fds=[page],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
    assert process.stdout is not None
    last_lines: deque[str] = deque(maxlen=LAST_LINES)
    for line in process.stdout:
        sys.stdout.buffer.write(line)
        sys.stdout.buffer.flush()
        last_lines.append(line.decode(errors="replace").rstrip())
    code, position = process.wait(), Position.read(page)
    last_line = next((line for line in reversed(last_lines) if line.strip()), "")
    is_cause = code != -signal.SIGTERM and LOST_PEER.search(last_line) is None
    reason = f"{describe_end(code)} in {position}"
    if code not in (0, EXIT_REQUEUE, EXIT_CONFIG, EXIT_HUNG, EXIT_STOP_FILE):
        lines = "; its last lines:" + "".join(f"\n  rank {rank} | {line}" for line in last_lines) if is_cause else ""
        print(f"rank {rank} on {node} {reason}{lines}", flush=True)
    emit_event(
        "rank", rank=rank, host=node, code=code, step=position.computed_step, reason=reason, last_line=last_line[:300], cause=is_cause
    )
    time.sleep(LEAVE_S if code in (EXIT_CONFIG, 1) else FLUSH_S)
    return 0 if code in (EXIT_REQUEUE, EXIT_STOP_FILE) else to_shell_code(code)


@contextmanager
def hold_usr1() -> Iterator[None]:
    """Blocks USR1 for processes started inside the block, which it would kill until they have a handler.

    A rank unblocks USR1 before its first step (pretrain/monitor/requests.py), this process at the end of the block.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    yield
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})


def describe_end(code: int) -> str:
    """Returns a phrase for the exit code of a process, such as "was killed by SIGSEGV"."""
    if code >= 0:
        return f"ended with exit code {code}"
    hint = " (possibly out of host memory)" if -code == signal.SIGKILL else ""
    return f"was killed by {signal.Signals(-code).name}{hint}"


def to_shell_code(code: int) -> int:
    """Returns a subprocess exit code as a shell reports it: 128 + N for a process killed by signal N."""
    return code if code >= 0 else 128 - code
