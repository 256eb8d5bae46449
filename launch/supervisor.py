"""Supervises a job: reads the output of an attempt and decides whether to requeue the job.

    { srun …; print the step's exit code; } 2>&1 | python -m launch.supervisor CONFIG key=value … 2> decision        in launch/job.sh

Copies the output, without its events (pretrain/run/events.py), to stdout and RUN/logs/JOB-RESTART.log. At the end of the output it
appends to RUN/attempts.jsonl and prints one line for the script on stderr:

    complete                      training is complete and its weights are exported
    requeue SECONDS [NODE,NODE]   start again after this delay, without these nodes
    end CODE                      do not start again

A job that was stopped, or that failed, is requeued as long as it makes progress (`decide_restart`). It ends when the same step has
failed twice in a row, or after more than guard.restarts failures without a new checkpoint; RUN/FAILED.md then has a summary.
A job with wrong settings is never requeued. Resubmitting a job resets its failures and excluded nodes.
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
from pretrain.run.attempts import FAILED, Attempt, End
from pretrain.run.directory import CHECKPOINTS, list_checkpoints, step_of
from pretrain.run.events import Event, EventReader, is_event
from pretrain.run.exit_codes import EXIT_CONFIG, EXIT_HUNG, EXIT_REQUEUE, EXIT_STOP_FILE, EXIT_UNFIT

FAILURES = ("crashed", "hung", "unfit")
# Delay in seconds before a job without progress restarts; doubles each time, starting at Slurm's own minimum.
FIRST_DELAY_S, LONGEST_DELAY_S = 120, 3600
NODE_FAILURES = 2  # failures of ranks on a node after which the job avoids the node
LAST_LINES = 60
# Messages of CUDA and the driver about a GPU that needs repair.
DEAD_GPU = re.compile(r"uncorrectable (ECC|NVLink)|GPU is lost|fallen off the bus|devices? (is|are) busy or unavailable", re.IGNORECASE)
NODE_FAILURE = re.compile(r"Node failure on (\S+)")  # srun


@dataclass
class Report:
    """Holds the events and the last lines of an attempt's output."""

    ranks: list[dict[str, Any]] = field(default_factory=list)  # in the order in which they ended
    hang: dict[str, Any] | None = None
    unfit: dict[str, str] = field(default_factory=dict)  # reason by node
    code: int = 0  # of the last step
    last_lines: deque[str] = field(default_factory=lambda: deque(maxlen=LAST_LINES))

    def add(self, event: Event) -> None:
        if event.kind == "rank":
            self.ranks.append(event.values)
        elif event.kind == "node":
            self.unfit[event.values["host"]] = event.values["reason"]
        elif event.kind == "hang":
            self.hang = event.values
        elif event.kind == "step":
            self.code = event.values["code"]


def main() -> int:
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # Slurm signals the whole job, but this process has to outlive the ranks
    try:
        # Preflight reports paths that are missing on this node only.
        config = settings.load(*job_words(sys.argv[1:]), unchecked=settings.NODE_PATHS)
        run = Path(config.run.dir)
        attempt, history = begin_attempt(run)
        log = open(run / "logs" / f"{attempt.job}-{attempt.restart}.log", "ab")  # noqa: SIM115
    except (ConfigError, OSError):  # preflight and the ranks report the error
        read_output(sys.stdin.buffer, None)
        print(f"end {EXIT_CONFIG}", file=sys.stderr)
        return 0
    report = read_output(sys.stdin.buffer, log)
    end = classify_end(report, newest_step(run), attempt.ranks)
    if end.outcome == "complete" and config.run.export != []:
        end = export_weights(run, end)
    end = decide_restart(history, replace(attempt, end=end), config.guard.restarts)
    attempt = replace(attempt, end=end)
    reason = "see the errors above" if end.outcome == "settings" else end.reason
    print(f"attempt {attempt.restart + 1} {end.outcome}: {reason}", flush=True)
    try:
        attempts.write(run, attempt)
        if end.outcome in FAILURES and not end.again:
            (run / FAILED).write_text(format_summary(run, [*history, attempt], report.last_lines))
    except OSError as error:  # a full disk must not end a job that can resume
        print(f"the end of this attempt could not be recorded in {run}: {error}", flush=True)
    print(format_decision([*history, attempt]), file=sys.stderr)
    return 0


def begin_attempt(run: Path) -> tuple[Attempt, list[Attempt]]:
    """Records the start of this attempt; returns this attempt and the earlier ones of the same job."""
    (run / "logs").mkdir(parents=True, exist_ok=True)
    job, restart, nodes = os.environ["SLURM_JOB_ID"], int(os.environ.get("SLURM_RESTART_COUNT", 0)), os.environ["NODES"].split()
    attempt = Attempt(job, restart, time.time(), tuple(nodes), int(os.environ["RANKS"]), saved=newest_step(run))
    history = [earlier for earlier in attempts.read(run) if earlier.job == job]
    attempts.write(run, attempt)
    (run / FAILED).unlink(missing_ok=True)
    print(f"attempt {restart + 1} of job {job}: {attempt.ranks} ranks on {' '.join(nodes)}", flush=True)
    return attempt, history


def read_output(output: IO[bytes], log: IO[bytes] | None) -> Report:
    """Reads the output of an attempt to its end, copies its lines and collects its events."""
    report, reader = Report(), EventReader()
    for line in output:
        text = line.decode(errors="replace").rstrip()
        if is_event(text):
            if (event := reader.read(text)) is not None:
                report.add(event)
            continue
        report.last_lines.append(text)
        for stream in (sys.stdout.buffer, log):
            if stream is not None:
                with suppress(OSError):  # a full disk must not end a job for a line
                    stream.write(line)
                    stream.flush()
    return report


def classify_end(report: Report, saved: int, ranks: int) -> End:
    """Classifies the end of an attempt, with the rank and node that caused it; `saved`: step of the newest checkpoint."""
    now = time.time()
    stopped = End(now, "stopped", f"stopped by a signal; saved at step {saved}", saved)
    if report.code == 128 + signal.SIGUSR1:  # the signal killed a task that had no handler yet; other failures are consequences
        return stopped
    if report.unfit:
        reason = "; ".join(f"{node}: {reason}" for node, reason in report.unfit.items())
        return End(now, "unfit", reason, saved, excluded=tuple(report.unfit))
    if report.hang is not None:
        return End(now, "hung", report.hang["reason"], saved, **{key: report.hang[key] for key in ("step", "rank", "host")})
    if failed := [rank for rank in report.ranks if rank["code"] not in (0, EXIT_REQUEUE, EXIT_STOP_FILE)]:
        return _classify_failed_ranks(failed, report, saved)
    codes = {report.code, *(rank["code"] for rank in report.ranks)}
    if EXIT_STOP_FILE in codes:
        return End(now, "ended", f"stopped by {attempts.STOP}; saved at step {saved}", saved)
    if EXIT_REQUEUE in codes:
        return stopped
    if report.code:
        reason = next((line for line in reversed(report.last_lines) if "error" in line), f"the step ended with exit code {report.code}")
        return End(now, "settings" if report.code == EXIT_CONFIG else "crashed", reason, saved, host=_lost_node(report))
    if missing := sorted(set(range(ranks)) - {rank["rank"] for rank in report.ranks}):
        return End(now, "crashed", f"rank {missing[0]} did not report how it ended", saved)
    return End(now, "complete", f"complete at step {saved}", saved)


def _classify_failed_ranks(failed: Sequence[dict[str, Any]], report: Report, saved: int) -> End:
    first = next((rank for rank in failed if rank["cause"]), failed[0])
    cause = {"rank": first["rank"], "host": first["host"]} if first["cause"] else {"host": _lost_node(report)}
    reason = f"rank {first['rank']} on {first['host']} {first['reason']}" + (f": {first['last_line']}" if first["code"] > 0 else "")
    outcomes: dict[int, attempts.Outcome] = {EXIT_CONFIG: "settings", EXIT_HUNG: "hung"}
    lines = [first["last_line"], *(line for line in report.last_lines if line.startswith(f"  rank {first['rank']} | "))]
    excluded = (first["host"],) if DEAD_GPU.search("\n".join(lines)) else ()
    return End(time.time(), outcomes.get(first["code"], "crashed"), reason, saved, step=first["step"], **cause, excluded=excluded)


def _lost_node(report: Report) -> str | None:
    return next((match[1] for line in report.last_lines if (match := NODE_FAILURE.search(line))), None)


def export_weights(run: Path, end: End) -> End:
    """Exports the weights of a complete run; returns `end`, or a failure if the export fails."""
    from pretrain.weights.export import export_run

    try:
        export_run(run)
    except Exception as error:  # of any kind: the run is saved, and the next attempt only exports
        return replace(end, outcome="crashed", reason=f"training is complete, but the export failed: {type(error).__name__}: {error}")
    return end


def decide_restart(history: Sequence[Attempt], attempt: Attempt, restarts: int) -> End:
    """Decides whether to requeue the job after `attempt`, and which nodes it must then avoid.

    Args:
        history: the job's earlier attempts.
        attempt: the attempt that has ended.
        restarts: allowed failures without a new checkpoint (guard.restarts).

    Returns:
        The end of `attempt` with `again`, `excluded` and the final reason set.
    """
    end = attempt.end
    assert end is not None
    if end.outcome == "stopped":
        return replace(end, again=True)
    if end.outcome not in FAILURES:
        return end
    before = history[-1].end if history else None
    if end.step is not None and before is not None and before.outcome in FAILURES and before.step == end.step:
        return replace(end, reason=f"step {end.step} has failed twice in a row: {end.reason}")
    if (count := count_without_progress([*history, attempt])) > restarts:
        return replace(end, reason=f"{count} failures without a new checkpoint (guard.restarts={restarts}); the last: {end.reason}")
    excluded = set(end.excluded)
    hosts = [other.end.host for other in (*history, attempt) if other.end is not None and other.end.outcome in FAILURES]
    if end.host is not None and hosts.count(end.host) >= NODE_FAILURES:
        excluded.add(end.host)
    return replace(end, again=True, excluded=tuple(sorted(excluded)))


def count_without_progress(history: Sequence[Attempt]) -> int:
    """Returns the number of latest consecutive attempts that saved no new checkpoint."""
    count = 0
    for attempt, following in zip(reversed(history), [None, *reversed(history)], strict=False):
        saved = attempt.end.saved if attempt.end else following.saved if following else attempt.saved
        if saved > attempt.saved:
            break
        count += 1
    return count


def format_decision(history: Sequence[Attempt]) -> str:
    """Returns the decision for launch/job.sh after the last of these attempts."""
    end = history[-1].end
    assert end is not None
    if end.again:
        count = count_without_progress(history)
        delay = min(FIRST_DELAY_S * 2 ** (count - 1), LONGEST_DELAY_S) if count and end.outcome in FAILURES else 0
        return f"requeue {delay} {','.join(end.excluded)}".rstrip()
    if end.outcome == "complete":
        return "complete"
    return f"end {({'settings': EXIT_CONFIG, 'ended': EXIT_STOP_FILE, 'unfit': EXIT_UNFIT}).get(end.outcome, 1)}"


def format_summary(run: Path, history: Sequence[Attempt], last_lines: Iterable[str]) -> str:
    """Returns the content of FAILED.md, for a job that is not requeued after the last of these attempts."""
    end = history[-1].end
    assert end is not None
    rows = [
        f"| {attempt.restart + 1} | {_format_time(attempt.began)} | {_format_time(attempt.end.at) if attempt.end else ''} "
        f"| {' '.join(attempt.nodes)} | {attempt.saved} | {attempt.end.saved if attempt.end else ''} | {_format_end(attempt.end)} |"
        for attempt in history
    ]
    rank = f" on rank {end.rank} of {end.host}" if end.rank is not None else ""
    where = f"It failed in step {end.step}{rank}. " if end.step is not None else ""
    return f"""# Job {history[-1].job} in {run} has failed: {end.outcome}

{end.reason}

{where}The newest checkpoint is of step {end.saved}. Fix the cause and submit the same command again: training resumes from this checkpoint.
The output of each attempt is in {run / "logs"}.

| attempt | began | ended | nodes | first step | saved | end |
|---|---|---|---|---|---|---|
{chr(10).join(rows)}

The last lines of the output:

```
{chr(10).join(last_lines)}
```
"""


def _format_end(end: End | None) -> str:
    return f"{end.outcome}: {end.reason.replace('|', '/')}" if end else "not recorded: the node was lost or the job was canceled"


def _format_time(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def newest_step(run: Path) -> int:
    """Returns the step of the newest checkpoint, 0 if there is none. Only complete checkpoints have such names."""
    checkpoints = list_checkpoints(run / CHECKPOINTS)
    return step_of(checkpoints[-1]) if checkpoints else 0


if __name__ == "__main__":
    sys.exit(main())
