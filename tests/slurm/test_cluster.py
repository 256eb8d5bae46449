"""The private cluster: tasks on every node, requeues, signals, exit codes, and no process left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, private_cluster, processes

pytestmark = pytest.mark.slurm


def script(folder: Path, body: str) -> Path:
    path = folder / "job.sh"
    path.write_text(f"#!/bin/bash\n{body}")
    return path


def wait_for_output(cluster: Cluster, job: int, text: str) -> None:
    deadline = time.monotonic() + 20
    while text not in cluster.output(job):
        assert time.monotonic() < deadline, cluster.output(job)
        time.sleep(0.1)


def wait_for_end(pids: list[int]) -> None:
    deadline = time.monotonic() + 10
    # One that has ended and that init hasn't collected yet no longer has a program.
    while running := [pid for pid in pids if Path(f"/proc/{pid}/exe").exists()]:
        assert time.monotonic() < deadline, running
        time.sleep(0.1)


def test_one_task_runs_on_each_node(cluster: Cluster, tmp_path: Path) -> None:
    body = 'srun bash -c \'echo rank $SLURM_PROCID of $SLURM_NTASKS on $SLURMD_NODENAME, $0 $1\' "$1" "$WORD"'
    job = cluster.sbatch(
        script(tmp_path, body), "first", cwd=tmp_path, options=["--nodes=2", "--ntasks-per-node=1"], env={"WORD": "second"}
    )
    cluster.wait(job, "COMPLETED", timeout=20)
    assert sorted(cluster.output(job).splitlines()) == [
        "rank 0 of 2 on n0, first second",
        "rank 1 of 2 on n1, first second",
    ]


@pytest.mark.parametrize("batch", [False, True])
def test_signalled_job_requeues_itself(cluster: Cluster, tmp_path: Path, batch: bool) -> None:
    # A signal to the steps reaches both tasks and not the shell; one to the shell reaches it alone.
    task = """trap "echo task stopped; exit 75" USR1; echo task ready; while true; do sleep 0.1; done"""
    body = f"""
trap 'echo shell signalled; stop=1; scancel --signal=KILL $SLURM_JOB_ID.0' USR1
[ -n "$SLURM_RESTART_COUNT" ] && echo "$SLURM_JOB_ID restart $SLURM_RESTART_COUNT" && exit
srun bash -c '{task}' &
wait $!
wait
scontrol requeue $SLURM_JOB_ID
sleep 60
"""
    job = cluster.sbatch(
        script(tmp_path, body), cwd=tmp_path, options=["--nodes=2", "--ntasks-per-node=1", "--requeue", "--open-mode=append"]
    )
    wait_for_output(cluster, job, "task ready\ntask ready\n")
    cluster.signal(job, "USR1", batch=batch)
    cluster.skip_requeue_wait(job)
    cluster.wait(job, "COMPLETED", timeout=20)
    output = cluster.output(job)
    assert output.count("shell signalled") == (1 if batch else 0)
    assert output.count("task stopped") == (0 if batch else 2)
    assert f"{job} restart 1\n" in output
    assert cluster.job(job)["Restarts"] == "1"


def test_bad_exit_of_one_task_ends_the_others(cluster: Cluster, tmp_path: Path) -> None:
    body = "srun --kill-on-bad-exit=1 bash -c '[ $SLURM_PROCID = 0 ] || exit 7; sleep 300'"
    job = cluster.sbatch(script(tmp_path, body), cwd=tmp_path, options=["--nodes=2", "--ntasks-per-node=1"])
    assert cluster.wait(job, timeout=20) == "FAILED"
    # srun exits with the highest code of its tasks, and one ended with TERM or KILL counts as 143 or 137: the 7 is lost.
    assert cluster.job(job)["ExitCode"] in {"143:0", "137:0"}


def test_stop_leaves_no_process(slurm_programs: None, tmp_path: Path) -> None:
    with private_cluster(tmp_path / "slurm") as fresh:
        # Ignoring TERM, and with a child outside the process group: what a scancel finds hardest to end.
        body = "trap '' TERM; srun bash -c \"trap '' TERM; setsid sleep 300 & echo task ready; wait\""
        job = fresh.sbatch(script(tmp_path, body), cwd=tmp_path, options=["--nodes=2"])
        wait_for_output(fresh, job, "task ready\ntask ready\n")
        pids = processes(fresh.config)
        assert len(pids) >= 3 + 2 + 2  # the daemons, a shell on each node, a sleep on each node
    assert not processes(fresh.config)
    wait_for_end(pids)


def test_killed_tests_leave_no_process(slurm_programs: None, tmp_path: Path) -> None:
    program = (
        "import sys, time, pathlib, cluster\n"
        "with cluster.private_cluster(pathlib.Path(sys.argv[1])) as fresh:\n"
        "    fresh.sbatch(pathlib.Path(sys.argv[2]), cwd=pathlib.Path(sys.argv[1]))\n"
        "    print('started', flush=True)\n"
        "    time.sleep(300)\n"
    )
    root = tmp_path / "slurm"
    tests = subprocess.Popen(
        [sys.executable, "-c", program, root, script(tmp_path, "sleep 300")],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)},
    )
    assert tests.stdout is not None
    assert tests.stdout.readline() == b"started\n"
    pids = processes(root / "slurm.conf")
    assert len(pids) >= 3
    tests.send_signal(signal.SIGKILL)
    tests.communicate()
    wait_for_end(pids)


def test_failed_start_says_why_and_leaves_no_process(slurm_programs: None, tmp_path: Path) -> None:
    root = tmp_path / "slurm"
    with pytest.raises(RuntimeError, match=r"CPUs value \(-1\) is less than zero"), private_cluster(root, cpus=-1):
        pass
    assert not processes(root / "slurm.conf")
