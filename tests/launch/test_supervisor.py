"""The job supervisor: how it classifies the end of an attempt, when it requeues a job, and the program itself."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from launch.supervisor import Report, classify_end, count_without_progress, decide_restart, format_decision
from pretrain.run import attempts
from pretrain.run.attempts import Attempt, End, Outcome
from pretrain.run.events import MARK
from pretrain.run.exit_codes import EXIT_CONFIG, EXIT_HUNG, EXIT_REQUEUE, EXIT_STOP_FILE
from tests.support import REPOSITORY
from tests.support.events import event_line

pytestmark = pytest.mark.slow


def rank(number: int, code: int, **values: Any) -> dict[str, Any]:
    """Returns the event of a rank that has ended (launch/task.py)."""
    return {"rank": number, "host": f"n{number}", "code": code, "step": 7, "reason": "ended", "last_line": "", "cause": True, **values}


# ---------------------------------------------------------------- the end of an attempt


@pytest.mark.parametrize(
    ("ranks", "outcome"),
    [
        ([rank(0, 0), rank(1, 0)], "complete"),
        ([rank(0, EXIT_REQUEUE), rank(1, EXIT_REQUEUE)], "stopped"),
        ([rank(0, EXIT_STOP_FILE), rank(1, EXIT_STOP_FILE)], "ended"),
        ([rank(0, EXIT_CONFIG), rank(1, -15, cause=False)], "settings"),
        ([rank(1, EXIT_HUNG), rank(0, EXIT_HUNG)], "hung"),
        ([rank(1, 1), rank(0, -15, cause=False)], "crashed"),
        ([rank(0, EXIT_REQUEUE), rank(1, -9)], "crashed"),
    ],
)
def test_outcome_by_the_ends_of_the_ranks(ranks: list[dict[str, Any]], outcome: Outcome) -> None:
    assert classify_end(Report(ranks=ranks), 5, 2).outcome == outcome


def test_the_first_rank_that_failed_by_itself_is_the_cause() -> None:
    lost = rank(0, 1, cause=False, last_line="Connection closed by peer")
    report = Report(ranks=[lost, rank(1, 1, last_line="KeyError: 3"), rank(2, 1, last_line="KeyError: 4")])
    end = classify_end(report, 5, 2)
    assert (end.outcome, end.rank, end.host, end.step) == ("crashed", 1, "n1", 7)
    assert "KeyError: 3" in end.reason


def test_a_hang_is_reported_by_the_watchdog() -> None:
    report = Report(ranks=[rank(0, EXIT_HUNG)], hang={"rank": 1, "host": "n1", "step": 4, "reason": "rank 1 on n1 gives no answer"})
    end = classify_end(report, 5, 2)
    assert (end.outcome, end.rank, end.host, end.step, end.reason) == ("hung", 1, "n1", 4, "rank 1 on n1 gives no answer")


def test_a_step_without_reports_of_the_cause() -> None:
    """Ranks that a lost node or a signal ended are no cause; srun may name the node."""
    report = Report(ranks=[rank(0, -15, cause=False), rank(1, -15, cause=False)])
    end = classify_end(report, 5, 2)
    assert (end.outcome, end.rank, end.host, end.step) == ("crashed", None, None, 7)
    report.last_lines.append("srun: error: Node failure on n1")
    assert classify_end(report, 5, 2).host == "n1"
    assert "rank 1 did not report" in classify_end(Report(ranks=[rank(0, 0)]), 5, 2).reason
    report = Report(code=1)
    report.last_lines += ["step 3/40", "srun: error: Node failure on n1", "srun: Job step aborted"]
    end = classify_end(report, 5, 2)
    assert (end.outcome, end.host, end.reason) == ("crashed", "n1", "srun: error: Node failure on n1")
    assert classify_end(Report(code=EXIT_CONFIG), 0, 2).outcome == "settings"  # found by preflight


def test_a_request_to_stop_that_kills_a_task() -> None:
    """It came before the task could handle it; the other tasks end as a consequence."""
    code = 128 + signal.SIGUSR1
    for events in ({}, {"unfit": {"n1": "stopped responding"}}, {"ranks": [rank(0, -signal.SIGKILL)]}):
        assert classify_end(Report(code=code, **events), 0, 2).outcome == "stopped"
    assert classify_end(Report(code=128 + signal.SIGSEGV, ranks=[rank(0, -signal.SIGKILL)]), 0, 2).outcome == "crashed"


def test_unfit_nodes_and_nodes_with_a_dead_gpu_are_excluded() -> None:
    end = classify_end(Report(unfit={"n1": "no GPU 3", "n2": "no disk"}, code=3), 5, 2)
    assert (end.outcome, end.excluded, end.reason) == ("unfit", ("n1", "n2"), "n1: no GPU 3; n2: no disk")
    dead = rank(1, 1, last_line="RuntimeError: CUDA error: uncorrectable ECC error encountered")
    assert classify_end(Report(ranks=[dead]), 5, 2).excluded == ("n1",)
    assert classify_end(Report(ranks=[rank(1, 1, last_line="RuntimeError: CUDA error: an illegal memory access")]), 5, 2).excluded == ()


# ---------------------------------------------------------------- the decision


def history(*ends: tuple[Outcome, int, int | None, str] | None) -> list[Attempt]:
    """Returns attempts with these ends: outcome, step of the newest checkpoint, failed step, host; None: not recorded."""
    made, saved = [], 0
    for number, values in enumerate(ends):
        end = None if values is None else End(100.0, values[0], "its reason", values[1], step=values[2], rank=1, host=values[3])
        made.append(Attempt("12", number, 50.0, ("n0", "n1"), 2, saved, end))
        saved = values[1] if values else saved
    return made


def decide(run: list[Attempt], restarts: int = 3) -> End:
    return decide_restart(run[:-1], run[-1], restarts)


@pytest.mark.parametrize(
    ("outcome", "again"), [("stopped", True), ("crashed", True), ("hung", True), ("complete", False), ("ended", False), ("settings", False)]
)
def test_decision_after_a_first_attempt(outcome: Outcome, again: bool) -> None:
    assert decide(history((outcome, 5, 7, "n1"))).again == again


def test_a_step_that_fails_twice_in_a_row_ends_the_job() -> None:
    end = decide(history(("crashed", 5, 7, "n1"), ("hung", 5, 7, "n0")))
    assert not end.again
    assert end.reason == "step 7 has failed twice in a row: its reason"
    assert decide(history(("crashed", 5, 7, "n1"), ("crashed", 5, 8, "n0"))).again
    assert decide(history(("crashed", 5, 7, "n1"), ("stopped", 6, None, "n0"), ("crashed", 6, 7, "n0"))).again  # not in a row
    assert decide(history(("crashed", 5, None, "n1"), ("crashed", 5, None, "n0"))).again  # no step had begun


def test_failures_without_a_new_checkpoint_are_limited() -> None:
    run = history(*[("crashed", 5, step, "n1") for step in (7, 6, 8, 7, 6)])  # the first one saved step 5
    assert [count_without_progress(run[:count]) for count in range(1, 6)] == [0, 1, 2, 3, 4]
    assert decide(run[:4]).again
    assert not decide(run).again
    assert "4 failures without a new checkpoint (guard.restarts=3)" in decide(run).reason
    assert decide(history(*[("crashed", 5 * number, 7 + 5 * number, "n1") for number in range(1, 30)])).again  # progress


def test_progress_of_an_unrecorded_attempt_is_seen_by_the_next_one() -> None:
    assert count_without_progress(history(None, None, ("crashed", 0, 3, "n1"))) == 3
    lost = [Attempt("12", 0, 50.0, ("n0",), 1, 0), Attempt("12", 1, 60.0, ("n0",), 1, 4, End(70.0, "crashed", "", 4))]
    assert count_without_progress(lost) == 1


def test_a_node_whose_ranks_fail_twice_is_excluded() -> None:
    assert decide(history(("crashed", 5, 7, "n1"))).excluded == ()
    assert decide(history(("crashed", 5, 7, "n1"), ("crashed", 9, 11, "n0"))).excluded == ()
    assert decide(history(("crashed", 5, 7, "n1"), ("stopped", 9, None, "n0"), ("crashed", 9, 11, "n1"))).excluded == ("n1",)


def test_the_delay_doubles_without_progress() -> None:
    def delay(count: int) -> int:
        run = history(("crashed", 5, 0, "n0"), *[("crashed", 5, step, f"m{step}") for step in range(1, count + 1)])
        return int(format_decision([*run[:-1], Attempt("12", count, 50.0, ("n0",), 2, 5, decide(run, restarts=99))]).split()[1])

    assert [delay(count) for count in (1, 2, 3, 8)] == [120, 240, 480, 3600]
    stopped = history(("stopped", 0, None, "n0"))
    assert format_decision([Attempt("12", 0, 50.0, ("n0",), 2, 0, decide(stopped))]) == "requeue 0"


# ---------------------------------------------------------------- the program


class Job:
    """Runs the supervisor for attempts of one job as launch/job.sh does."""

    def __init__(self, folder: Path, drawn: Path):
        self.run = folder / "run"
        settings = [f"data.train={drawn / 'train'}", "data.val=null", "engine.device=cpu", f"run.dir={self.run}", "guard.restarts=1"]
        self.command = [sys.executable, "-m", "launch.supervisor", "configs/van_b3_in22k.yaml", *settings]

    def environment(self, number: int) -> dict[str, str]:
        return os.environ | {"SLURM_JOB_ID": "12", "SLURM_RESTART_COUNT": str(number), "RANKS": "2", "NODES": "n0 n1 "}

    def attempt(self, number: int, lines: Iterable[str], *settings: str) -> tuple[str, str]:
        """Returns the supervisor's output and decision."""
        done = subprocess.run(
            [*self.command, *settings], cwd=REPOSITORY, env=self.environment(number), input="".join(lines),
            capture_output=True, text=True, timeout=300, check=True,
        )  # fmt: skip
        return done.stdout, done.stderr


@pytest.fixture
def job(tmp_path: Path, drawn: Path) -> Job:
    return Job(tmp_path, drawn)


def test_a_job_that_fails_at_the_same_step_ends_with_a_summary(job: Job) -> None:
    lines = [
        "step 6/40\n",
        "  rank 1 | KeyError: 3\n",
        event_line("rank", **rank(1, 1, last_line="KeyError: 3")),
        event_line("step", code=1),
    ]
    output, decision = job.attempt(0, lines)
    assert decision == "requeue 120\n"
    assert output.splitlines()[0] == "attempt 1 of job 12: 2 ranks on n0 n1"
    assert "step 6/40\n  rank 1 | KeyError: 3\n" in output
    assert MARK not in output
    assert (job.run / "logs" / "12-0.log").read_text() == "step 6/40\n  rank 1 | KeyError: 3\n"
    assert not (job.run / "FAILED.md").exists()

    output, decision = job.attempt(1, lines)
    assert decision == "end 1\n"
    summary = (job.run / "FAILED.md").read_text()
    assert summary.startswith(f"# Job 12 in {job.run} has failed: crashed\n")
    assert "step 7 has failed twice in a row: rank 1 on n1 ended: KeyError: 3" in summary
    assert "It failed in step 7 on rank 1 of n1. The newest checkpoint is of step 0." in summary
    assert summary.count("crashed: ") == 2  # a row for each attempt
    assert "  rank 1 | KeyError: 3" in summary
    assert [attempt.end.outcome for attempt in attempts.read(job.run) if attempt.end] == ["crashed", "crashed"]

    _, decision = job.attempt(2, [event_line("rank", **rank(0, EXIT_REQUEUE))])
    assert decision == "requeue 0\n"
    assert not (job.run / "FAILED.md").exists()


def test_a_complete_run_whose_export_fails_is_tried_again(job: Job) -> None:
    """The export fails because there is no checkpoint."""
    output, decision = job.attempt(0, [event_line("rank", **rank(0, 0)), event_line("rank", **rank(1, 0)), event_line("step", code=0)])
    assert decision == "requeue 120\n"
    assert "attempt 1 crashed: training is complete, but the export failed: ValueError: " in output


def test_wrong_settings_end_the_job_without_touching_the_run(job: Job) -> None:
    output, decision = job.attempt(0, ["error: model.nam: unknown key\n", event_line("step", code=2)], "model.nam=van_b3")
    assert (output, decision) == ("error: model.nam: unknown key\n", f"end {EXIT_CONFIG}\n")
    assert not job.run.exists()


def test_a_full_disk_costs_the_record_and_not_the_job(job: Job) -> None:
    (job.run / "logs").mkdir(parents=True)
    (job.run / "attempts.jsonl").mkdir()  # no more writable than on a full disk
    output, decision = job.attempt(0, ["error: disk is full\n", event_line("rank", **rank(0, EXIT_REQUEUE))])
    assert (output, decision) == ("error: disk is full\n", f"end {EXIT_CONFIG}\n")  # the begin could not be recorded

    (job.run / "attempts.jsonl").rmdir()
    (job.run / "logs" / "12-1.log").symlink_to("/dev/full")
    output, decision = job.attempt(1, ["a line\n", event_line("rank", **rank(0, EXIT_REQUEUE))])
    assert decision == "requeue 0\n"
    assert "a line\n" in output


def test_signals_to_the_whole_job_do_not_end_the_supervisor(job: Job) -> None:
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(job.command, cwd=REPOSITORY, env=job.environment(0), text=True, **pipes) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline().startswith("attempt 1 of job 12")
        for number in (signal.SIGTERM, signal.SIGUSR1):
            process.send_signal(number)
        output, decision = process.communicate(event_line("rank", **rank(0, EXIT_REQUEUE)) + event_line("step", code=0), timeout=60)
    assert decision == "requeue 0\n"
    assert output == "attempt 1 stopped: stopped by a signal; saved at step 0\n"
