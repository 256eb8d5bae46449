"""The reader of traces, on handmade events of a GPU in torch.profiler's form; tests/pretrain/engine/test_reductions.py reads CPU traces."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.training.overlap import common, describe, measure_overlap, read, union


def make_event(cat: str, name: str, start: float, duration: float, **args: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "ts": start, "dur": duration, "pid": 1, "tid": 1, "args": args}


NCCL = {"Collective name": "allreduce", "In msg nelems": 1000, "Out msg nelems": 1000, "dtype": "Float", "stream": 20}
EVENTS = [
    make_event("user_annotation", "forward", 0, 100),
    make_event("user_annotation", "backward", 100, 100),
    make_event("user_annotation", "optimizer", 250, 50),
    make_event("cpu_op", "autograd::engine::evaluate_function: ConvolutionBackward0", 110, 10),
    make_event("cpu_op", "c10d::allreduce_", 125, 5),
    make_event("cpu_op", "autograd::engine::evaluate_function: torch::autograd::AccumulateGrad", 160, 10),
    make_event("cpu_op", "c10d::allreduce_", 180, 5),
    make_event("kernel", "sm90_xmma_wgrad", 120, 60, stream=7),
    make_event("kernel", "elementwise_kernel", 200, 20, stream=7),
    make_event("kernel", "ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)", 130, 40, **NCCL),
    make_event("kernel", "ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)", 190, 40, **NCCL),
    make_event("cuda_runtime", "cudaStreamSynchronize", 195, 3),
    make_event("cuda_runtime", "cudaLaunchKernel", 120, 3),
    make_event("cuda_runtime", "cudaDeviceSynchronize", 230, 3),
]


def test_gpu_trace(tmp_path: Path) -> None:
    path = tmp_path / "trace.json.gz"
    path.write_bytes(gzip.compress(json.dumps({"traceEvents": [*EVENTS, {"ph": "M", "name": "process_name"}]}).encode()))
    overlap = measure_overlap(read(path))
    assert (overlap.collectives, overlap.bytes) == (2, 8000)
    assert overlap.communication == pytest.approx(0.08)
    assert overlap.hidden == pytest.approx(0.06)  # all of the first, half of the second
    assert overlap.early == [(1, 2)]
    assert overlap.ahead == [0.75]
    assert overlap.waits == {("backward", "cudaStreamSynchronize"): 1, ("between", "cudaDeviceSynchronize"): 1}
    assert describe(overlap) == [
        "2 collectives, 0.0 MB, 0.1 ms, 75% of it hidden by computation",
        "backward pass 0: 1 of 2 reductions issued before its last node, the first with 75% of it remaining",
        "host waits for the GPU: cudaStreamSynchronize, 1 times, backward",
        "host waits for the GPU: cudaDeviceSynchronize, 1 times, between",
    ]


def test_trace_of_one_rank_has_no_communication() -> None:
    overlap = measure_overlap([event for event in EVENTS if event["cat"] == "kernel" and "nccl" not in event["name"]])
    assert (overlap.collectives, overlap.communication, overlap.early) == (0, 0, [])
    assert describe(overlap) == ["0 collectives, 0.0 ms, 0% of it hidden by computation"]


def test_spans() -> None:
    assert union([(5, 6), (0, 2), (1, 3), (3, 4)]) == [(0, 4), (5, 6)]
    assert common([(0, 4), (5, 6)], [(3, 5.5)]) == pytest.approx(1.5)
    assert common([(0, 1)], [(2, 3)]) == 0
