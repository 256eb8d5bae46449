"""Verdicts of preflight over plain data, and the reading of GPUs."""

from dataclasses import replace
from typing import Any

import pynvml
import pytest

from launch.preflight.gpus import Gpu, list_faults, read_gpus
from launch.preflight.network import ring_rounds
from launch.preflight.node import Node, Problem
from launch.preflight.verdict import (
    Task,
    Verdict,
    exchange_rates,
    judge_network,
    judge_nodes,
    judge_tasks,
    node_table,
    read_rate,
)


def fit(name: str, **changes: Any) -> Node:
    node = Node(name, versions={"torch": "2.13.0", "commit": "c"}, settings={"seed": "0"}, fingerprints={"data.train": "f"})
    return replace(node, **changes)


def judge(*nodes: Node, device: str = "cpu", tasks: int = 1) -> Verdict:
    return judge_nodes(nodes, device, tasks)


# ---------------------------------------------------------------- nodes


def test_problems_of_some_nodes_make_them_unfit_and_those_of_all_end_the_job() -> None:
    problem = Problem("data.train", "gone")
    verdict = judge(fit("a", problems=[problem]), fit("b"), fit("c"))
    assert (verdict.code, verdict.unfit, verdict.settings) == (3, {"a": ["gone"]}, [])
    verdict = judge(fit("a", problems=[problem]), fit("b", problems=[problem, Problem("disk", "full")]))
    assert (verdict.code, verdict.settings) == (2, ["on every node: gone"])
    assert verdict.unfit == {"b": ["full"]}
    defect = Problem("GPU", "broken", is_defect=True)
    assert judge(fit("a", problems=[defect]), fit("b", problems=[defect])).unfit == {"a": ["broken"], "b": ["broken"]}
    assert judge(fit("a", problems=[problem])).settings == ["gone"]
    assert judge(fit("a"), fit("b")).code == 0


def test_a_problem_that_two_nodes_check_for_ends_the_job_if_both_have_it() -> None:
    problem = Problem("shard 7", "damaged", checkers=2)
    assert judge(fit("a", problems=[problem]), fit("b"), fit("c")).unfit == {"a": ["damaged"]}
    assert judge(fit("a", problems=[problem]), fit("b", problems=[problem]), fit("c")).settings == ["on every node: damaged"]


def test_a_node_unlike_most_is_unfit_and_without_a_majority_the_job_ends() -> None:
    for changes in ({"versions": {"torch": "2.12.0"}}, {"settings": {"seed": "1"}}, {"fingerprints": {"data.train": "g"}}):
        verdict = judge(fit("a"), fit("b", **changes), fit("c"))
        assert (verdict.code, list(verdict.unfit)) == (3, ["b"])
        verdict = judge(fit("a"), fit("b", **changes))
        assert (verdict.code, len(verdict.settings)) == (2, 1)
    assert judge(fit("a"), fit("b", versions={"torch": "2.13.0", "commit": "unknown"})).code == 0  # git may be missing on a node


def test_a_node_with_a_slow_disk_gets_a_warning() -> None:
    def node(name: str, seconds: float) -> Node:
        return fit(name, read_bytes=64 << 20, read_seconds=seconds)

    fast = [node(name, 1.0) for name in "abc"]
    assert judge(*fast).warnings == []
    (warning,) = judge(*fast, node("d", 3.0)).warnings
    assert warning.startswith("d: reads data.train at 22.4 MB/s, the others at 67.1 MB/s")
    assert judge(*fast, fit("d", read_bytes=1 << 20, read_seconds=9.0)).warnings == []  # too little for a rate
    assert (read_rate(fast[0]), read_rate(fit("a"))) == (64 << 20, None)


# ---------------------------------------------------------------- GPUs


SOUND = Gpu(0, "H", memory=80 << 30, used=1 << 29, uncorrected=0)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"uncorrected": 3}, "3 uncorrected ECC errors"),
        ({"repair_pending": True}, "repair is pending"),
        ({"repair_failed": True}, "could not be remapped"),
        ({"clocks": pynvml.nvmlClocksEventReasonHwThermalSlowdown | 1}, "held down by hardware thermal slowdown"),
        ({"clocks": pynvml.nvmlClocksEventReasonHwPowerBrakeSlowdown}, "power brake"),
        ({"used": 9 << 30}, "9.7 of 85.9 GB are in use by other processes"),
    ],
)
def test_a_faulty_gpu_makes_its_node_unfit(changes: dict[str, Any], fault: str) -> None:
    faulty = replace(SOUND, **changes)
    assert fault in list_faults(faulty)[0]
    assert judge(fit("a", gpus=[faulty]), fit("b", gpus=[SOUND]), device="auto").unfit == {"a": list_faults(faulty)}
    assert judge(fit("a", gpus=[faulty])).code == 0  # a job on CPUs


def test_an_idle_gpu_is_fit() -> None:
    idle = replace(SOUND, clocks=pynvml.nvmlClocksEventReasonGpuIdle | pynvml.nvmlClocksEventReasonSwPowerCap, uncorrected=None)
    assert list_faults(idle) == []


def test_too_few_gpus_are_reported() -> None:
    lacking = fit("a", no_gpus="NVML: Driver Not Loaded")
    for device in ("auto", "cuda"):
        assert "this node has no GPU (NVML: Driver Not Loaded)" in judge(lacking, fit("b", gpus=[SOUND]), device=device).unfit["a"][0]
    assert judge(lacking, device="cuda").code == 2
    assert judge(lacking, device="auto").code == 0
    assert "1 GPUs for 2 ranks" in judge(fit("a", gpus=[SOUND]), device="cuda", tasks=2).settings[0]
    assert "2 x H 86 GB" in node_table([fit("a", gpus=[SOUND, replace(SOUND, number=1)])], "cuda")


def test_gpus_are_read_in_the_order_of_cuda_visible_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """This card does not count errors."""

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


# ---------------------------------------------------------------- tasks and network


def task(rank: int, host: str, **changes: Any) -> Task:
    return Task(rank, host, **{"steps": 3, "result": {}, **changes})


def test_all_tasks_without_a_result_are_named() -> None:
    tasks = [task(0, "a"), task(1, "b", result=None, doing="reading"), task(2, "c", result=None, error="KeyError: 3")]
    verdict = judge_tasks(tasks, ["a", "b", "c", "d"], 1, collective=False)
    assert verdict.unfit == {
        "b": ["rank 1 stopped responding while reading"],
        "c": ["rank 2 failed while starting: KeyError: 3"],
        "d": ["1 of its 1 tasks reported nothing"],
    }
    assert judge_tasks(tasks[:1], ["a"], 1, collective=False).code == 0


def test_the_cause_is_named_and_not_the_tasks_that_wait() -> None:
    failed, silent, early = {"result": None, "error": "timeout"}, {"result": None, "steps": 3}, {"result": None, "steps": 2}

    def unfit(*changes: dict[str, Any], present: int = 4) -> dict[str, list[str]]:
        tasks = [task(rank, "ab"[rank // 2], **values) for rank, values in enumerate(changes)]
        return judge_tasks(tasks[:present], ["a", "b"], 2, collective=True).unfit

    assert unfit({}, {}, {}, {}) == {}
    assert list(unfit(failed, failed, failed, silent)) == ["b"]
    assert list(unfit(silent, silent, early, silent)) == ["b"]
    assert list(unfit(failed, failed, failed, {}, present=3)) == ["b"]
    assert unfit({}, failed, {}, {}) == {"a": ["rank 1 failed while starting: timeout"]}


def test_a_failure_of_every_node_names_none() -> None:
    tasks = [task(rank, name, result=None, error="timeout") for rank, name in enumerate("ab")]
    verdict = judge_tasks(tasks, ["a", "b"], 1, collective=True)
    assert (verdict.code, verdict.unfit, verdict.unattributed) == (3, {}, ["on every node: rank 0 failed while starting: timeout"])
    assert judge_tasks(tasks[:1], ["a"], 1, collective=True).unfit  # a single node is


def test_a_node_with_a_slow_network_gets_a_warning() -> None:
    """The better of a node's two exchanges counts, and of each exchange the slower side's time."""
    seconds = {(0, 1): 1.0, (1, 2): 4.0, (2, 0): 4.0}  # a and b are fast, c is slow

    def result(rank: int) -> dict[str, Any]:
        exchanges = [(sum(pair) - rank, time) for pair, time in seconds.items() if rank in pair]
        return {"bytes": 8, "exchange_s": exchanges}

    tasks = [task(rank, name, result=result(rank)) for rank, name in enumerate("abc")]
    rates = exchange_rates(tasks)
    assert rates == {"a": 8.0, "b": 8.0, "c": 2.0}
    (warning,) = judge_network(rates).warnings
    assert warning.startswith("c: exchanges data with its neighbors at ")
    assert judge_network({"a": 8.0, "b": 2.0}).warnings == []  # of two nodes, each has the other's rate
    assert exchange_rates([task(0, "a", result={"exchange_s": []})]) == {}


@pytest.mark.parametrize("nodes", range(1, 10))
def test_only_a_slow_node_has_two_slow_exchanges(nodes: int) -> None:
    rounds = ring_rounds(nodes)
    for pairs in rounds:
        busy = [node for pair in pairs for node in pair]
        assert len(busy) == len(set(busy))
    for slow in range(nodes if nodes > 2 else 0):
        best = [min(9 if slow in pair else 1 for pairs in rounds for pair in pairs if node in pair) for node in range(nodes)]
        assert [node for node in range(nodes) if best[node] == 9] == [slow]
