"""What is read off a trace of a GPU, here of events made by hand in the form that torch.profiler writes;
tests/pretrain/engine/test_reductions.py
reads real traces, of a CPU."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.training.overlap import common, in_words, overlap, read, union


def event(cat: str, name: str, start: float, duration: float, **args: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "ts": start, "dur": duration, "pid": 1, "tid": 1, "args": args}


NCCL = {"Collective name": "allreduce", "In msg nelems": 1000, "Out msg nelems": 1000, "dtype": "Float", "stream": 20}
EVENTS = [
    event("user_annotation", "forward", 0, 100),
    event("user_annotation", "backward", 100, 100),
    event("user_annotation", "optimizer", 250, 50),
    event("cpu_op", "autograd::engine::evaluate_function: ConvolutionBackward0", 110, 10),
    event("cpu_op", "c10d::allreduce_", 125, 5),
    event("cpu_op", "autograd::engine::evaluate_function: torch::autograd::AccumulateGrad", 160, 10),
    event("cpu_op", "c10d::allreduce_", 180, 5),
    event("kernel", "sm90_xmma_wgrad", 120, 60, stream=7),
    event("kernel", "elementwise_kernel", 200, 20, stream=7),
    event("kernel", "ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)", 130, 40, **NCCL),
    event("kernel", "ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)", 190, 40, **NCCL),
    event("cuda_runtime", "cudaStreamSynchronize", 195, 3),
    event("cuda_runtime", "cudaLaunchKernel", 120, 3),
    event("cuda_runtime", "cudaDeviceSynchronize", 230, 3),
]


def test_a_trace_of_a_gpu(tmp_path: Path) -> None:
    path = tmp_path / "trace.json.gz"
    path.write_bytes(gzip.compress(json.dumps({"traceEvents": [*EVENTS, {"ph": "M", "name": "process_name"}]}).encode()))
    found = overlap(read(path))
    assert (found.collectives, found.bytes) == (2, 8000)
    assert found.communication == pytest.approx(0.08)
    assert found.hidden == pytest.approx(0.06)  # all of the first, half of the second
    assert found.early == [(1, 2)]
    assert found.ahead == [0.75]
    assert found.waits == {("backward", "cudaStreamSynchronize"): 1, ("between", "cudaDeviceSynchronize"): 1}
    assert in_words(found) == [
        "2 collectives, 0.0 MB, 0.1 ms, of which 75% beside computation",
        "backward pass 0: 1 of 2 reductions begin before its last node, the first with 75% of it to come",
        "the host waits for the GPU: cudaStreamSynchronize, 1 times, backward",
        "the host waits for the GPU: cudaDeviceSynchronize, 1 times, between",
    ]


def test_a_trace_of_one_rank_has_nothing_to_hide() -> None:
    found = overlap([one for one in EVENTS if one["cat"] == "kernel" and "nccl" not in one["name"]])
    assert (found.collectives, found.communication, found.early) == (0, 0, [])
    assert in_words(found) == ["0 collectives, 0.0 ms, of which 0% beside computation"]


def test_spans() -> None:
    assert union([(5, 6), (0, 2), (1, 3), (3, 4)]) == [(0, 4), (5, 6)]
    assert common([(0, 4), (5, 6)], [(3, 5.5)]) == pytest.approx(1.5)
    assert common([(0, 1)], [(2, 3)]) == 0
