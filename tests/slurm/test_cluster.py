"""The private cluster leaves no process on this machine."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.cluster import processes
from tests.support.waiting import wait_until

pytestmark = pytest.mark.slurm

# Tests with a job that is hardest to end: a task ignores TERM and has a child outside its process group.
PROGRAM = """
import sys, time
from pathlib import Path
from cluster import private_cluster

with private_cluster(Path(sys.argv[1])) as cluster:
    job = cluster.sbatch(Path(sys.argv[2]), cwd=Path(sys.argv[1]), options=["--nodes=2"])
    while cluster.output(job).count("task ready") < 2:
        time.sleep(0.1)
    print("started", flush=True)
    sys.stdin.read(1)
"""


@pytest.mark.parametrize("killed", [False, True])
def test_no_process_is_left(slurm_programs: None, tmp_path: Path, killed: bool) -> None:
    script, root = tmp_path / "job.sh", tmp_path / "slurm"
    script.write_text("#!/bin/bash\ntrap '' TERM; srun bash -c \"trap '' TERM; setsid sleep 300 & echo task ready; wait\"")
    tests = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, root, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)},
    )  # fmt: skip
    assert tests.stdout is not None
    assert tests.stdout.readline() == b"started\n"
    pids = processes(root / "slurm.conf")
    assert len(pids) >= 3 + 2 + 2  # the daemons, a shell on each node, a sleep on each node
    if killed:
        tests.send_signal(signal.SIGKILL)
    tests.communicate()
    # A process that has ended and that init hasn't collected yet no longer has a program.
    wait_until(lambda: not any(Path(f"/proc/{pid}/exe").exists() for pid in pids), 10)
