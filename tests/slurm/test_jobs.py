"""The job scripts as a user submits them: two nodes train the real models, with settings of the site; without Slurm, this machine."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import psutil
import pytest

from pretrain.checkpoint import verify
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import ENVIRONMENT, PATIENCE, REPOSITORY, SMALL, Jobs, ranks

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


def test_two_nodes_pretrain_van_b3(jobs: Jobs, cluster: Cluster, drawn: Path) -> None:
    job = jobs.submit("van_b3_in22k.sh", f"data.val={drawn / 'val'}", "steps=2", "run.save_every=1")
    jobs.wait_for(job, lambda: set(ranks(cluster).values()) == {("n0", "0", "2"), ("n1", "1", "2")})
    output = jobs.complete(job)
    assert "van_b3, 44.26 M parameters, 10 classes" in output
    assert "2 cpu ranks; global batch 4 = 2 x 2 x 1" in output
    assert [int(step) for step in re.findall(r"step (\d+)/2 ", output)] == [1, 2]
    assert re.search(r"evaluation at step 2 .* on 20 images", output)
    assert "complete after 2 steps" in output
    newest = jobs.newest()
    assert newest.name == "step-000000002"
    assert verify(newest) == []
    assert {path.name for path in newest.glob("*.distcp")} == {"__0_0.distcp", "__1_0.distcp"}  # both ranks wrote a part


@pytest.mark.full
@pytest.mark.parametrize(("name", "millions", "gigabytes"), [("van_b4", "59.78", 5), ("van_b5", "89.21", 6), ("van_b6", "199.07", 12)])
def test_larger_models_train(jobs: Jobs, name: str, millions: str, gigabytes: int) -> None:
    if psutil.virtual_memory().available < gigabytes * 1e9:
        pytest.skip(f"two ranks of {name} need {gigabytes} GB of free memory")
    output = jobs.complete(jobs.submit(f"{name}_in22k.sh", "steps=1"))
    assert f"{name}, {millions} M parameters" in output
    assert "complete after 1 steps" in output


@pytest.mark.long
def test_site_settings(jobs: Jobs, tmp_path: Path) -> None:
    """launch/site.env: options of srun as for pyxis, a command before Python as for Apptainer, and settings."""
    copy = tmp_path / "copy"
    shutil.copytree(REPOSITORY / "launch", copy / "launch")
    for name in (".venv", "configs", "data", "pretrain"):
        (copy / name).symlink_to(REPOSITORY / name)
    (copy / "launch" / "site.env").write_text(
        "CONTAINER=(--comment=in_a_container)\nWRAP=(env NCCL_DEBUG=VERSION)\nSETTINGS=(steps=2 global_batch=8)\nexport OMP_NUM_THREADS=1\n"
    )
    output = jobs.complete(jobs.submit("van_b3_in22k.sh", "model.name=van_b0", cwd=copy))
    assert "complete after 2 steps" in output
    assert "global batch 4 = " in output  # the command line overrides the site
    environment = json.loads((jobs.run / "starts" / "0001" / "environment.json").read_text())
    assert environment["variables"]["NCCL_DEBUG"] == "VERSION"
    assert sorted(path.name for path in (jobs.run / "weights").iterdir() if path.suffix == ".pth") == ["van_b3_in22k.pth"]


@pytest.mark.long
def test_script_without_slurm_runs_on_this_machine(tmp_path: Path, drawn: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SLURM")}
    settings = (
        *SMALL,
        "global_batch=4",
        "engine.micro_batch=2",
        f"data.train={drawn / 'train'}",
        f"run.dir={tmp_path / 'run'}",
        "model.name=van_b0",
        "steps=1",
    )
    done = subprocess.run(
        ["bash", REPOSITORY / "launch" / "van_b3_in22k.sh", *settings],
        cwd=tmp_path, env=environment | ENVIRONMENT | {"RANKS": "2"}, capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "van_b0, 3.85 M parameters" in done.stdout
    assert "2 cpu ranks" in done.stdout
    assert verify(tmp_path / "run" / "checkpoints" / "step-000000001") == []
    shutil.rmtree(tmp_path / "run")
