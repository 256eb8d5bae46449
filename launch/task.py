"""One task of a Slurm step: starts its rank, passes its output on, and says how it ended.

Where a rank fails, the job's log has its number and host, what it died of, the step it was in, and its last lines; `tell` says the same
to launch/attempt.py. The task's exit code is 0 for a rank that ended as it should (training complete, or saved on request), so that
nobody's is ended by Slurm while others still save; any other ends the step (srun --kill-on-bad-exit).
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

from pretrain.run.attempts import tell
from pretrain.run.exit_codes import EXIT_AGAIN, EXIT_CONFIG, EXIT_ENDED, EXIT_HUNG
from pretrain.run.position import PAGE, Position, create_page, host_name

LAST_LINES = 20
# What a rank says that failed because another was gone.
LOST_PEER = re.compile(
    r"connection (was )?(closed|reset)|remote process exited|broken pipe|Dist(Backend|Network|Store)Error", re.IGNORECASE
)
HEARD_S = 1.0  # before a task ends: srun drops what reaches it behind the message that the last task has ended (seen with Slurm 22.05)
LEAVE_S = 3.0  # before other ranks are ended: they may be about to fail of the same, and be the ones who say why


def run(command: Sequence[str]) -> int:
    """Runs a rank, whose number is in RANK; returns the task's exit code."""
    rank, node, page = int(os.environ["RANK"]), host_name(), create_page()
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, lambda *_: None)  # Slurm sends it to the rank too. Not SIG_IGN, which the rank would inherit
    with usr1_waiting():
        process = subprocess.Popen(
            command,
            env=os.environ | {PAGE: str(page)},
            pass_fds=[page],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
    assert process.stdout is not None
    last: deque[str] = deque(maxlen=LAST_LINES)
    for line in process.stdout:
        sys.stdout.buffer.write(line)
        sys.stdout.buffer.flush()
        last.append(line.decode(errors="replace").rstrip())
    code, position = process.wait(), Position.read(page)
    said = next((line for line in reversed(last) if line.strip()), "")
    cause = code != -signal.SIGTERM and LOST_PEER.search(said) is None  # or else the effect of another rank's failure
    if code not in (0, EXIT_AGAIN, EXIT_CONFIG, EXIT_HUNG, EXIT_ENDED):
        lines = "; its last lines:" + "".join(f"\n  rank {rank} | {line}" for line in last) if cause else ""
        print(f"rank {rank} on {node} {died(code)} in {position}{lines}", flush=True)
    why = f"{died(code)} in {position}"
    tell("rank", rank=rank, host=node, code=code, step=position.computed_step, why=why, said=said[:300], cause=cause)
    time.sleep(LEAVE_S if code in (EXIT_CONFIG, 1) else HEARD_S)
    if code in (0, EXIT_AGAIN, EXIT_ENDED):
        return 0
    return code if code > 0 else 128 - code  # killed by a signal: as a shell reports it


@contextmanager
def usr1_waiting() -> Iterator[None]:
    """What is started inside has USR1 held back, so that one in the moments before Python runs doesn't kill it: a rank takes it before its
    first step (pretrain/monitor/faults.py). This process takes it at the end."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    yield
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})


def died(code: int) -> str:
    """What an exit code says, for people."""
    if code >= 0:
        return f"ended with exit code {code}"
    hint = " (out of the host's memory, perhaps)" if -code == signal.SIGKILL else ""
    return f"was killed by {signal.Signals(-code).name}{hint}"
