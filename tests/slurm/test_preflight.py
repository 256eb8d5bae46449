"""Preflight as steps of a real Slurm: who leads where, and which node is missing, follow from what Slurm tells a task."""

import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.run.attempts import heard
from tests.launch.test_preflight import JOB, REPOSITORY
from tests.slurm.cluster import Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

# n1's task is gone before it says anything, and rank 0 is not to wait long for it.
LOST = """
import os, sys
if os.environ["SLURMD_NODENAME"] == "n1": sys.exit(0)
import launch.preflight.__main__ as preflight
preflight.PATIENCE = 2
code = preflight.main(sys.argv[1:])
sys.stdout.flush()
os._exit(code)
"""


def srun(cluster: Cluster, folder: Path, drawn: Path, *python: str) -> subprocess.CompletedProcess:
    (folder / "job.yaml").write_text(JOB)
    data = {"TRAIN": str(drawn / "train"), "VAL": str(drawn / "val")}
    environment = cluster.env | data | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    command = ["srun", "--nodes=2", "--ntasks-per-node=1", sys.executable, *python, str(folder / "job.yaml"), f"run.dir={folder / 'run'}"]
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_two_nodes_find_each_other(cluster: Cluster, tmp_path: Path, drawn: Path) -> None:
    ended = srun(cluster, tmp_path, drawn, "-m", "launch.preflight")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    lines = ended.stdout.splitlines()
    assert lines[0] == "preflight: 2 ranks on 2 nodes"
    assert [line.split()[0] for line in lines[3:5]] == ["n0", "n1"]
    assert lines[-1] == "preflight: fit"


def test_a_node_that_does_not_come_is_named(cluster: Cluster, tmp_path: Path, drawn: Path) -> None:
    ended = srun(cluster, tmp_path, drawn, "-c", LOST)
    assert ended.returncode == 3, ended.stdout + ended.stderr
    told = [found for line in ended.stdout.splitlines() if (found := heard(line))]
    assert told == [("node", {"host": "n1", "why": "1 of its 1 ranks did not come within 2 s (of all, rank 1)"})]
