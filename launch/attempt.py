"""What becomes of a job on Slurm: reads the output of an attempt, and says whether the job is started again.

    { srun …; tell the step's exit code; } 2>&1 | python -m launch.attempt CONFIG key=value … 2> verdict        in launch/job.sh

Passes the output on, also to RUN/logs/JOB-RESTART.log, but for the lines that processes `tell`. When it has ended, RUN/attempts.jsonl gets
a line, and stderr one for the script:

    complete                    training is complete, and the weights are exported
    again SECONDS [NODE,NODE]   back to the queue, not before so many seconds, without these nodes
    end CODE                    not again

A job that was told to stop, or that failed, goes on as long as it makes progress (`judge`). It ends when the same step has failed twice in
a row, or when it has failed more than guard.restarts times without a new checkpoint; then RUN/FAILED.md sums up. Settings that can't work
are never tried again. What is submitted anew starts with a clean slate.
"""

import os
import re
import signal
import sys
import time
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from data.common.command_line import job_words
from data.common.config_files import ConfigError
from pretrain import config as settings
from pretrain.run import attempts
from pretrain.run.attempts import FAILED, Attempt, End, heard
from pretrain.run.directory import CHECKPOINTS, list_checkpoints, step_of
from pretrain.run.exit_codes import EXIT_AGAIN, EXIT_CONFIG, EXIT_ENDED, EXIT_HUNG, EXIT_UNFIT

FAILURES = ("crashed", "hung", "unfit")
SHORTEST_DELAY_S, LONGEST_DELAY_S = 120, 3600  # before a job is started again that made no progress; doubles each time. Slurm's own is 120
TWICE = 2  # failures of ranks on one node, after which the job does without the node
LAST_LINES = 60
# What CUDA and the driver say of a GPU that is gone for good.
DEAD_GPU = re.compile(r"uncorrectable (ECC|NVLink)|GPU is lost|fallen off the bus|devices? (is|are) busy or unavailable", re.IGNORECASE)
NODE_FAILURE = re.compile(r"Node failure on (\S+)")  # srun


@dataclass
class Heard:
    """What an attempt's output told."""

    ranks: list[dict[str, Any]] = field(default_factory=list)  # that have ended, in that order
    hang: dict[str, Any] | None = None
    unfit: dict[str, str] = field(default_factory=dict)  # node: why
    code: int = 0  # of the last step
    last: deque[str] = field(default_factory=lambda: deque(maxlen=LAST_LINES))  # of its lines


def main() -> int:
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # for the ranks; what becomes of them is told here
    try:
        # Whether what they name is there is preflight's affair: it may be missing on this node alone.
        config = settings.load(*job_words(sys.argv[1:]), unchecked=settings.ON_A_NODE)
        run = Path(config.run.dir)
        this, history = begin(run)
        log = open(run / "logs" / f"{this.job}-{this.restart}.log", "ab")  # noqa: SIM115
    except (ConfigError, OSError):  # preflight and the ranks say what is wrong
        listen(sys.stdin.buffer, None)
        print(f"end {EXIT_CONFIG}", file=sys.stderr)
        return 0
    told = listen(sys.stdin.buffer, log)
    end = conclude(told, newest(run), this.ranks)
    if end.outcome == "complete" and config.run.export:
        end = export(run, end)
    end = judge(history, replace(this, end=end), config.guard.restarts)
    this = replace(this, end=end)
    reason = "what can't work is told above" if end.outcome == "settings" else end.reason
    print(f"attempt {this.restart + 1} {end.outcome}: {reason}", flush=True)
    try:
        attempts.write(run, this)
        if end.outcome in FAILURES and not end.again:
            (run / FAILED).write_text(summary(run, [*history, this], told.last))
    except OSError as error:  # a full disk costs the record, not the job
        print(f"how this attempt ended could not be recorded in {run}: {error}", flush=True)
    print(verdict([*history, this]), file=sys.stderr)
    return 0


def begin(run: Path) -> tuple[Attempt, list[Attempt]]:
    """Records that this attempt has begun; returns it, and those of the same job before it."""
    (run / "logs").mkdir(parents=True, exist_ok=True)
    job, restart, nodes = os.environ["SLURM_JOB_ID"], int(os.environ.get("SLURM_RESTART_COUNT", 0)), os.environ["NODES"].split()
    this = Attempt(job, restart, time.time(), tuple(nodes), int(os.environ["RANKS"]), saved=newest(run))
    history = [attempt for attempt in attempts.read(run) if attempt.job == job]
    attempts.write(run, this)
    (run / FAILED).unlink(missing_ok=True)
    print(f"attempt {restart + 1} of job {job}: {this.ranks} ranks on {' '.join(nodes)}", flush=True)
    return this, history


def listen(output: IO[bytes], log: IO[bytes] | None) -> Heard:
    """Passes the lines of an attempt on until they end."""
    told = Heard()
    for line in output:
        text = line.decode(errors="replace").rstrip()
        if (said := heard(text)) is not None:
            _note(told, *said)
            continue
        told.last.append(text)
        for place in (sys.stdout.buffer, log):
            if place is not None:
                with suppress(OSError):  # a full disk must not end a job for a line
                    place.write(line)
                    place.flush()
    return told


def _note(told: Heard, kind: str, values: dict[str, Any]) -> None:
    if kind == "rank":
        told.ranks.append(values)
    elif kind == "node":
        told.unfit[values["host"]] = values["why"]
    elif kind == "hang":
        told.hang = values
    elif kind == "step":
        told.code = values["code"]


def conclude(told: Heard, saved: int, ranks: int) -> End:
    """How an attempt of so many ranks ended, and what of."""
    now = time.time()
    stopped = End(now, "stopped", f"told to stop; saved at step {saved}", saved)
    if told.code == 128 + signal.SIGUSR1:  # it came before a task could heed it, and what else failed, failed of that
        return stopped
    if told.unfit:
        return End(now, "unfit", "; ".join(f"{node}: {why}" for node, why in told.unfit.items()), saved, excluded=tuple(told.unfit))
    failed = [rank for rank in told.ranks if rank["code"] not in (0, EXIT_AGAIN, EXIT_ENDED)]
    if told.hang is not None:
        where = {key: told.hang[key] for key in ("step", "rank", "host")}
        return End(now, "hung", told.hang["reason"], saved, **where)
    lost = next((found[1] for line in told.last if (found := NODE_FAILURE.search(line))), None)
    if failed:
        first = next((rank for rank in failed if rank["cause"]), failed[0])
        blamed = {"rank": first["rank"], "host": first["host"]} if first["cause"] else {"host": lost}
        reason = f"rank {first['rank']} on {first['host']} {first['why']}" + (f": {first['said']}" if first["code"] > 0 else "")
        outcomes: dict[int, attempts.Outcome] = {EXIT_CONFIG: "settings", EXIT_HUNG: "hung"}
        dead = DEAD_GPU.search("\n".join([first["said"], *(line for line in told.last if line.startswith(f"  rank {first['rank']} | "))]))
        return End(
            now, outcomes.get(first["code"], "crashed"), reason, saved, step=first["step"], **blamed,
            excluded=(first["host"],) if dead else (),
        )  # fmt: skip
    codes = {told.code, *(rank["code"] for rank in told.ranks)}
    if EXIT_ENDED in codes:
        return End(now, "ended", f"asked to by {attempts.STOP}; saved at step {saved}", saved)
    if EXIT_AGAIN in codes:
        return stopped
    if told.code:
        reason = next((line for line in reversed(told.last) if "error" in line), f"the step ended with exit code {told.code}")
        return End(now, "settings" if told.code == EXIT_CONFIG else "crashed", reason, saved, host=lost)
    if silent := sorted(set(range(ranks)) - {rank["rank"] for rank in told.ranks}):
        return End(now, "crashed", f"rank {silent[0]} did not say how it ended", saved)
    return End(now, "complete", f"complete at step {saved}", saved)


def export(run: Path, end: End) -> End:
    """Exports the weights of a run that is complete; where that fails, the attempt has."""
    from pretrain.weights.export import release

    try:
        release(run)
    except Exception as error:  # whatever it is, the run itself is safe, and another attempt only exports
        return replace(end, outcome="crashed", reason=f"training is complete, but not exported: {type(error).__name__}: {error}")
    return end


def judge(history: Sequence[Attempt], this: Attempt, restarts: int) -> End:
    """The end of `this` attempt, with the decision about another, and which nodes that should do without.

    Args:
        history: the attempts of the job before it.
        restarts: failures without a new checkpoint that are allowed.
    """
    end = this.end
    assert end is not None
    if end.outcome == "stopped":
        return replace(end, again=True)
    if end.outcome not in FAILURES:
        return end
    before = history[-1].end if history else None
    if end.step is not None and before is not None and before.outcome in FAILURES and before.step == end.step:
        return replace(end, reason=f"step {end.step} has failed twice in a row: {end.reason}")
    if (count := fruitless([*history, this])) > restarts:
        return replace(end, reason=f"{count} failures without a new checkpoint (guard.restarts={restarts}); the last: {end.reason}")
    ends = [attempt.end for attempt in (*history, this) if attempt.end is not None and attempt.end.outcome in FAILURES]
    repeated = end.host is not None and [other.host for other in ends].count(end.host) >= TWICE
    return replace(end, again=True, excluded=tuple(sorted({*end.excluded, *([end.host] if repeated and end.host else [])})))


def fruitless(run: Sequence[Attempt]) -> int:
    """Of these attempts, how many of the last ones left no newer checkpoint than they had found."""
    count = 0
    for attempt, following in zip(reversed(run), [None, *reversed(run)], strict=False):
        saved = attempt.end.saved if attempt.end else following.saved if following else attempt.saved
        if saved > attempt.saved:
            break
        count += 1
    return count


def verdict(run: Sequence[Attempt]) -> str:
    """The line for launch/job.sh."""
    end = run[-1].end
    assert end is not None
    if end.again:
        count = fruitless(run)
        seconds = min(SHORTEST_DELAY_S * 2 ** (count - 1), LONGEST_DELAY_S) if count and end.outcome in FAILURES else 0
        return f"again {seconds} {','.join(end.excluded)}".rstrip()
    return {"complete": "complete", "settings": f"end {EXIT_CONFIG}", "ended": f"end {EXIT_ENDED}", "unfit": f"end {EXIT_UNFIT}"}.get(
        end.outcome, "end 1"
    )


def summary(run: Path, history: Sequence[Attempt], last: Iterable[str]) -> str:
    """FAILED.md: what stopped the job for good."""
    end = history[-1].end
    assert end is not None
    rows = [
        f"| {attempt.restart + 1} | {_time(attempt.began)} | {_time(attempt.end.at) if attempt.end else ''} | {' '.join(attempt.nodes)} "
        f"| {attempt.saved} | {attempt.end.saved if attempt.end else ''} | {_cell(attempt.end)} |"
        for attempt in history
    ]
    who = f", rank {end.rank} on {end.host}" if end.rank is not None else ""
    where = f"Step {end.step}{who}." if end.step is not None else ""
    return f"""# Job {history[-1].job} in {run} has ended: {end.outcome}

{end.reason}

{where} The newest checkpoint is of step {end.saved}; nothing before it is lost. When the cause is mended, submit the same command again.
Each attempt's output is in {run / "logs"}.

| attempt | began | ended | nodes | from step | saved | how it ended |
|---|---|---|---|---|---|---|
{chr(10).join(rows)}

The last lines:

```
{chr(10).join(last)}
```
"""


def _cell(end: End | None) -> str:
    return f"{end.outcome}: {end.reason.replace('|', '/')}" if end else "without a word: the node was lost, or the job cancelled"


def _time(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def newest(run: Path) -> int:
    """Step of the newest checkpoint, which has its name only since it is whole; 0 without one."""
    found = list_checkpoints(run / CHECKPOINTS)
    return step_of(found[-1]) if found else 0


if __name__ == "__main__":
    sys.exit(main())
