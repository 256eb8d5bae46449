"""Packing as an array job: parts on several nodes, one requeued and one killed, make one dataset."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from data.dataset.index import open_index
from data.packing.pack import pack
from data.packing.plan import Settings
from data.synthetic.synthesize import draw_images
from tests.slurm.cluster import Cluster, processes
from tests.support import REPOSITORY
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

SCRIPT = REPOSITORY / "launch" / "pack_in22k.sh"
OPTIONS = ("--shard-mb", "0.02", "--workers", "1", "--holdout", "0.1")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    for number, (encoded, label) in enumerate(draw_images(5, 1500, 0, 0)):
        folder = tmp_path / "source" / f"n{label:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.JPEG").write_bytes(encoded)
    return tmp_path / "source"


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def ids_of_tasks(cluster: Cluster, job: int) -> dict[int, int]:
    """Returns the job ids of the running tasks of an array."""
    lines = cluster.run("squeue", "--noheader", "--states=RUNNING", f"--jobs={job}", "--format=%K %A").splitlines()
    return {int(task): int(id_) for task, id_ in map(str.split, lines)}


@pytest.mark.long
def test_an_array_of_tasks_packs_stops_and_resumes(cluster: Cluster, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out" / "in22k"
    options = ["--array=0-2", "--cpus-per-task=1", "--time=5", f"--output={tmp_path}/%a.out"]
    done = out / "train.packing" / "done"

    def submit() -> int:
        return cluster.sbatch(SCRIPT, str(source), str(out), *OPTIONS, cwd=REPOSITORY, options=options)

    def packed(part: int) -> bool:
        return any(int(path.stem) % 3 == part for path in done.glob("*.npz"))

    job = submit()
    wait_until(lambda: all(map(packed, range(3))))
    tasks = ids_of_tasks(cluster, job)
    cluster.signal(tasks[0], "USR1", batch=True)  # as --signal does before the time limit
    wait_until(lambda: "requeueing task 0 of job" in (tmp_path / "0.out").read_text())
    for pid in processes(cluster.config):  # another is killed, as when a node fails
        with contextlib.suppress(OSError):  # it ended meanwhile
            environment = Path("/proc", str(pid), "environ").read_bytes().split(b"\0")
            if f"SLURM_JOB_ID={tasks[1]}".encode() in environment:
                os.kill(pid, signal.SIGKILL)
    cluster.skip_requeue_wait(tasks[0])
    cluster.wait(tasks[0], "COMPLETED", timeout=60)
    cluster.wait(tasks[2], "COMPLETED", timeout=60)
    assert not (out / "train" / "dataset.json").exists()
    assert re.search(r"\d+ of \d+ shards remain for other parts", (tmp_path / "0.out").read_text() + (tmp_path / "2.out").read_text())

    again = submit()
    wait_until(lambda: not cluster.run("squeue", "--noheader", f"--jobs={again}"))
    pack(source, tmp_path / "whole" / "in22k", Settings(name="in22k", shard_bytes=round(0.02 * 2**20), holdout=0.1))
    assert files_of(out) == files_of(tmp_path / "whole" / "in22k")
    assert len(open_index(out / "train")) + len(open_index(out / "val")) == 1500
    assert sorted(path.name for path in out.iterdir()) == ["train", "val"]


def test_without_slurm_it_packs_on_this_machine(source: Path, tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SLURM")}
    command = ["bash", str(SCRIPT), str(source), str(tmp_path / "out"), "--shard-mb", "1"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "samples      1500" in done.stdout
    shutil.rmtree(tmp_path / "out")
