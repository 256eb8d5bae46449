"""What becomes of a job that ended: read from what its processes told, over one attempt and over many."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from launch.attempt import Heard, conclude, fruitless, judge, summary, verdict
from pretrain.run import attempts
from pretrain.run.attempts import Attempt, End, Outcome, heard, tell
from pretrain.run.exit_codes import EXIT_AGAIN, EXIT_CONFIG, EXIT_ENDED, EXIT_HUNG
from tests.support import REPOSITORY

pytestmark = pytest.mark.slow


def rank(number: int, code: int, **told: Any) -> dict[str, Any]:
    """What a task tells of its rank (launch/task.py)."""
    return {"rank": number, "host": f"n{number}", "code": code, "step": 7, "why": "ended", "said": "", "cause": True, **told}


# ---------------------------------------------------------------- how an attempt ended


@pytest.mark.parametrize(
    ("ranks", "outcome"),
    [
        ([rank(0, 0), rank(1, 0)], "complete"),
        ([rank(0, EXIT_AGAIN), rank(1, EXIT_AGAIN)], "stopped"),
        ([rank(0, EXIT_ENDED), rank(1, EXIT_ENDED)], "ended"),
        ([rank(0, EXIT_CONFIG), rank(1, -15, cause=False)], "settings"),
        ([rank(1, EXIT_HUNG), rank(0, EXIT_HUNG)], "hung"),
        ([rank(1, 1), rank(0, -15, cause=False)], "crashed"),
        ([rank(0, EXIT_AGAIN), rank(1, -9)], "crashed"),
    ],
)
def test_outcome_of_what_the_ranks_told(ranks: list[dict[str, Any]], outcome: Outcome) -> None:
    assert conclude(Heard(ranks=ranks), 5, 2).outcome == outcome


def test_the_rank_that_failed_of_itself_is_the_cause() -> None:
    told = Heard(
        ranks=[rank(0, 1, cause=False, said="Connection closed by peer"), rank(1, 1, said="KeyError: 3"), rank(2, 1, said="KeyError: 4")]
    )
    end = conclude(told, 5, 2)
    assert (end.outcome, end.rank, end.host, end.step) == ("crashed", 1, "n1", 7)
    assert "KeyError: 3" in end.reason


def test_nobody_is_blamed_where_all_failed_of_another() -> None:
    """As in a start that is told to end by TERM, or of a node that is gone."""
    told = Heard(ranks=[rank(0, -15, cause=False), rank(1, -15, cause=False)])
    end = conclude(told, 5, 2)
    assert (end.outcome, end.rank, end.host, end.step) == ("crashed", None, None, 7)
    told.last.append("srun: error: Node failure on n1")
    assert conclude(told, 5, 2).host == "n1"


def test_a_rank_that_hangs_is_named_by_the_watchdog() -> None:
    told = Heard(ranks=[rank(0, EXIT_HUNG)], hang={"rank": 1, "host": "n1", "step": 4, "reason": "rank 1 on n1 gives no answer"})
    end = conclude(told, 5, 2)
    assert (end.outcome, end.rank, end.host, end.step, end.reason) == ("hung", 1, "n1", 4, "rank 1 on n1 gives no answer")


def test_a_node_that_preflight_names_is_left_out() -> None:
    end = conclude(Heard(unfit={"n1": "no GPU 3", "n2": "no disk"}, code=3), 5, 2)
    assert (end.outcome, end.excluded, end.reason) == ("unfit", ("n1", "n2"), "n1: no GPU 3; n2: no disk")


def test_a_step_that_ends_without_a_word_of_its_ranks() -> None:
    assert "rank 1 did not say" in conclude(Heard(ranks=[rank(0, 0)]), 5, 2).reason
    told = Heard(code=1)
    told.last += ["step 3/40", "srun: error: Node failure on n1", "srun: Job step aborted"]
    end = conclude(told, 5, 2)
    assert (end.outcome, end.host, end.reason) == ("crashed", "n1", "srun: error: Node failure on n1")
    assert conclude(Heard(code=EXIT_CONFIG), 0, 2).outcome == "settings"  # preflight's


def test_told_to_stop_before_a_task_could_heed_it() -> None:
    """The other tasks end by what the first one's end brings."""
    code = 128 + signal.SIGUSR1
    assert conclude(Heard(code=code), 0, 2).outcome == "stopped"
    assert conclude(Heard(code=code, unfit={"n1": "ended while looking at its node"}), 0, 2).outcome == "stopped"
    assert conclude(Heard(code=code, ranks=[rank(0, -signal.SIGKILL)]), 0, 2).outcome == "stopped"
    assert conclude(Heard(code=128 + signal.SIGSEGV, ranks=[rank(0, -signal.SIGKILL)]), 0, 2).outcome == "crashed"


def test_a_dead_gpu_leaves_its_node_out() -> None:
    told = Heard(ranks=[rank(1, 1, said="RuntimeError: CUDA error: uncorrectable ECC error encountered")])
    assert conclude(told, 5, 2).excluded == ("n1",)
    assert conclude(Heard(ranks=[rank(1, 1, said="RuntimeError: CUDA error: an illegal memory access")]), 5, 2).excluded == ()


# ---------------------------------------------------------------- whether there is another one


def history(*ends: tuple[Outcome, int, int | None, str] | None) -> list[Attempt]:
    """Attempts that ended so: outcome, step of the newest checkpoint, step that failed, host; None: without a word."""
    made, saved = [], 0
    for number, end in enumerate(ends):
        told = None if end is None else End(100.0, end[0], "so it ended", end[1], step=end[2], rank=1, host=end[3])
        made.append(Attempt("12", number, 50.0, ("n0", "n1"), 2, saved, told))
        saved = end[1] if end else saved
    return made


def judged(run: list[Attempt], restarts: int = 3) -> End:
    return judge(run[:-1], run[-1], restarts)


@pytest.mark.parametrize(
    ("outcome", "again"), [("stopped", True), ("crashed", True), ("hung", True), ("complete", False), ("ended", False), ("settings", False)]
)
def test_the_first_end_of_each_kind(outcome: Outcome, again: bool) -> None:
    assert judged(history((outcome, 5, 7, "n1"))).again == again


def test_the_same_step_twice_in_a_row_is_the_end() -> None:
    end = judged(history(("crashed", 5, 7, "n1"), ("hung", 5, 7, "n0")))
    assert not end.again
    assert end.reason == "step 7 has failed twice in a row: so it ended"
    assert judged(history(("crashed", 5, 7, "n1"), ("crashed", 5, 8, "n0"))).again
    assert judged(history(("crashed", 5, 7, "n1"), ("stopped", 6, None, "n0"), ("crashed", 6, 7, "n0"))).again  # not in a row
    assert judged(history(("crashed", 5, None, "n1"), ("crashed", 5, None, "n0"))).again  # no step had begun


def test_failures_without_a_new_checkpoint_are_counted() -> None:
    run = history(*[("crashed", 5, step, "n1") for step in (7, 6, 8, 7, 6)])  # the first one saved step 5
    assert [fruitless(run[:count]) for count in range(1, 6)] == [0, 1, 2, 3, 4]
    assert judged(run[:4]).again
    assert not judged(run).again
    assert "4 failures without a new checkpoint (guard.restarts=3)" in judged(run).reason
    assert judged(history(*[("crashed", 5 * number, 7 + 5 * number, "n1") for number in range(1, 30)])).again  # progress


def test_an_attempt_that_vanished_counts_by_what_the_next_one_found() -> None:
    assert fruitless(history(None, None, ("crashed", 0, 3, "n1"))) == 3
    lost = [Attempt("12", 0, 50.0, ("n0",), 1, 0), Attempt("12", 1, 60.0, ("n0",), 1, 4, End(70.0, "crashed", "so", 4))]
    assert fruitless(lost) == 1


def test_a_node_whose_ranks_fail_again_is_left_out() -> None:
    assert judged(history(("crashed", 5, 7, "n1"))).excluded == ()
    assert judged(history(("crashed", 5, 7, "n1"), ("crashed", 9, 11, "n0"))).excluded == ()
    assert judged(history(("crashed", 5, 7, "n1"), ("stopped", 9, None, "n0"), ("crashed", 9, 11, "n1"))).excluded == ("n1",)


def test_the_wait_before_another_attempt_doubles_without_progress() -> None:
    def seconds(count: int) -> int:
        run = history(("crashed", 5, 0, "n0"), *[("crashed", 5, step, f"m{step}") for step in range(1, count + 1)])
        return int(verdict([*run[:-1], Attempt("12", count, 50.0, ("n0",), 2, 5, judged(run, restarts=99))]).split()[1])

    assert [seconds(count) for count in (1, 2, 3, 8)] == [120, 240, 480, 3600]
    stopped = history(("stopped", 0, None, "n0"))
    assert verdict([Attempt("12", 0, 50.0, ("n0",), 2, 0, judged(stopped))]) == "again 0"


# ---------------------------------------------------------------- the record, and the filter itself


def test_attempts_are_read_as_they_were_written(tmp_path: Path) -> None:
    assert attempts.read(tmp_path) == []
    run = history(("crashed", 5, 7, "n1"), None, ("stopped", 9, None, "n0"))
    for attempt in run:
        attempts.write(tmp_path, Attempt(**vars(attempt) | {"end": None}))
        if attempt.end:
            attempts.write(tmp_path, attempt)
    assert attempts.read(tmp_path) == run


def test_what_is_told_is_heard(capsys: pytest.CaptureFixture[str]) -> None:
    tell("rank", rank=3, said="a \"quoted\" 'word' ü\n")
    line = capsys.readouterr().out
    assert line.count("\n") == 1
    assert heard(line) == ("rank", {"rank": 3, "said": "a \"quoted\" 'word' ü\n"})
    assert heard("step 3/40  loss 2") is None


class Job:
    """Attempts of one job, as launch/job.sh runs the filter."""

    def __init__(self, folder: Path, drawn: Path):
        self.run = folder / "run"
        self.settings = [
            f"data.train={drawn / 'train'}",
            "data.val=null",
            "engine.device=cpu",
            f"run.dir={self.run}",
            "guard.restarts=1",
        ]

    def attempt(self, number: int, lines: Iterable[str], *settings: str) -> tuple[str, str]:
        """(output, verdict)"""
        environment = os.environ | {"SLURM_JOB_ID": "12", "SLURM_RESTART_COUNT": str(number), "RANKS": "2", "NODES": "n0 n1 "}
        command = [sys.executable, "-m", "launch.attempt", "configs/van_b3_in22k.yaml", *self.settings, *settings]
        done = subprocess.run(
            command, cwd=REPOSITORY, env=environment, input="".join(lines), capture_output=True, text=True, timeout=60, check=True
        )
        return done.stdout, done.stderr


@pytest.fixture
def job(tmp_path: Path, drawn: Path) -> Job:
    return Job(tmp_path, drawn)


def line(kind: str, **values: Any) -> str:
    return f"{attempts.MARK}{json.dumps({'kind': kind, **values})}\n"


def test_a_job_that_fails_at_the_same_step_ends_with_a_summary(job: Job) -> None:
    lines = ["step 6/40\n", "  rank 1 | KeyError: 3\n", line("rank", **rank(1, 1, said="KeyError: 3")), line("step", code=1)]
    output, said = job.attempt(0, lines)
    assert said == "again 120\n"
    assert output.splitlines()[0] == "attempt 1 of job 12: 2 ranks on n0 n1"
    assert "step 6/40\n  rank 1 | KeyError: 3\n" in output
    assert attempts.MARK not in output
    assert (job.run / "logs" / "12-0.log").read_text() == "step 6/40\n  rank 1 | KeyError: 3\n"
    assert not (job.run / "FAILED.md").exists()

    output, said = job.attempt(1, lines)
    assert said == "end 1\n"
    told = (job.run / "FAILED.md").read_text()
    assert "step 7 has failed twice in a row: rank 1 on n1 ended: KeyError: 3" in told
    assert "  rank 1 | KeyError: 3" in told
    assert [attempt.end.outcome for attempt in attempts.read(job.run) if attempt.end] == ["crashed", "crashed"]

    _, said = job.attempt(2, [line("rank", **rank(0, EXIT_AGAIN))])  # it begins without
    assert said == "again 0\n"
    assert not (job.run / "FAILED.md").exists()


def test_a_run_is_complete_when_its_weights_are_exported(job: Job) -> None:
    """Here they can't be: there is no checkpoint."""
    output, said = job.attempt(0, [line("rank", **rank(0, 0)), line("rank", **rank(1, 0)), line("step", code=0)])
    assert said == "again 120\n"
    assert "attempt 1 crashed: training is complete, but not exported: ValueError: " in output


def test_settings_that_cannot_work_end_the_job_without_touching_the_run(job: Job) -> None:
    output, said = job.attempt(0, ["error: model.nam: unknown key\n", line("step", code=2)], "model.nam=van_b3")
    assert (output, said) == ("error: model.nam: unknown key\n", f"end {EXIT_CONFIG}\n")
    assert not job.run.exists()


def test_a_run_directory_that_cannot_be_made_is_for_the_ranks_to_tell(job: Job) -> None:
    job.run.write_text("a file")
    output, said = job.attempt(0, ["error: run directory can't be written to\n", line("rank", **rank(0, EXIT_CONFIG))])
    assert (output, said) == ("error: run directory can't be written to\n", f"end {EXIT_CONFIG}\n")


def test_a_full_disk_costs_the_record_and_not_the_job(job: Job) -> None:
    (job.run / "logs").mkdir(parents=True)
    (job.run / "attempts.jsonl").mkdir()  # can be written as little as a full disk
    output, said = job.attempt(0, [line("rank", **rank(0, EXIT_AGAIN))])
    assert said == f"end {EXIT_CONFIG}\n"  # it could not begin: preflight says that there is no room

    (job.run / "attempts.jsonl").rmdir()
    (job.run / "logs" / "12-1.log").symlink_to("/dev/full")
    output, said = job.attempt(1, ["a line\n", line("rank", **rank(0, EXIT_AGAIN))])
    assert said == "again 0\n"
    assert "a line\n" in output


def test_signals_to_the_whole_job_do_not_end_the_filter(job: Job, tmp_path: Path) -> None:
    environment = os.environ | {"SLURM_JOB_ID": "12", "RANKS": "2", "NODES": "n0 n1"}
    command = [sys.executable, "-m", "launch.attempt", "configs/van_b3_in22k.yaml", *job.settings]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=REPOSITORY, env=environment, text=True, **pipes) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline().startswith("attempt 1 of job 12")
        for number in (signal.SIGTERM, signal.SIGUSR1):
            process.send_signal(number)
        output, said = process.communicate(line("rank", **rank(0, EXIT_AGAIN)) + line("step", code=0), timeout=30)
    assert said == "again 0\n"
    assert output == "attempt 1 stopped: told to stop; saved at step 0\n"


def test_the_summary_has_every_attempt() -> None:
    run = history(None, ("crashed", 5, 7, "n1"), ("crashed", 5, 7, "n1"))
    told = summary(Path("runs/a"), run, ["the last line"])
    assert told.startswith("# Job 12 in runs/a has ended: crashed")
    assert "without a word" in told
    assert told.count("| crashed: so it ended |") == 2
    assert "the last line" in told
