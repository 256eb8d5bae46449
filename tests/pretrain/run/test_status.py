"""How runs stand: while a real job trains, is killed, goes on and ends, and by files written for each state."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pretrain.__main__ import main
from pretrain.run import attempts, standing
from pretrain.run.attempts import ATTEMPTS, Attempt, End
from pretrain.run.directory import machine_id, process_start
from pretrain.run.standing import Job, Run, judge, tail
from pretrain.run.status import size, status
from tests.support import REPOSITORY, jobs
from tests.support.ranks import join

NOW = time.time()
TRAIN = {"kind": "train", "step": 50, "epoch": 0.5, "loss": 6.25, "lr": 1e-3, "grad_norm": 2.0, "images_per_s": 1234.5, "left_s": 900.0}
PLAN = {"total": 200, "next_save": 100, "evaluates": False}


def lines(path: Path, *values: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(value) + "\n" for value in values)


def trained(run: Path, step: int = 50, ago: float = 10, **more: Any) -> None:
    """Records of steps, one a minute, the last one so many seconds ago."""
    for before in (2, 1, 0):
        lines(run / "metrics.jsonl", TRAIN | PLAN | {"step": step - 10 * before, "time": NOW - ago - 60 * before} | more)


def saved(run: Path, step: int, total: int = 200) -> None:
    folder = run / "checkpoints" / f"step-{step:09d}"
    lines(folder / "trainer.json", {"step": step, "identity": {"steps": total}, "evaluation": None})
    (folder / "__0_0.distcp").write_bytes(bytes(1000))


def locked(run: Path, *, pid: int = 0, elsewhere: bool = False, touched: float = 0, since: float = 600, job: str | None = None) -> None:
    """The lock of a process of this machine (by default this one) or of another, touched and taken so many seconds ago."""
    pid = pid or os.getpid()
    when = time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(NOW - since))
    holder = {"host": "node3", "pid": pid, "job": job, "since": when, "started": process_start(pid) or 1}
    lines(run / "lock-000003", holder | {"machine": "another/pid:[1]" if elsewhere else machine_id()})
    os.utime(run / "lock-000003", (NOW - touched, NOW - touched))


def attempted(run: Path, end: End | None = None, began: float = 700, restart: int = 1) -> None:
    run.mkdir(exist_ok=True)
    attempt = Attempt("17", restart, NOW - began, ("n0", "n1"), 16, 40)
    attempts.write(run, attempt)
    if end is not None:
        attempts.write(run, Attempt(**vars(attempt) | {"end": end}))


def ended(outcome: Any, reason: str, **more: Any) -> End:
    return End(NOW - 60, outcome, reason, 40, **more)


def gone() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def standing_of(run: Path, jobs: dict[str, Job] | None = None) -> Run:
    """As `read` has it, where Slurm's queue holds these jobs; None: it can't be asked."""
    held = standing._holder(run, NOW)
    return standing._read(run, tuple(attempts.read(run)), held, jobs)


# ---------------------------------------------------------------- states

PENDING, RUNNING = Job("PENDING", "Priority", NOW + 3600), Job("RUNNING", "None", NOW - 700)
STATES: dict[str, tuple[list[Callable[[Path], None]], dict[str, Job] | None, str, str]] = {
    "settings alone": ([lambda run: lines(run / "config.yaml", {})], None, "not started", ""),
    "a lock and no record": ([locked], None, "starting", "process"),
    "a lock and older records": ([lambda run: trained(run, ago=900), locked], None, "starting", "process"),
    "a lock and records": ([trained, locked], None, "training", ""),
    "a save": ([trained, locked, lambda run: (run / "checkpoints/.partial-step-000000050-ab12").mkdir(parents=True)], None, "training",
               "saving step 50"),
    "RUN/STOP": ([trained, locked, lambda run: (run / "STOP").touch()], None, "training", "STOP is there: it saves and ends"),
    "a late record": ([lambda run: trained(run, ago=500), locked], None, "training",
                      "no record for 8 min 20 s, where one comes every 1 min 0 s"),
    "an evaluation": ([lambda run: trained(run, evaluates=True), locked], None, "evaluating", ""),
    "after it": ([lambda run: trained(run, evaluates=True), lambda run: lines(run / "metrics.jsonl", {"kind": "evaluation", "step": 50,
                  "time": NOW}), locked], None, "training", ""),
    "a lock elsewhere that beats": ([lambda run: trained(run, ago=30), lambda run: locked(run, elsewhere=True, touched=15)], None,
                                    "training", ""),
    "one that does not, and a record": ([lambda run: trained(run, ago=90), lambda run: locked(run, elsewhere=True, touched=150)], None,
                                        "training", ""),
    "neither": ([lambda run: trained(run, ago=720), lambda run: locked(run, elsewhere=True, touched=700)], None, "silent",
                "no sign of life for 11 min 40 s"),
    "neither, and Slurm says it runs": ([lambda run: trained(run, ago=720), attempted, lambda run: locked(run, elsewhere=True,
                                        touched=700)], {"17": RUNNING}, "silent", "no sign of life for 11 min 40 s; job 17 RUNNING"),
    "neither, and Slurm has forgotten it": ([lambda run: locked(run, elsewhere=True, touched=700, job="17")], {}, "failed",
                                            "job 17 is no longer in the queue"),
    "a killed process": ([trained, lambda run: saved(run, 40), lambda run: locked(run, pid=gone())], None, "failed",
                         "has ended without a word; the same command goes on from step 40"),
    "no lock": ([trained, lambda run: saved(run, 50)], None, "stopped", ""),
    "no lock and no save": ([trained, lambda run: saved(run, 40)], None, "stopped", "the last 10 steps are not saved"),
    "the last step saved": ([trained, lambda run: saved(run, 200)], None, "complete", ""),
    "and Slurm's job there": ([attempted, lambda run: saved(run, 200)], {"17": RUNNING}, "complete", "job 17 RUNNING"),
    "in the queue": ([trained, lambda run: attempted(run, ended("stopped", "told to stop", again=True))], {"17": PENDING}, "queued",
                     r"job 17 PENDING \(Priority\), expected to start 20"),
    "in the queue, a moment after its node was lost": (
        [lambda run: trained(run, ago=10), attempted, lambda run: locked(run, elsewhere=True, touched=5, job="17")], {"17": PENDING},
        "queued", r"job 17 PENDING \(Priority\), expected to start 20"
    ),
    "in the queue, while another trains there": (
        [lambda run: trained(run, ago=10), attempted, lambda run: locked(run, elsewhere=True, touched=5, job="18")], {"17": PENDING},
        "training", ""
    ),
    "begun": ([attempted], {"17": RUNNING}, "starting", "job 17 RUNNING"),
    "begun again": ([lambda run: trained(run, ago=900), attempted], {"17": RUNNING}, "starting", "job 17 RUNNING"),
    "done with the run": ([trained, attempted], {"17": Job("COMPLETING", "None", None)}, "ending", "job 17 COMPLETING"),
    "lost": ([attempted], {}, "failed", "job 17 is no longer in the queue and left no word"),
    "without Slurm, beside runs with it": (
        [lambda run: trained(run, ago=720), lambda run: locked(run, elsewhere=True, touched=700)], {}, "silent", "no sign of life for"
    ),
    "without squeue": ([attempted], None, "silent", "no sign of life for 11 min 40 s"),
    "crashed": ([lambda run: attempted(run, ended("crashed", "rank 3 on n1: exit code 1", step=44))], {}, "failed",
                "rank 3 on n1: exit code 1"),
    "told to end": ([lambda run: attempted(run, ended("ended", "RUN/STOP"))], {}, "stopped", "RUN/STOP"),
    "to go on": ([lambda run: attempted(run, ended("stopped", "told to stop", again=True))], None, "queued",
                 "went back to the queue, and squeue can't be asked here"),
    "cancelled in the queue": ([lambda run: attempted(run, ended("stopped", "told to stop", again=True))], {}, "stopped",
                               "it was to go on, but job 17 is no longer in the queue"),
    "given up": ([lambda run: lines(run / "metrics.jsonl"), lambda run: (run / "FAILED.md").write_text("\n# Step 44 failed twice\n…")],
                 None, "failed", "Step 44 failed twice; see .*FAILED.md"),
}  # fmt: skip


@pytest.mark.parametrize("case", STATES)
def test_states(tmp_path: Path, case: str) -> None:
    written, queue, expected, text = STATES[case]
    run = tmp_path / "run"
    run.mkdir()
    for write in written:
        write(run)
    state, told = judge(standing_of(run, queue), NOW)
    assert state == expected
    assert re.search(text, told) if text else told == ""


# ---------------------------------------------------------------- what is shown


@pytest.fixture
def at_now(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time is NOW, however long ago these tests were collected."""
    monkeypatch.setattr(time, "time", lambda: NOW)


@pytest.mark.usefixtures("at_now")
def test_a_run_in_detail(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    saved(run, 20)
    saved(run, 40)
    accuracy = {"top1": 0.5, "top5": 0.75, "loss": 2.0}
    lines(run / "metrics.jsonl", {"kind": "evaluation", "time": NOW, "step": 30, "weight": accuracy, "ema": accuracy | {"top1": 0.625}})
    trained(run, ago=0, mfu=0.41)
    lines(run / "metrics.jsonl", {"kind": "save_failed", "time": NOW, "step": 50, "reason": "No space left on device"})
    lines(run / "quarantine.jsonl", {"key": "a"}, {"key": "b"})
    lines(run / "bad_steps.jsonl", {"step": 31, "skipped": True}, {"step": 31, "skipped": True}, {"step": 33, "skipped": False})
    (run / "rollbacks.json").write_text('[{"first": 1, "last": 2}]')
    attempted(run, ended("crashed", "rank 3 on n1: exit code 1"), began=4000, restart=0)
    attempted(run)
    locked(run, job="17")
    assert status([run], follow=False) == 0
    shown = capsys.readouterr().out
    found = {row[1]: row[2] for line in shown.splitlines() if (row := re.match(r"  (\w+(?: \w+)?) +(\S.*)$", line))}
    assert shown.startswith(f"{run}: training\n")
    assert found["step"] == "50 of 200 (25%), epoch 0.50"
    assert found["loss"] == "6.2500, learning rate 1.00e-03, gradient 2.00"
    assert found["speed"] == "1,234 images/s, MFU 41%"
    # 150 steps in 900 s, less what has passed since.
    assert re.fullmatch(r"1(4 min \d+|5 min 0) s", found["left"])
    assert re.fullmatch(r"step 100 in (4 min \d+|5 min 0) s", found["next save"])
    assert re.match(r"2, 2\.\d+ KB, \S+ [MGT]B free; newest 40, ", found["checkpoints"])
    assert found["evaluation"] == (
        "step 30: weights top-1 50.00%, top-5 75.00%, loss 2.0000; moving average top-1 62.50%, top-5 75.00%, loss 2.0000"
    )
    assert found["job"] == f"17 on Slurm, process {os.getpid()} on node3, 2 nodes, 16 ranks"
    assert found["trouble"] == "2 bad images, 1 skipped steps, 1 rollbacks, saving failed at step 50: No space left on device"
    assert found["restarts"] == "1"
    crash, now = shown.split("last attempts\n")[1].splitlines()
    assert crash.endswith("from step 40        crashed at 40: rank 3 on n1: exit code 1")
    assert now.endswith("has not ended")


def test_all_runs_below_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("b", "a", "old/c"):
        trained(tmp_path / name)
    saved(tmp_path / "a", 200)
    (tmp_path / "notes").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path)
    assert status([tmp_path], follow=False) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[:2] for row in rows] == [
        ["run", "state"], [str(tmp_path / "a"), "complete"], [str(tmp_path / "b"), "stopped"], [str(tmp_path / "old" / "c"), "stopped"]
    ]  # fmt: skip
    status([tmp_path / "b", tmp_path / "a"], follow=False)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]] == [str(tmp_path / "b"), str(tmp_path / "a")]


@pytest.mark.usefixtures("at_now")
def test_a_row_says_why_the_run_was_restarted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for run in (tmp_path / "a", tmp_path / "b"):
        trained(run)
        locked(run)
    attempted(tmp_path / "b", ended("crashed", "rank 3 on n1: exit code 1"), restart=0)
    attempted(tmp_path / "b")
    assert status([tmp_path], follow=False) == 0
    rows = capsys.readouterr().out.splitlines()
    assert rows[1].endswith(" free")
    assert re.search(r" 1  +\S+ B, \S+ [MGT]B free  last restart: rank 3 on n1: exit code 1$", rows[2])


def test_where_there_is_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["pretrain", "status", str(tmp_path)])
    assert main() == 2
    assert f"error: there is no run in {tmp_path}\n" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["pretrain", "status", str(tmp_path / "later")])  # as of a job that has not begun
    assert main() == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'later'}: not started: there is no such folder\n")


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (999, "999 B"), (999_600, "1 MB"), (3.34e9, "3.34 GB"), (5.2e15, "5.2e+03 TB")])
def test_sizes(count: float, text: str) -> None:
    assert size(count) == text


# ---------------------------------------------------------------- files as they come

FOREIGN = [
    b'{"kind": "train", "step": 1, "time": NaN}\n{"kind": "train", "step": 1, "time": 1, "loss": NaN, "left_s": Infinity}',
    b"", b"\xff\x00\x80", b"null", b"[]\n3", b'{"kind": "train", "st', b'{"kind": ["train"], "step": 1, "time": 1}',
    b'{"kind": "train", "step": "1", "time": null, "end": 3, "job": [], "restart": {}}', b'{"kind": "train", "step": 1, "time": 1}\n{"ki',
    b'{"job": "1", "restart": 0, "began": "soon", "nodes": ["n0"], "ranks": 1, "saved": 0}\n{"job": "1", "restart": 0, "end": {"at": 1}}',
    b'{"job": 1, "restart": 0, "began": 1, "nodes": ["n0"], "ranks": 1, "saved": 0}',
    b'{"step": 4, "identity": 7, "evaluation": {"ema": 3, "weight": {"top1": "high"}}, "pid": "x", "skipped": true}',
]  # fmt: skip


@pytest.mark.parametrize("content", FOREIGN)
def test_half_written_and_foreign_files_are_passed_over(tmp_path: Path, content: bytes) -> None:
    run = tmp_path / "run"
    saved(run, 40)
    for name in ("metrics.jsonl", ATTEMPTS, "FAILED.md", "STOP", "rollbacks.json", "quarantine.jsonl", "bad_steps.jsonl", "lock-000001",
                 "config.yaml", "checkpoints/step-000000040/trainer.json", "checkpoints/latest", "checkpoints/step-000000050"):  # fmt: skip
        (run / name).write_bytes(content)
    assert status([run], follow=False) == status([tmp_path], follow=False) == 0


def test_what_is_sound_beside_them_is_read(tmp_path: Path) -> None:
    run = tmp_path / "run"
    trained(run)
    attempted(run, ended("crashed", "one"), restart=0)
    for name in ("metrics.jsonl", ATTEMPTS):
        with (run / name).open("ab") as file:
            file.write(b"\n".join([*FOREIGN, b""]))
    attempted(run, restart=1)
    trained(run, step=90)
    found = standing_of(run)
    assert (found.step, found.total) == (90, 200)
    assert [attempt.job for attempt in found.attempts] == ["17", "1", "17"]  # one of the foreign lines is sound
    assert found.attempts[0].end is not None


def test_of_a_long_record_the_end_alone_is_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with path.open("wb") as file:
        file.truncate(100 << 20)
    trained(tmp_path)
    tracemalloc.start()
    records = tail(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [record["step"] for record in records] == [40, 50]  # the first one's line begins with what was left out
    assert peak < 2 << 20


def test_it_imports_nothing_heavy(tmp_path: Path) -> None:
    trained(tmp_path / "run")
    code = "import sys\nfrom pretrain.__main__ import main\nmain()\nprint(*sys.modules, file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", code, "status", str(tmp_path)], cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=60
    )
    assert "50 of 200 (25%)" in done.stdout
    assert not {"torch", "deepspeed", "timm", "numpy", "omegaconf", "nvidia.dali"} & set(done.stderr.split())


# ---------------------------------------------------------------- following

FOLLOW = (
    "import sys, pretrain.run.status as s\nfrom pathlib import Path\ns.REDRAW_S = 0.1\nsys.exit(s.status([Path(sys.argv[1])], follow=True))"
)


def follow(run: Path, output: int) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", FOLLOW, str(run)], cwd=REPOSITORY, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.PIPE, text=True
    )


def read_until(source: int, text: str) -> str:
    found, deadline = "", time.monotonic() + 30
    while text not in found:
        assert time.monotonic() < deadline, found
        found += os.read(source, 1 << 16).decode()
    return found


def interrupt(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30)[1] == ""
    assert process.returncode == 0


@pytest.mark.usefixtures("interruptible")
def test_into_a_pipe_it_tells_what_has_changed(tmp_path: Path) -> None:
    run = tmp_path / "run"
    trained(run)
    source, sink = os.pipe()
    process = follow(run, sink)
    os.close(sink)
    try:
        assert "50 of 200" in read_until(source, "checkpoints")
        time.sleep(0.5)  # nothing changes meanwhile
        trained(run, step=90)
        more = read_until(source, "90 of 200")
        assert more.count(f"{run}: stopped") == 1
        interrupt(process)
    finally:
        process.kill()
        os.close(source)


@pytest.mark.usefixtures("interruptible")
def test_on_a_terminal_it_draws_in_place(tmp_path: Path) -> None:
    run = tmp_path / "run"
    trained(run)
    source, sink = pty.openpty()
    process = follow(run, sink)
    os.close(sink)
    try:
        first = read_until(source, "checkpoints")
        assert first.startswith("\x1b[H\x1b[J")
        assert "\x1b[H\x1b[J" in first[1:] + read_until(source, "checkpoints")
        interrupt(process)
    finally:
        process.kill()
        os.close(source)


# ---------------------------------------------------------------- a job's life


@pytest.mark.long
@pytest.mark.slow
def test_a_job_is_followed_through_its_life(tmp_path: Path, drawn: Path) -> None:
    run, settings = tmp_path / "run", ("steps=30", "run.save_every=10", "run.eval_every=1")

    def begin() -> tuple[Any, list[str]]:
        """Starts the job, and returns when it has made a new step; with the states that it was in."""
        processes, states = jobs.start(tmp_path, drawn, *settings, ranks=1), [""]
        deadline = time.monotonic() + 120
        while states[-1] not in ("training", "evaluating"):
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            state = judge(standing.read([run])[0], time.time())[0]
            states += [state] if state != states[-1] else []
            time.sleep(0.02)
        return processes, states[1:]

    processes, states = begin()
    assert states[:1] == ["not started"]
    assert "starting" in states
    (found,) = standing.read([run])
    assert (found.total, found.records["train"]["next_save"]) == (30, 10 * (found.records["train"]["step"] // 10 + 1))
    assert found.holder is not None
    assert found.holder.alive
    os.kill(processes[0].pid, signal.SIGKILL)
    processes[0].join()
    state, told = judge(standing.read([run])[0], time.time())
    assert state == "failed"
    assert "has ended without a word" in told

    processes, states = begin()
    assert states[0] in ("failed", "starting")
    os.kill(processes[0].pid, signal.SIGUSR1)
    assert join(processes).first == 85
    (found,) = standing.read([run])
    assert judge(found, time.time()) == ("stopped", "")
    assert found.saved[-1] == found.step

    jobs.run(tmp_path, drawn, *settings, ranks=1)
    (found,) = standing.read([run])
    assert judge(found, time.time()) == ("complete", "")
    assert (found.step, found.saved[-1], found.restarts) == (30, 30, 2)
    assert found.records["evaluation"]["step"] == 30
    recorded = jobs.metrics(tmp_path, "train")
    evaluations = {record["step"] for record in jobs.metrics(tmp_path, "evaluation")}
    assert {record["step"] for record in recorded if record["evaluates"]} == evaluations
