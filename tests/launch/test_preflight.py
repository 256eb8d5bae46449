"""What preflight finds on nodes: real ranks on loopback that say they are nodes."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from launch.__main__ import free_port
from pretrain.run.attempts import heard
from tests.support import REPOSITORY

pytestmark = pytest.mark.slow

DAMAGE = b"\xff" * 512  # where a tar header should be

# Nothing here may differ between the nodes but what a test lets differ.
JOB = """
name: small
global_batch: 24
epochs: 1
model: {name: van_b0, classes: 10}
data: {train: "${env:TRAIN}", val: "${env:VAL}", image_size: 32}
optim: {lr: 1e-3}
engine: {device: cpu, micro_batch: 4}
"""
# `here` may change something first, as a node's own trouble would. The patience is that of rank 0 and of the others.
PREFLIGHT = """
import os, signal, sys, time
import launch.preflight.__main__ as preflight
from launch.preflight.nodes import Here
preflight.PATIENCE = float(os.environ["PATIENCE"])
exec(os.environ.get("TROUBLE", ""))
code = preflight.main(sys.argv[1:])
sys.stdout.flush()
os._exit(code)
"""


@dataclass
class Ended:
    codes: list[int]
    out: str  # of all ranks
    err: str
    seconds: float

    @property
    def told(self) -> dict[str, str]:
        """The unfit nodes and why, as the batch script hears them."""
        lines = [found for line in self.out.splitlines() if (found := heard(line))]
        assert all(kind == "node" for kind, _ in lines)
        return {values["host"]: values["why"] for _, values in lines}

    @property
    def errors(self) -> list[str]:
        return [line.removeprefix("error: ") for line in self.err.splitlines() if line.startswith("error: ")]


class Ranks:
    """Runs preflight as ranks of a job, one on each of nodes n0, n1, …; `own` are a node's own environment variables."""

    def __init__(self, folder: Path, drawn: Path) -> None:
        self.folder = folder
        (folder / "job.yaml").write_text(JOB)
        shared = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "PATIENCE": "20", "TMPDIR": str(folder)}
        outside = {key: value for key, value in os.environ.items() if not key.startswith("SLURM")}
        self.environment = outside | shared | {"TRAIN": str(drawn / "train"), "VAL": str(drawn / "val")}

    @contextmanager
    def started(self, ranks: int, *arguments: str, own: Mapping[int, Mapping[str, str]], of: int | None = None) -> Iterator[list]:
        port = str(free_port())
        command = [sys.executable, "-c", PREFLIGHT, str(self.folder / "job.yaml"), f"run.dir={self.folder / 'run'}", *arguments]
        processes = []
        for rank in range(ranks):
            place = {"RANK": str(rank), "WORLD_SIZE": str(of or ranks), "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            environment = self.environment | place | {"SLURMD_NODENAME": f"n{rank}"} | dict(own.get(rank, {}))
            pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            processes.append(subprocess.Popen(command, cwd=REPOSITORY, env=environment, **pipes))
        try:
            yield processes
        finally:
            for process in processes:
                process.kill()
                process.communicate()

    def run(self, ranks: int, *arguments: str, own: Mapping[int, Mapping[str, str]] = {}, of: int | None = None) -> Ended:
        began = time.monotonic()
        with self.started(ranks, *arguments, own=own, of=of) as processes:
            outputs = [process.communicate(timeout=60) for process in processes]
            codes = [process.returncode for process in processes]
        ended = Ended(codes, "".join(out for out, _ in outputs), "".join(err for _, err in outputs), time.monotonic() - began)
        assert "Traceback" not in ended.err, ended.err
        return ended


@pytest.fixture
def ranks(tmp_path: Path, drawn: Path) -> Ranks:
    return Ranks(tmp_path, drawn)


# ---------------------------------------------------------------- real ranks


def test_a_machine_alone_is_fit(ranks: Ranks) -> None:
    """Not one of the programs that take long to import is: they would double the time."""
    command = [
        sys.executable,
        "-X",
        "importtime",
        "-m",
        "launch.preflight",
        str(ranks.folder / "job.yaml"),
        f"run.dir={ranks.folder / 'run'}",
    ]
    environment = {key: value for key, value in ranks.environment.items() if key not in ("RANK", "WORLD_SIZE")}
    ended = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("preflight: 1 rank on 1 node\n")
    assert ended.stdout.endswith("preflight: fit\n")
    imported = {line.split("|")[2].strip() for line in ended.stderr.splitlines() if line.startswith("import time:")}
    assert "torch" in imported
    assert not imported & {"deepspeed", "timm", "nvidia.dali"}
    assert not (ranks.folder / "run").exists()


def test_two_nodes_are_fit(ranks: Ranks, drawn: Path) -> None:
    ended = ranks.run(2)
    assert ended.codes == [0, 0], ended.err
    assert ended.err == ""
    lines = ended.out.splitlines()
    assert lines[0] == "preflight: 2 ranks on 2 nodes"
    assert "torch 2." in lines[1]
    assert "settings " in lines[1]
    fingerprint = json.loads((drawn / "train" / "dataset.json").read_text())["fingerprint"][:8]
    for node, line in zip(("n0", "n1"), lines[3:5], strict=True):
        assert line.startswith(f"{node}  ")
        assert f"train {fingerprint}, val " in line
        assert line.endswith("GB/s")
    assert "all-reduce of 4 MB over 2 ranks: " in ended.out
    assert lines[-1] == "preflight: fit"


def test_shards_at_urls_are_read(ranks: Ranks, drawn: Path) -> None:
    url = {"TRAIN": f"file://{drawn / 'train'}"}
    ended = ranks.run(1, f"data.cache={ranks.folder / 'cache'}", "model.classes=11", own={0: url})
    assert ended.errors == [f"{url['TRAIN']} has 10 classes, but model.classes=11; make them agree"]
    _, _, header, row, *_ = ended.out.splitlines()
    assert "data.cache free" in header
    assert re.search(r"train \w{8}, val \w{8}  0\.\d MB ", row)  # all of it, and too little for a rate


@pytest.mark.parametrize("rank", [0, 1])
def test_data_missing_on_one_node(ranks: Ranks, rank: int) -> None:
    """As training says it, of rank 0's node too: there the others would wait for a rank that has read its settings and gone."""
    ended = ranks.run(2, "run.keep_best=top1", own={rank: {"TRAIN": "/nowhere/train", "VAL": "/nowhere/val"}})
    assert ended.codes == [3, 3]
    assert list(ended.told) == [f"n{rank}"]
    assert ended.errors[0].startswith(f"n{rank}: {ended.told[f'n{rank}']}")
    assert "data.train = /nowhere/train (" in ended.errors[0]
    assert "no such folder; make it with" in ended.errors[0]


def test_data_missing_everywhere(ranks: Ranks) -> None:
    ended = ranks.run(2, "data.train=/nowhere/train")
    assert (ended.codes, ended.told) == ([2, 2], {})
    assert len(ended.errors) == 1
    assert ended.errors[0].startswith("on every node: data.train = /nowhere/train (command line): no such folder")


def test_other_data_on_one_of_three_nodes(ranks: Ranks, drawn: Path) -> None:
    ended = ranks.run(3, own={1: {"TRAIN": str(drawn / "val")}})
    assert ended.codes == [3, 3, 3]
    assert list(ended.told) == ["n1"]
    assert ended.told["n1"].startswith("the data set of data.train is ")


@pytest.mark.parametrize("everywhere", [False, True])
def test_a_damaged_shard(ranks: Ranks, drawn: Path, everywhere: bool) -> None:
    """Only one of the nodes looks at it at first; whether it is that node's trouble the others are asked."""
    shutil.copytree(drawn, ranks.folder / "copy")
    shard = sorted((ranks.folder / "copy" / "train").glob("*.tar"))[0]
    samples = json.loads((shard.parent / "dataset.json").read_text())["shards"][0]["samples"]
    import numpy as np

    offset_of_last = int(np.load(shard.parent / "index.npy")[samples - 1]["offset"])
    with shard.open("r+b") as file:
        file.seek(offset_of_last - len(DAMAGE))
        file.write(DAMAGE)
    hurt = {"TRAIN": str(shard.parent)}
    ended = ranks.run(2, own={0: hurt, 1: hurt} if everywhere else {0: hurt})
    assert len(ended.errors) == 1
    assert f"{shard.name} has no image where the index says" in ended.errors[0]
    assert (ended.codes, list(ended.told)) == (([2, 2], []) if everywhere else ([3, 3], ["n0"]))


def test_another_commit(ranks: Ranks) -> None:
    """With three nodes two agree; of two nobody knows which is right."""
    other = ranks.folder / "other"
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@example.org", "-C", str(other)]
    other.mkdir()
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "commit", "--quiet", "--allow-empty", "-m", "x"], check=True)
    own = {1: {"GIT_DIR": str(other / ".git"), "GIT_WORK_TREE": str(other)}}
    ended = ranks.run(3, own=own)
    assert (ended.codes, list(ended.told)) == ([3, 3, 3], ["n1"])
    assert ended.told["n1"].startswith("commit is ")
    ended = ranks.run(2, own=own)
    assert (ended.codes, ended.told) == ([2, 2], {})
    assert ended.errors[0].startswith("commit differs: ")


def test_another_version(ranks: Ranks) -> None:
    info = ranks.folder / "site" / "timm-0.0.1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: timm\nVersion: 0.0.1\n")
    ended = ranks.run(3, own={2: {"PYTHONPATH": f"{info.parent}:{REPOSITORY}"}})
    assert (ended.codes, list(ended.told)) == ([3, 3, 3], ["n2"])
    assert ended.told["n2"].startswith("timm is 0.0.1, and ")


def test_other_settings(ranks: Ranks) -> None:
    ended = ranks.run(2, "run.keep=${env:KEEP}", own={0: {"KEEP": "3"}, 1: {"KEEP": "4"}})
    assert (ended.codes, ended.told) == ([2, 2], {})
    assert ended.errors == ["run.keep differs: 3 on n0; 4 on n1"]


def test_settings_that_cannot_work_are_told_at_once(ranks: Ranks) -> None:
    """By rank 0, before ranks look for each other: here the other never comes."""
    arguments = ("engine.micro_batch=5", "run.keep=0", "data.val=/nowhere/val")
    ended = ranks.run(1, *arguments, of=2)
    assert ended.codes == [2]
    for told in ("engine.micro_batch = 5 (command line): must be even", "run.keep = 0", "data.val = /nowhere/val"):
        assert told in ended.err
    assert ended.out == ""
    assert ended.seconds < 10
    silent = ranks.run(1, *arguments, own={0: {"RANK": "1"}}, of=2)
    assert (silent.codes, silent.out, silent.err) == ([2], "", "")


def test_batch_sizes_are_divided_over_the_ranks(ranks: Ranks) -> None:
    ended = ranks.run(1, own={0: {"WORLD_SIZE": "5"}})
    assert ended.codes == [2]
    assert "global_batch = 24 can't be divided over 5 ranks of engine.micro_batch = 4" in ended.err


def test_a_disk_that_is_too_small(ranks: Ranks) -> None:
    ended = ranks.run(1, "run.keep=9999999")
    assert (ended.codes, ended.told) == ([2], {})
    assert "run.dir = " in ended.errors[0]
    assert "GB are needed for 10000000 checkpoints more of 0.0462 GB each; free space there" in ended.errors[0]


def test_a_run_directory_of_other_settings(ranks: Ranks) -> None:
    run = ranks.folder / "run"
    (run / "checkpoints" / "step-000000001").mkdir(parents=True)
    (run / "config.yaml").write_text((ranks.folder / "job.yaml").read_text().replace("1e-3", "2e-3"))
    ended = ranks.run(1)
    assert ended.codes == [2]
    assert "optim.lr: 0.002 -> 0.001" in ended.err
    assert "optim.lr" not in ranks.run(1, "run.keep=9999999", "--force-config").err


def test_a_node_without_gpus(ranks: Ranks) -> None:
    ended = ranks.run(1, "engine.device=cuda", own={0: {"CUDA_VISIBLE_DEVICES": ""}})
    assert ended.codes == [2]
    assert "engine.device=cuda, and this node has no GPU (" in ended.errors[0]
    assert "--gpus-per-node" in ended.errors[0]


def test_a_rank_that_never_comes(ranks: Ranks) -> None:
    """What can be looked at without it is looked at."""
    ended = ranks.run(2, own={0: {"PATIENCE": "4"}, 1: {"TRAIN": "/nowhere/train"}}, of=3)
    assert ended.codes == [3, 3]
    assert ended.out.startswith("preflight: 2 of 3 ranks on 2 nodes\n")
    assert "rank 2 did not come within 4 s" in ended.errors
    assert list(ended.told) == ["n1"]


def test_rank_0_never_comes(ranks: Ranks) -> None:
    ended = ranks.run(1, own={0: {"RANK": "1", "PATIENCE": "1"}}, of=2)
    assert ended.codes == [3]
    assert "error on rank 1 on n0: rank 0 at 127.0.0.1:" in ended.err
    assert "has not answered for 1 s" in ended.err


@pytest.mark.parametrize(
    ("trouble", "told"),
    [
        ("Here._spaces = lambda self: time.sleep(100)", "rank 1 has not answered for 4 s while looking at its disks"),
        ("Here._spaces = lambda self: os.kill(os.getpid(), signal.SIGKILL)", "rank 1 ended while looking at its disks"),
    ],
)
def test_a_rank_that_hangs_or_dies_is_named(ranks: Ranks, trouble: str, told: str) -> None:
    ended = ranks.run(2, own={0: {"PATIENCE": "4"}, 1: {"TROUBLE": trouble}})
    assert ended.told == {"n1": told}
    assert ended.codes == [3, -signal.SIGKILL if "KILL" in trouble else 3]  # one whose work hangs ends all the same
    assert ended.seconds < 20


def test_a_rank_that_dies_in_the_network_is_told_from_those_that_wait_for_it(ranks: Ranks) -> None:
    wait = "import launch.preflight.network as network; network.TIMEOUT /= 5"
    die = "Rank = preflight.Rank; Rank.import_torch = lambda *given: None; Rank.meet = lambda *given: os.kill(os.getpid(), signal.SIGKILL)"
    ended = ranks.run(2, own={0: {"TROUBLE": wait}, 1: {"TROUBLE": die}})
    assert ended.told == {"n1": "rank 1 ended while timing the network"}
