"""What preflight concludes from what nodes have found, and what it takes to find it: judgements over plain data."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pynvml
import pytest

from launch.preflight.__main__ import counts, find_position, show
from launch.preflight.gpus import Gpu, broken, hot, read_gpus
from launch.preflight.network import rounds
from launch.preflight.nodes import BACKBONES, Node, Problem, checkpoint_bytes
from launch.preflight.roll_call import Silent, offset
from launch.preflight.verdict import SKEW, Verdict, judge, judge_absent, judge_silent, pair_rate, read_rate, spans, table
from pretrain.config import load
from pretrain.run.attempts import heard


def fit(name: str, **changes: Any) -> Node:
    node = Node(name, [0], versions={"torch": "2.13.0", "commit": "c"}, settings={"seed": 0}, fingerprints={"data.train": "f"})
    return replace(node, **changes)


def test_problems_of_some_nodes_are_theirs_and_those_of_all_are_the_jobs() -> None:
    problem = Problem("data.train", "gone")
    verdict = judge([fit("a", problems=[problem]), fit("b"), fit("c")], "cpu")
    assert (verdict.code, verdict.unfit, verdict.settings) == (3, {"a": ["gone"]}, [])
    verdict = judge([fit("a", problems=[problem]), fit("b", problems=[problem, Problem("disk", "full")])], "cpu")
    assert (verdict.code, verdict.settings) == (2, ["on every node: gone"])
    assert verdict.unfit == {"b": ["full"]}
    own = Problem("GPU", "broken", own=True)
    assert judge([fit("a", problems=[own]), fit("b", problems=[own])], "cpu").unfit == {"a": ["broken"], "b": ["broken"]}
    assert judge([fit("a", problems=[problem])], "cpu").settings == ["gone"]
    assert judge([fit("a"), fit("b")], "cpu").code == 0


def test_a_commit_that_a_node_cannot_tell_is_no_difference() -> None:
    unknown = fit("b", versions={"torch": "2.13.0", "commit": "unknown"})
    assert judge([fit("a"), unknown], "cpu").code == 0
    assert judge([fit("a"), fit("b", versions={"torch": "2.13.0", "commit": "c-dirty"})], "cpu").code == 2


GOOD = Gpu(0, "H", memory=80 << 30, used=1 << 29, uncorrected=0)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"uncorrected": 3}, "3 uncorrected ECC errors"),
        ({"repair_pending": True}, "wait for a reset"),
        ({"repair_failed": True}, "could not be remapped"),
        ({"clocks": pynvml.nvmlClocksEventReasonHwThermalSlowdown | 1}, "held down by hardware thermal slowdown"),
        ({"clocks": pynvml.nvmlClocksEventReasonHwPowerBrakeSlowdown}, "power brake"),
        ({"used": 9 << 30}, "9.7 of 85.9 GB are in use by others"),
    ],
)
def test_broken_gpus(changes: dict[str, Any], told: str) -> None:
    bad = replace(GOOD, **changes)
    assert told in broken(bad)[0]
    assert judge([fit("a", gpus=[bad]), fit("b", gpus=[GOOD])], "auto").unfit == {"a": broken(bad)}
    assert judge([fit("a", gpus=[bad])], "cpu").code == 0  # of a job that wants none nobody asks


def test_gpus_that_are_well() -> None:
    idle = replace(GOOD, clocks=pynvml.nvmlClocksEventReasonGpuIdle | pynvml.nvmlClocksEventReasonSwPowerCap, uncorrected=None)
    assert broken(idle) == []
    assert not hot(idle)
    warm = replace(GOOD, clocks=pynvml.nvmlClocksEventReasonSwThermalSlowdown)
    verdict = judge([fit("a", gpus=[warm])], "cuda")
    assert (verdict.code, verdict.warnings) == (0, ["a: GPU 0 is hot, and its clocks are held down"])


def test_too_few_gpus() -> None:
    lacking = fit("a", no_gpus="NVML: Driver Not Loaded")
    both = [lacking, fit("b", gpus=[GOOD])]
    for device in ("auto", "cuda"):
        assert "this node has no GPU (NVML: Driver Not Loaded)" in judge(both, device).unfit["a"][0]
    assert judge([lacking], "cuda").code == 2
    assert judge([lacking], "auto").code == 0
    assert "1 GPUs for 2 ranks" in judge([fit("a", gpus=[GOOD], ranks=[0, 1])], "cuda").settings[0]
    shown = table([fit("a", gpus=[GOOD, replace(GOOD, number=1, repair_failed=True)])], "cuda")
    assert "2 x H 86 GB, 0.5 GB used at most, 1 broken" in shown


def test_reading_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order and with the choice of CUDA_VISIBLE_DEVICES, from a card that counts no errors."""

    def unsupported(*given: object) -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    memory = pynvml.c_nvmlMemory_t(total=80, used=2)
    answers = {
        "nvmlInit": lambda: None, "nvmlShutdown": lambda: None, "nvmlDeviceGetCount": lambda: 3,
        "nvmlSystemGetDriverVersion": lambda: "600.1", "nvmlDeviceGetHandleByIndex": lambda index: f"card {index}",
        "nvmlDeviceGetHandleByUUID": lambda name: f"card {name}",
        "nvmlDeviceGetName": lambda handle: handle, "nvmlDeviceGetMemoryInfo": lambda handle: memory,
        "nvmlDeviceGetRemappedRows": lambda handle: (1, 2, 1, 0), "nvmlDeviceGetRetiredPagesPendingStatus": unsupported,
        "nvmlDeviceGetTotalEccErrors": unsupported, "nvmlDeviceGetCurrentClocksEventReasons": lambda handle: 8,
    }  # fmt: skip
    for name, answer in answers.items():
        monkeypatch.setattr(pynvml, name, answer)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [gpu.name for gpu in read_gpus()[1]] == ["card 0", "card 1", "card 2"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-ab")
    driver, gpus = read_gpus()
    assert (driver, [gpu.name for gpu in gpus]) == ("600.1", ["card 2", "card GPU-ab"])
    assert gpus[0] == Gpu(0, "card 2", memory=80, used=2, uncorrected=None, repair_pending=True, repair_failed=False, clocks=8)


def test_clocks() -> None:
    assert offset([(10.0, 15.0, 10.5), (20.0, 23.1, 20.2), (30.0, 99.0, 40.0)]) == pytest.approx(3.0)
    verdict = judge([fit("a"), fit("b", clock=-SKEW - 0.5), fit("c", clock=SKEW - 0.1)], "cpu")
    assert verdict.code == 0
    assert [warning.partition(":")[0] for warning in verdict.warnings] == ["b"]
    assert "-1.5 s off a's" in verdict.warnings[0]


def test_slow_nodes() -> None:
    def node(name: str, read: float, pair: float) -> Node:
        return fit(name, read_bytes=64 << 20, read_seconds=read, pair_bytes=1 << 20, pair_seconds=pair)

    quick = [node(name, 1.0, 0.1) for name in "abc"]
    assert judge(quick, "cpu").warnings == []
    warnings = judge([*quick, node("d", 3.0, 0.1), node("e", 1.0, 0.3)], "cpu").warnings
    assert [warning.split(" at ")[0] for warning in warnings] == ["d: reads data.train", "e: exchanges with its neighbours"]
    assert judge([*quick, fit("d", read_bytes=1 << 20, read_seconds=9.0)], "cpu").warnings == []  # of a megabyte nobody can tell
    two = judge([node("a", 1.0, 0.1), node("b", 2.5, 0.9)], "cpu").warnings
    assert [warning.split(" at ")[0] for warning in two] == ["b: reads data.train"]
    assert (read_rate(quick[0]), pair_rate(fit("a"))) == (64 << 20, None)


@pytest.mark.parametrize("nodes", range(1, 10))
def test_pairs_tell_one_slow_node_from_its_neighbours(nodes: int) -> None:
    found = rounds(nodes)
    for pairs in found:
        busy = [node for pair in pairs for node in pair]
        assert len(busy) == len(set(busy))
    for slow in range(nodes if nodes > 2 else 0):
        best = [min(9 if slow in pair else 1 for pairs in found for pair in pairs if node in pair) for node in range(nodes)]
        assert [node for node in range(nodes) if best[node] == 9] == [slow]


def test_silent_ranks() -> None:
    nodes = [fit("a", ranks=[0, 1]), fit("b", ranks=[2, 3])]
    failed, hung, ended = (Silent(kind, kind) for kind in ("failed", "hung", "ended"))  # type: ignore[arg-type]
    assert judge_silent({}, nodes).code == 0
    assert judge_silent({0: failed, 1: failed, 2: failed, 3: hung}, nodes).unfit == {"b": ["rank 3 hung"]}
    assert judge_silent({0: hung, 1: failed, 2: ended}, nodes).unfit == {"b": ["rank 2 ended"]}
    assert judge_silent({0: hung, 3: hung}, nodes).nameless == ["on every node: rank 0 hung"]
    assert judge_silent({0: failed}, nodes[:1]).code == 3
    assert judge_silent({0: hung}, nodes[:1]).code == 3


def test_ranks_that_do_not_come_are_missed_where_slurm_put_them() -> None:
    verdict = judge_absent([2, 3], {"a": 2}, {"a": 2, "b": 2}, 20)
    assert verdict.unfit == {"b": ["2 of its 2 ranks did not come within 20 s (of all, ranks 2-3)"]}
    assert judge_absent([], {"a": 2}, {"a": 2}, 20).code == 0
    assert judge_absent([1], {"a": 1}, {}, 20).nameless == ["rank 1 did not come within 20 s"]


def test_texts() -> None:
    assert counts("8(x2),4,1(x3)") == [8, 8, 4, 1, 1, 1]
    assert spans([9, 0, 1, 2, 4]) == "0-2, 4, 9"


def test_the_batch_script_is_told_in_short(capsys: pytest.CaptureFixture[str]) -> None:
    """Slurm passes on lines of over 1,000 bytes in pieces; JSON takes six for a letter that is not ASCII."""
    reason = "é" * 1000
    show(Verdict(unfit={"node" * 15: [reason, "more"]}), "")
    out, err = capsys.readouterr()
    told = [line for line in out.splitlines() if heard(line)]
    assert len(told) == 1
    assert len(told[0].encode()) < 1000
    assert f"{reason}\n" in err
    assert out.splitlines()[-1] == f"preflight: unfit: {'node' * 15}"


def test_where_a_rank_is() -> None:
    task = {"SLURM_PROCID": "9", "SLURM_NTASKS": "16", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0", "SLURMD_NODENAME": "n1"}
    position = find_position(task | {"MASTER_ADDR": "n0", "MASTER_PORT": "12345"})
    assert (position.rank, position.ranks, position.local_rank, position.node, position.address, position.port) == (
        9,
        16,
        1,
        "n1",
        "n0",
        12345,
    )
    assert (find_position({}).rank, find_position({}).ranks) == (0, 1)


@pytest.mark.slow
def test_checkpoints_are_as_large_as_the_models(tmp_path: Path) -> None:
    import timm
    import torch

    import pretrain.model.van

    assert set(BACKBONES) == set(pretrain.model.van.VARIANTS)
    for name in BACKBONES:
        with torch.device("meta"):
            model = timm.create_model(name, num_classes=7)
        (tmp_path / "job.yaml").write_text(f"name: x\nglobal_batch: 2\nepochs: 1\nmodel: {{name: {name}, classes: 7}}\noptim: {{lr: 1}}\n")
        config = load(tmp_path / "job.yaml", ["data.train=x", "engine.ema_decay=0.9"], unchecked=["data.train"])
        assert checkpoint_bytes(config) == 4 * 4 * sum(p.numel() for p in model.parameters())
