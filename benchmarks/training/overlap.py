"""Reads a profiler trace of a job: how much communication is hidden by computation, and where the host waits for the GPU.

    python -m pretrain train CONFIG profile=200:205
    python -m benchmarks.training.overlap RUN/profile/steps-200-205-rank-0.json.gz

On a GPU, collectives are NCCL's kernels and computation is all other kernels. On a CPU, collectives run on gloo's threads and computation
is the operators of the training thread. The end of a step (norm, weights, statistics) can't begin earlier, so not all of it can be hidden.
"""

import argparse
import gzip
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Event = dict[str, Any]
Span = tuple[float, float]  # start and end in microseconds
ELEMENT = {"Float": 4, "Double": 8, "Half": 2, "BFloat16": 2, "Byte": 1, "Char": 1, "Int": 4, "Long": 8}  # bytes, by c10's names
WAITS = {"cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize"}  # block the host
PARTS = ("data", "forward", "backward", "optimizer")
NODE = "autograd::engine::evaluate_function: "  # prefix of the nodes of the backward pass


@dataclass(frozen=True)
class Overlap:
    """What a trace shows; times in ms.

    Attributes:
        collectives: number of collectives.
        bytes: size of their tensors; 0 where the trace lacks it, as for gloo.
        communication: time in which any collective runs.
        hidden: part of the communication time in which computation runs too.
        early: for each backward pass with reductions: how many were issued before its last node, and how many in all.
        ahead: for each such pass: the share of the pass that remained at its first reduction.
        waits: number of waits of the host, by part of the step (or "between") and CUDA call.
    """

    collectives: int
    bytes: int
    communication: float
    hidden: float
    early: list[tuple[int, int]]
    ahead: list[float]
    waits: dict[tuple[str, str], int]


def read(path: Path) -> list[Event]:
    """Returns the events with a duration of a trace of torch.profiler."""
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        return [event for event in json.load(file)["traceEvents"] if event.get("ph") == "X"]


def measure_overlap(events: Sequence[Event]) -> Overlap:
    """Measures the overlap of all steps in the trace."""
    parts = [event for event in events if event.get("cat") == "user_annotation" and event["name"] in PARTS]
    kernels = [event for event in events if event.get("cat") == "kernel"]
    issued = [event for event in events if event["name"].startswith("c10d::")]
    if kernels:
        collectives = [event for event in kernels if "nccl" in event["name"].lower()]
        computing = [event for event in kernels if "nccl" not in event["name"].lower()]
    else:
        training_threads = {event["tid"] for event in parts}
        collectives = [event for event in events if event["name"].startswith("gloo:")]
        computing = [event for event in events if event["name"].startswith("aten::") and event["tid"] in training_threads]
    communicating, busy = union(map(span, collectives)), union(map(span, computing))
    early, ahead = [], []
    for start, end in (span(part) for part in parts if part["name"] == "backward"):
        nodes = [event["ts"] for event in events if event["name"].startswith(NODE) and start <= event["ts"] < end]
        reductions = sorted(event["ts"] for event in issued if start <= event["ts"] < end)
        if nodes and reductions:
            early.append((sum(begun < max(nodes) for begun in reductions), len(reductions)))
            ahead.append((end - reductions[0]) / (end - start))
    waits = Counter((_part(event["ts"], parts), event["name"]) for event in events if event["name"] in WAITS)
    return Overlap(
        collectives=len(collectives),
        bytes=sum(_bytes(event.get("args", {})) for event in collectives),
        communication=length(communicating) / 1e3,
        hidden=common(communicating, busy) / 1e3,
        early=early,
        ahead=ahead,
        waits=dict(waits),
    )


def describe(overlap: Overlap) -> list[str]:
    """Returns the lines to print."""
    size = f", {overlap.bytes / 1e6:.1f} MB" if overlap.bytes else ""
    share = overlap.hidden / overlap.communication if overlap.communication else 0.0
    lines = [f"{overlap.collectives} collectives{size}, {overlap.communication:.1f} ms, {share:.0%} of it hidden by computation"]
    for number, ((early, reductions), ahead) in enumerate(zip(overlap.early, overlap.ahead, strict=True)):
        begin = f"{early} of {reductions} reductions issued before its last node, the first with {ahead:.0%} of it remaining"
        lines.append(f"backward pass {number}: {begin}")
    return lines + [f"host waits for the GPU: {call}, {count} times, {part}" for (part, call), count in sorted(overlap.waits.items())]


def span(event: Event) -> Span:
    return event["ts"], event["ts"] + event["dur"]


def union(spans: Iterable[Span]) -> list[Span]:
    """Merges spans that overlap or touch; returns them in order."""
    merged: list[Span] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged


def common(spans: Sequence[Span], others: Sequence[Span]) -> float:
    """Returns the time that lies in both of two unions."""
    return length(spans) + length(others) - length(union([*spans, *others]))


def length(spans: Sequence[Span]) -> float:
    return sum(end - start for start, end in spans)


def _part(time: float, parts: Sequence[Event]) -> str:
    return next((part["name"] for part in parts if part["ts"] <= time < part["ts"] + part["dur"]), "between")


def _bytes(args: dict[str, Any]) -> int:
    """Returns the size of the larger tensor of an NCCL kernel, its input or its output."""
    elements = max(args.get("In msg nelems", 0), args.get("Out msg nelems", 0))
    return elements * ELEMENT[args["dtype"]] if elements else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    print("\n".join(describe(measure_overlap(read(parser.parse_args().trace)))))


if __name__ == "__main__":
    main()
