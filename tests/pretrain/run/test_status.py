"""The state of runs: while a real job trains, is killed, resumes and ends, and from files written for each state."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pretrain.__main__ import main
from pretrain.run import attempts, state
from pretrain.run.attempts import ATTEMPTS, Attempt, End
from pretrain.run.directory import machine_id, process_start
from pretrain.run.state import Run, read, read_records, state_of
from pretrain.run.status import status
from tests.support import REPOSITORY, jobs

NOW = time.time()
TRAIN = {"kind": "train", "step": 50, "epoch": 0.5, "loss": 6.25, "lr": 1e-3, "grad_norm": 2.0, "images_per_s": 1234.5, "left_s": 900.0}
PLAN = {"total": 200, "evaluates": False}


def append(path: Path, *values: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(value) + "\n" for value in values)


def add_records(run: Path, step: int = 50, ago: float = 10, **more: Any) -> None:
    """Writes three records of steps, one a minute, the last one `ago` seconds ago."""
    for earlier in (2, 1, 0):
        append(run / "metrics.jsonl", TRAIN | PLAN | {"step": step - 10 * earlier, "time": NOW - ago - 60 * earlier} | more)


def add_checkpoint(run: Path, step: int) -> None:
    folder = run / "checkpoints" / f"step-{step:09d}"
    folder.mkdir(parents=True)
    (folder / "__0_0.distcp").write_bytes(bytes(1000))


def add_lock(run: Path, *, pid: int = 0, elsewhere: bool = False, touched: float = 0, since: float = 600, job: str | None = None) -> None:
    """Writes the lock of a process (by default of this one), touched and taken so many seconds ago."""
    pid = pid or os.getpid()
    when = time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(NOW - since))
    holder = {"host": "node3", "pid": pid, "job": job, "since": when, "started": process_start(pid) or 1}
    append(run / "lock-000003", holder | {"machine": "another/pid:[1]" if elsewhere else machine_id()})
    os.utime(run / "lock-000003", (NOW - touched, NOW - touched))


def add_attempt(run: Path, end: End | None = None, began: float = 700, restart: int = 1) -> None:
    run.mkdir(exist_ok=True)
    attempt = Attempt("17", restart, NOW - began, ("n0", "n1"), 16, 40)
    attempts.write(run, attempt)
    if end is not None:
        attempts.write(run, Attempt(**vars(attempt) | {"end": end}))


def ended(outcome: Any, reason: str, **more: Any) -> End:
    return End(NOW - 60, outcome, reason, 40, **more)


def pid_of_ended_process() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def read_with_queue(run: Path, queue: dict[str, str] | None = None) -> Run:
    """Reads a run as if Slurm's queue held these jobs; None: there is no squeue."""
    return state.with_queue(state.read_run(run), queue)


# ---------------------------------------------------------------- states

Write = Callable[[Path], None]
PENDING, RUNNING = "PENDING (Priority), expected to start 2030-01-01T00:00:00", "RUNNING"


def lock_elsewhere(**more: Any) -> Write:
    return lambda run: add_lock(run, elsewhere=True, **more)


def records(**more: Any) -> Write:
    return lambda run: add_records(run, **more)


def attempt(end: End | None = None) -> Write:
    return lambda run: add_attempt(run, end)


def checkpoint(step: int) -> Write:
    return lambda run: add_checkpoint(run, step)


SILENT = (records(ago=720), lock_elsewhere(touched=700))
REQUEUED = attempt(ended("stopped", "stop signal", again=True))
# case: (what is written, Slurm's queue, state, remark as a regular expression; "" is none)
STATES: dict[str, tuple[tuple[Write, ...], dict[str, str] | None, str, str]] = {
    "settings alone": ((lambda run: append(run / "config.yaml", {}),), None, "waiting", "^no step yet$"),
    "lock, no record": ((add_lock,), None, "running", "^starting, process "),
    "lock, records of an earlier start": ((records(ago=900), add_lock), None, "running", "^starting, process "),
    "lock and records": ((add_records, add_lock), None, "running", ""),
    "save": ((records(ago=500), add_lock, lambda run: (run / "checkpoints/.partial-step-000000050-ab12").mkdir(parents=True)), None,
             "running", "^saving a checkpoint$"),
    "STOP": ((add_records, add_lock, lambda run: (run / "STOP").touch()), None, "running", "^STOP exists: the job saves and ends$"),
    "late record": ((records(ago=500), add_lock), None, "stalled", "^no record for 8 min 20 s, expected every 1 min 0 s$"),
    "evaluation": ((records(ago=500, evaluates=True), add_lock), None, "running", "^evaluating$"),
    "lock elsewhere, touched": ((records(ago=30), lock_elsewhere(touched=15)), None, "running", ""),
    "silent elsewhere": (SILENT, None, "stalled", "^no sign of life for 11 min 40 s$"),
    "silent elsewhere, in Slurm's queue": ((*SILENT, attempt()), {"17": RUNNING}, "stalled",
                                           "^no sign of life for 11 min 40 s; job 17 RUNNING$"),
    "silent elsewhere, not in the queue": ((lock_elsewhere(touched=700, job="17"),), {}, "failed", "^job 17 is no longer in the queue"),
    "killed process": ((add_records, checkpoint(40), lambda run: add_lock(run, pid=pid_of_ended_process())), None, "failed",
                       "has ended without a message; the same command resumes at step 40$"),
    "no lock": ((add_records, checkpoint(50)), None, "stopped", ""),
    "no lock, steps after the checkpoint": ((add_records, checkpoint(40)), None, "stopped", "^the last 10 steps are not saved$"),
    "last step saved": ((add_records, checkpoint(200)), None, "complete", ""),
    "queued": ((add_records, REQUEUED), {"17": PENDING}, "waiting", r"^job 17 PENDING \(Priority\), expected to start 2030"),
    "queued, lock of the lost attempt": ((add_records, attempt(), lock_elsewhere(touched=5, job="17")), {"17": PENDING}, "waiting",
                                         "^job 17 PENDING"),
    "queued, another job trains": ((add_records, attempt(), lock_elsewhere(touched=5, job="18")), {"17": PENDING}, "running", ""),
    "job began": ((attempt(),), {"17": RUNNING}, "running", "^job 17 RUNNING$"),
    "job began again, lock of the earlier attempt": ((records(ago=900), lock_elsewhere(touched=900), attempt()), {"17": RUNNING},
                                                     "running", "^job 17 RUNNING$"),
    "job lost": ((attempt(),), {}, "failed", "^job 17 is no longer in the queue and did not report its end"),
    "job, no squeue": ((attempt(),), None, "stalled", "^no sign of life for 11 min 40 s$"),
    "crash": ((attempt(ended("crashed", "rank 3 on n1: exit code 1", step=44)),), {}, "failed", "^rank 3 on n1: exit code 1$"),
    "ended by STOP": ((attempt(ended("ended", "RUN/STOP")),), {}, "stopped", "^RUN/STOP$"),
    "requeued, no squeue": ((REQUEUED,), None, "waiting", "^stop signal; the job was requeued"),
    "requeued and canceled": ((REQUEUED,), {}, "stopped", "was requeued, but job 17 is no longer in the queue$"),
}  # fmt: skip


@pytest.mark.parametrize("case", STATES)
def test_state_and_remark(tmp_path: Path, case: str) -> None:
    writes, queue, expected, remark = STATES[case]
    run = tmp_path / "run"
    run.mkdir()
    for write in writes:
        write(run)
    found, text = state_of(read_with_queue(run, queue), NOW)
    assert found == expected
    assert re.search(remark, text) if remark else text == ""


# ---------------------------------------------------------------- table and details


@pytest.mark.usefixtures("at_now")
def test_one_run_is_shown_in_detail(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    add_checkpoint(run, 20)
    add_checkpoint(run, 40)
    accuracy = {"top1": 0.5, "top5": 0.75, "loss": 2.0}
    append(run / "metrics.jsonl", {"kind": "evaluation", "time": NOW, "step": 30, "weight": accuracy, "ema": accuracy | {"top1": 0.625}})
    append(run / "metrics.jsonl", {"kind": "rollback", "time": NOW, "step": 20})
    add_records(run, ago=30, mfu=0.41)
    append(run / "metrics.jsonl", {"kind": "save_failed", "time": NOW, "step": 50, "reason": "No space left on device"})
    append(run / "quarantine.jsonl", {"key": "a"}, {"key": "b"})
    append(run / "bad_steps.jsonl", {"step": 31, "skipped": True}, {"step": 31, "skipped": True}, {"step": 33, "skipped": False})
    add_attempt(run, ended("crashed", "rank 3 on n1: exit code 1"), began=4000, restart=0)
    add_attempt(run)
    add_lock(run, job="17")
    assert status([run], follow=False) == 0
    output, listed = capsys.readouterr().out.split("  last attempts\n")
    rows = {match[1]: match[2] for line in output.splitlines() if (match := re.match(r"  (\w+(?: \w+)?) +(\S.*)$", line))}
    assert output.startswith(f"{run}: running\n")
    assert re.fullmatch(r"2, 2 KB, \S+ [MGT]B free; newest 40", rows.pop("checkpoints"))
    assert rows == {
        "step": "50 of 200 (25%), epoch 0.50",
        "loss": "6.2500, learning rate 1.00e-03, gradient norm 2.00",
        "speed": "1,234 images/s, MFU 41%",
        "last record": "30 s ago",
        "left": "14 min 30 s",
        "evaluation": "step 30: weights top-1 50.00%, top-5 75.00%, loss 2.0000; EMA top-1 62.50%, top-5 75.00%, loss 2.0000",
        "job": f"17 on Slurm, process {os.getpid()} on node3, 2 nodes, 16 ranks",
        "problems": "2 bad images, 1 skipped steps, rolled back to step 20, save failed at step 50: No space left on device",
        "restarts": "1",
    }
    crash, current = listed.splitlines()
    assert crash.endswith("from step 40        crashed at 40: rank 3 on n1: exit code 1")
    assert current.endswith("has not ended")


@pytest.fixture
def at_now(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets the clock to NOW, however long ago these tests were collected."""
    monkeypatch.setattr(time, "time", lambda: NOW)


@pytest.mark.usefixtures("at_now")
def test_all_runs_below_a_folder_are_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("b", "a", "old/c"):
        add_records(tmp_path / name)
    add_checkpoint(tmp_path / "a", 200)
    add_attempt(tmp_path / "b", ended("crashed", "rank 3 on n1: exit code 1"), restart=0)
    add_attempt(tmp_path / "b")
    add_lock(tmp_path / "b")
    (tmp_path / "loop").symlink_to(tmp_path)
    assert status([tmp_path], follow=False) == 0
    rows = capsys.readouterr().out.splitlines()
    assert [row.split()[:2] for row in rows] == [
        ["run", "state"], [f"{tmp_path}/a", "complete"], [f"{tmp_path}/b", "running"], [f"{tmp_path}/old/c", "stopped"],
    ]  # fmt: skip
    assert re.search(r"  50 of 200 \(25%\)  6\.2500     1,234  14 min 50 s         1 .* free  last restart: rank 3 on n1: exit", rows[2])


def test_a_folder_without_a_run_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["pretrain", "status", str(tmp_path)])
    assert main() == 2
    assert f"error: there is no run in {tmp_path}\n" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["pretrain", "status", str(tmp_path / "later")])
    assert main() == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'later'}: waiting: no such folder yet\n  checkpoints  none\n")


# ---------------------------------------------------------------- damaged and long files

FOREIGN = [
    b'{"kind": "train", "step": 1, "time": NaN}\n{"kind": "train", "step": 1, "time": 1, "loss": NaN, "left_s": Infinity}',
    b"", b"\xff\x00\x80", b"null\n[]\n3", b'{"kind": ["train"], "step": 1, "time": 1}',
    b'{"kind": "train", "step": "1", "time": null, "end": 3, "job": [], "restart": {}}', b'{"kind": "train", "step": 1, "time": 1}\n{"ki',
    b'{"job": "1", "restart": 0, "began": "soon", "nodes": ["n0"], "ranks": 1, "saved": 0}\n{"job": "1", "restart": 0, "end": {"at": 1}}',
    b'{"job": 1, "restart": 0, "began": 1, "nodes": ["n0"], "ranks": 1, "saved": 0}',
    b'{"kind": "evaluation", "step": 4, "time": 1, "ema": 3, "weight": {"top1": "high"}, "pid": "x", "skipped": true}',
]  # fmt: skip


def test_damaged_files_are_skipped(tmp_path: Path) -> None:
    for number, content in enumerate(FOREIGN):
        run = tmp_path / str(number)
        add_checkpoint(run, 40)
        names = ("metrics.jsonl", ATTEMPTS, "STOP", "quarantine.jsonl", "bad_steps.jsonl", "lock-000001", "checkpoints/step-000000050")
        for name in names:
            (run / name).write_bytes(content)
        assert status([run], follow=False) == 0
    assert status([tmp_path], follow=False) == 0


def test_sound_lines_beside_damaged_ones_are_read(tmp_path: Path) -> None:
    run = tmp_path / "run"
    add_records(run)
    add_attempt(run, ended("crashed", "one"), restart=0)
    for name in ("metrics.jsonl", ATTEMPTS):
        with (run / name).open("ab") as file:
            file.write(b"\n".join([*FOREIGN, b""]))
    add_attempt(run, restart=1)
    add_records(run, step=90)
    found = read_with_queue(run)
    assert (found.step, found.total) == (90, 200)
    assert [attempt.job for attempt in found.attempts] == ["17", "1", "17"]  # one of FOREIGN is sound
    assert found.attempts[0].end is not None


def test_only_the_end_of_long_metrics_is_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with path.open("wb") as file:
        file.truncate(100 << 20)
    add_records(tmp_path)
    assert [record["step"] for record in read_records(path)] == [40, 50]  # the line of step 30 begins before the end that is read


def test_status_imports_nothing_slow(tmp_path: Path) -> None:
    add_records(tmp_path / "run")
    code = "import sys\nfrom pretrain.__main__ import main\nmain()\nprint(*sys.modules, file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", code, "status", str(tmp_path)], cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=60
    )
    assert "50 of 200 (25%)" in done.stdout
    assert not {"torch", "deepspeed", "timm", "numpy", "yaml", "nvidia.dali"} & set(done.stderr.split())


# ---------------------------------------------------------------- --follow


def follow(run: Path, output: int) -> subprocess.Popen:
    code = "import sys, pretrain.run.status as s, pathlib\ns.REDRAW_S = 0.1\nsys.exit(s.status([pathlib.Path(sys.argv[1])], follow=True))"
    command = [sys.executable, "-c", code, str(run)]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.PIPE, text=True)
    os.close(output)
    return process


def read_until(source: int, text: str) -> str:
    output, deadline = "", time.monotonic() + 30
    while text not in output:
        assert time.monotonic() < deadline, output
        output += os.read(source, 1 << 16).decode()
    return output


@pytest.mark.usefixtures("interruptible")
def test_follow_prints_again_after_a_change(tmp_path: Path) -> None:
    run = tmp_path / "run"
    add_records(run)
    source, sink = os.pipe()
    process = follow(run, sink)
    try:
        read_until(source, "checkpoints")
        time.sleep(0.5)  # nothing changes meanwhile
        add_records(run, step=90)
        assert read_until(source, "90 of 200").count(f"{run}: stopped") == 1
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=30)[1] == ""
        assert process.returncode == 0
    finally:
        process.kill()
        os.close(source)


# ---------------------------------------------------------------- a real job


@pytest.mark.long
@pytest.mark.slow
def test_states_of_a_real_job(tmp_path: Path, drawn: Path) -> None:
    run, settings = tmp_path / "run", ("steps=30", "run.save_every=10", "run.eval_every=1")

    def observe() -> tuple[str, str]:
        return state_of(read([run])[0], time.time())

    states = [observe()]
    (process,) = jobs.start(tmp_path, drawn, *settings, ranks=1)
    deadline = time.monotonic() + 120
    while states[-1][0] != "running" or "starting" in states[-1][1]:
        assert time.monotonic() < deadline, (tmp_path / "log").read_text()
        states.append(observe())
        time.sleep(0.02)
    assert states[0] == ("waiting", "no such folder yet")
    assert any(remark.startswith("starting") for _, remark in states)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    assert observe()[0] == "failed"

    jobs.run(tmp_path, drawn, *settings, ranks=1)
    assert observe() == ("complete", "")
    (found,) = read([run])
    assert (found.step, found.saved[-1], found.restarts) == (30, 30, 1)
    evaluations = {record["step"] for record in jobs.metrics(tmp_path, "evaluation")}
    assert {record["step"] for record in jobs.metrics(tmp_path, "train") if record["evaluates"]} == evaluations
