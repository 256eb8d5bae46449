"""Preflight on nodes: inspections of this machine under the names of several, and real tasks on loopback."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from data.dataset.index import Index
from launch.__main__ import free_port
from launch.preflight import node as inspection
from launch.preflight.__main__ import main
from launch.preflight.node import Inspection, Node, read_settings
from launch.preflight.verdict import Verdict, judge_nodes
from pretrain.config import ConfigError
from tests.support import REPOSITORY
from tests.support.events import event_line, read_events, without_events

pytestmark = pytest.mark.slow

DAMAGE = b"\xff" * 512  # in the place of a tar header

# Nodes must differ in nothing but what a test changes.
JOB = """
name: small
global_batch: 24
epochs: 1
model: {name: van_b0, classes: 10}
data: {train: "${oc.env:TRAIN}", val: "${oc.env:VAL}", image_size: 32}
optim: {lr: 1e-3}
engine: {device: cpu, micro_batch: 4}
"""


# ---------------------------------------------------------------- inspections


@dataclass
class Machine:
    """This machine, as nodes of a job with a run directory."""

    folder: Path
    environment: Mapping[str, str]

    def inspect(self, nodes: int, *overrides: str, force_config: bool = False, **changes: Mapping[str, str]) -> Verdict:
        """Inspects nodes n0, n1, …; `changes` are variables of one node's environment."""
        self.nodes: list[Node] = []
        for number in range(nodes):
            name = f"n{number}"
            with pytest.MonkeyPatch.context() as patch:
                for variable, value in {**self.environment, **changes.get(name, {})}.items():
                    patch.setenv(variable, value)
                config, problems = read_settings(self.folder / "job.yaml", [f"run.dir={self.folder / 'run'}", *overrides], 1)
                self.nodes.append(Inspection(name, config, problems, force_config).run(number, nodes, lambda doing: None))
        return judge_nodes(self.nodes, config.engine.device, 1)


@pytest.fixture
def machine(tmp_path: Path, drawn: Path) -> Machine:
    (tmp_path / "job.yaml").write_text(JOB)
    return Machine(tmp_path, {"TRAIN": str(drawn / "train"), "VAL": str(drawn / "val"), "TMPDIR": str(tmp_path)})


def test_shards_at_urls_are_inspected(machine: Machine, drawn: Path) -> None:
    url = f"file://{drawn / 'train'}"
    verdict = machine.inspect(1, f"data.cache={machine.folder / 'cache'}", "model.classes=11", n0={"TRAIN": url})
    assert verdict.settings == [f"{url} has 10 classes, but model.classes=11; make them agree"]
    assert machine.nodes[0].read_bytes > 100_000
    assert "data.cache" in machine.nodes[0].free_bytes


def test_a_node_without_the_data_is_unfit(machine: Machine) -> None:
    verdict = machine.inspect(2, "run.keep_best=top1", n1={"TRAIN": "/nowhere/train", "VAL": "/nowhere/val"})
    assert (verdict.code, list(verdict.unfit)) == (3, ["n1"])
    assert verdict.unfit["n1"][0].startswith("data.train = ")
    assert "no such folder; make it with" in verdict.unfit["n1"][0]


def test_data_missing_on_every_node_ends_the_job(machine: Machine) -> None:
    verdict = machine.inspect(2, "data.train=/nowhere/train")
    assert (verdict.code, verdict.unfit, len(verdict.settings)) == (2, {}, 1)
    assert verdict.settings[0].startswith("on every node: data.train = /nowhere/train (command line): no such folder")


@pytest.mark.parametrize("hurt", [["n0"], ["n1", "n2"], ["n0", "n1", "n2"]])
def test_a_shard_damaged_on_some_nodes_makes_these_unfit(machine: Machine, drawn: Path, hurt: list[str]) -> None:
    """Two of three nodes check each shard."""
    copy = shutil.copytree(drawn / "train", machine.folder / "copy")
    shard = sorted(copy.glob("*.tar"))[0]
    samples = json.loads((copy / "dataset.json").read_text())["shards"][0]["samples"]
    import numpy as np

    offset_of_last = int(np.load(copy / "index.npy")[samples - 1]["offset"])
    with shard.open("r+b") as file:
        file.seek(offset_of_last - len(DAMAGE))
        file.write(DAMAGE)
    verdict = machine.inspect(3, **{name: {"TRAIN": str(copy)} for name in hurt})
    if len(hurt) == 3:
        assert (verdict.code, verdict.unfit, len(verdict.settings)) == (2, {}, 1)
        assert f"{shard.name} has no image where the index says" in verdict.settings[0]
    else:  # shard 0 is checked by n0 and n2
        assert (verdict.code, list(verdict.unfit)) == (3, [hurt[-1]])
        assert f"{shard.name} has no image where the index says" in verdict.unfit[hurt[-1]][0]


@pytest.mark.parametrize("nodes", [1, 3])
def test_each_shard_is_checked_by_two_nodes(machine: Machine, dataset: Index, nodes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[list[int]] = []
    monkeypatch.setattr("launch.preflight.node.find_damaged_shards", lambda index, shards, **options: checked.append(shards) or [])
    machine.inspect(nodes, f"data.train={dataset.folder}", "data.val=null")
    for shard in range(len(dataset.shards)):
        assert sum(shard in shards for shards in checked) == min(nodes, 2)


def test_a_node_with_another_commit_is_unfit(machine: Machine) -> None:
    other = machine.folder / "other"
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@example.org", "-C", str(other)]
    other.mkdir()
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "commit", "--quiet", "--allow-empty", "-m", "x"], check=True)
    changed = {"GIT_DIR": str(other / ".git"), "GIT_WORK_TREE": str(other)}
    verdict = machine.inspect(3, n1=changed)
    assert (verdict.code, list(verdict.unfit)) == (3, ["n1"])
    assert verdict.unfit["n1"][0].startswith("commit is ")


def test_wrong_settings_are_listed_with_problems_of_this_node(machine: Machine) -> None:
    with pytest.raises(ConfigError) as wrong:
        machine.inspect(1, "engine.micro_batch=5", "run.keep=0", "data.val=/nowhere/val")
    for text in ("engine.micro_batch = 5 (command line): must be even", "run.keep = 0", "data.val = /nowhere/val"):
        assert text in str(wrong.value)


def test_a_disk_that_is_too_small_is_reported(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspection, "TMP_BYTES", 1 << 60)
    verdict = machine.inspect(1)
    assert (verdict.code, len(verdict.settings)) == (2, 1)
    assert "TMPDIR = " in verdict.settings[0]
    assert "GB are needed for compiled kernels and temporary files; free space there" in verdict.settings[0]


def test_a_run_directory_of_other_settings_is_reported(machine: Machine) -> None:
    run = machine.folder / "run"
    (run / "checkpoints" / "step-000000001").mkdir(parents=True)
    (run / "config.yaml").write_text(JOB.replace("1e-3", "2e-3"))
    verdict = machine.inspect(1)
    assert verdict.code == 2
    assert "optim.lr: 0.002 -> 0.001" in verdict.settings[0]
    assert machine.inspect(1, force_config=True).code == 0


def test_a_node_without_gpus_is_reported(machine: Machine) -> None:
    verdict = machine.inspect(1, "engine.device=cuda", n0={"CUDA_VISIBLE_DEVICES": ""})
    assert verdict.code == 2
    assert "engine.device=cuda, but this node has no GPU (" in verdict.settings[0]
    assert "--gpus-per-node" in verdict.settings[0]


def test_this_machine_is_fit_without_slow_imports(machine: Machine) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "launch.preflight", "job.yaml", f"run.dir={machine.folder / 'run'}"]
    environment = {**os.environ, **machine.environment, "PYTHONPATH": str(REPOSITORY)}
    ended = subprocess.run(command, cwd=machine.folder, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.endswith("preflight: fit\n")
    imported = {line.split("|")[2].strip() for line in ended.stderr.splitlines() if line.startswith("import time:")}
    assert "numpy" in imported
    assert not imported & {"torch", "deepspeed", "timm", "nvidia.dali"}
    assert not (machine.folder / "run").exists()


# ---------------------------------------------------------------- tasks

# A task of a step; TROUBLE may change something first.
TASK = """
import os, signal, sys, time
import launch.preflight.step as step
step.FLUSH_S = 0
exec(os.environ.get("TROUBLE", ""))
code = step.main(sys.argv[1:])
sys.stdout.flush()
os._exit(code)
"""


@dataclass
class Ended:
    code: int  # of the reader
    out: list[str]  # lines without events
    err: str
    unfit: dict[str, str]  # from the events to the supervisor


@pytest.fixture
def run_step(machine: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """Returns a function that runs a step with one task on each of two nodes, and its reader."""

    def run(step: str, *overrides: str, troubles: Mapping[int, str] = {}, code: int = 0) -> Ended:
        job = [str(machine.folder / "job.yaml"), f"run.dir={machine.folder / 'run'}", *overrides]
        shared = {"RANKS": "2", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_NODES": "2", "MASTER_ADDR": "127.0.0.1"}
        shared |= {"MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
        tasks = []
        for rank in range(2):
            place = {"SLURM_PROCID": str(rank), "SLURM_NODEID": str(rank), "SLURMD_NODENAME": f"n{rank}"}
            environment = {**os.environ, **machine.environment, **shared, **place, "TROUBLE": troubles.get(rank, "")}
            pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            tasks.append(subprocess.Popen([sys.executable, "-c", TASK, step, *job], env=environment, **pipes))
        output = "".join(task.communicate(timeout=100)[0] for task in tasks) + event_line("step", code=code)
        for variable, value in {**machine.environment, "NODES": "n0 n1 ", "RANKS": "2"}.items():
            monkeypatch.setenv(variable, value)
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(output.encode())))
        ended = main([*job, "--step", step])
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err, out + err
        unfit = {event.values["host"]: event.values["reason"] for event in read_events(out)}
        return Ended(ended, without_events(out), err, unfit)

    return run


def test_two_nodes_are_inspected(run_step: Callable[..., Ended], drawn: Path) -> None:
    ended = run_step("nodes")
    assert (ended.code, ended.err, ended.unfit) == (0, "", {})
    assert ended.out[0] == "preflight: 2 of 2 nodes inspected, for 1 ranks on each"
    assert "torch 2." in ended.out[1]
    fingerprint = json.loads((drawn / "train" / "dataset.json").read_text())["fingerprint"][:8]
    for node, line in zip(("n0", "n1"), ended.out[3:5], strict=True):
        assert line.startswith(f"{node}  ")
        assert f"train {fingerprint}, val " in line
    assert ended.out[-1] == "preflight of the nodes: fit"


def test_two_nodes_time_the_network(run_step: Callable[..., Ended]) -> None:
    ended = run_step("network")
    assert (ended.code, ended.err, ended.unfit) == (0, "", {})
    header, *rows, all_reduce, conclusion = ended.out
    assert header.split() == ["node", "network"]
    assert [row.split()[0] for row in rows] == ["n0", "n1"]
    assert all(row.endswith("GB/s") for row in rows)
    assert all_reduce.startswith("all-reduce of 4 MB over 2 ranks: ")
    assert conclusion == "preflight of the network: fit"


TROUBLES = {
    "time.sleep(100)": "rank 1 stopped responding while checking its disks",
    "os.kill(os.getpid(), signal.SIGKILL)": "rank 1 stopped responding while checking its disks",
    "1 / 0": "rank 1 failed while checking its disks: ZeroDivisionError: division by zero (<string>, line 1)",
}


def test_a_node_that_reports_nothing_is_named(run_step: Callable[..., Ended]) -> None:
    ended = run_step("nodes", troubles={1: "os._exit(1)"})
    assert (ended.code, ended.unfit) == (3, {"n1": "1 of its 1 tasks reported nothing"})
    assert ended.out[0] == "preflight: 1 of 2 nodes inspected, for 1 ranks on each"


@pytest.mark.parametrize("trouble", TROUBLES)
def test_a_node_that_hangs_or_fails_is_named(run_step: Callable[..., Ended], trouble: str) -> None:
    began = time.monotonic()
    patience = "step.report_progress.__defaults__ = (1,); " if "sleep" in trouble else ""
    ended = run_step("nodes", troubles={1: f"{patience}step.Inspection._check_disks = lambda self: {trouble}"})
    assert time.monotonic() - began < 60
    assert (ended.code, ended.unfit) == (3, {"n1": TROUBLES[trouble]})
    assert ended.out[-1] == "preflight of the nodes: unfit: n1"


def test_a_rank_that_dies_in_the_network_is_named_and_not_those_that_wait(run_step: Callable[..., Ended]) -> None:
    trouble = "import launch.preflight.network as network; network._fastest = lambda *given: os.kill(os.getpid(), signal.SIGKILL)"
    ended = run_step("network", troubles={1: trouble})
    assert (ended.code, ended.unfit) == (3, {"n1": "rank 1 stopped responding while all-reducing over all ranks"})


def test_wrong_settings_are_reported_once(run_step: Callable[..., Ended]) -> None:
    ended = run_step("nodes", "global_batch=9")
    assert (ended.code, ended.out, ended.unfit) == (2, [], {})
    assert ended.err.startswith("error: ")
    assert "global_batch = 9 can't be divided over 2 ranks of engine.micro_batch = 4" in ended.err


def test_a_request_to_stop_sets_the_exit_code(run_step: Callable[..., Ended]) -> None:
    assert run_step("nodes", code=128 + signal.SIGUSR1, troubles={1: "os.kill(os.getpid(), signal.SIGUSR1)"}).code == 128 + signal.SIGUSR1
