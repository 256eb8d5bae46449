"""What a trace of training tells of communication: how long collectives take, how much of that lies beside computation, and what waits.

    python -m pretrain train CONFIG profile=200:205
    python -m benchmarks.training.overlap RUN/profile/steps-200-205-rank-0.json.gz

On a GPU collectives are NCCL's kernels, and computation is all other kernels; on a CPU they are gloo's threads, and the operators of the
thread that trains. A step also runs at its end what can't begin earlier (norm, weights, statistics), so not all of it can be hidden.
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
Span = tuple[float, float]  # from, to, in microseconds
ELEMENT = {"Float": 4, "Double": 8, "Half": 2, "BFloat16": 2, "Byte": 1, "Char": 1, "Int": 4, "Long": 8}  # bytes, by c10's names
WAITS = {"cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize"}  # hold the host until the device has got there
PARTS = ("data", "forward", "backward", "optimizer")
NODE = "autograd::engine::evaluate_function: "  # what autograd calls a node of the backward pass by


@dataclass(frozen=True)
class Overlap:
    """Times in ms, of all that is traced.

    Attributes:
        collectives: how many there are.
        bytes: of their tensors; 0 where a trace doesn't have it, as gloo's don't.
        communication, hidden: time in which any collective runs, and in which computation does, too.
        early: of each backward pass that reduces anything: reductions issued before its last node, and all.
        ahead: of each such pass: the share of it that was still to come at its first reduction.
        waits: (part of a step or "between", call of CUDA's): how often the host waited for the device.
    """

    collectives: int
    bytes: int
    communication: float
    hidden: float
    early: list[tuple[int, int]]
    ahead: list[float]
    waits: dict[tuple[str, str], int]


def read(path: Path) -> list[Event]:
    """The events of a trace of torch.profiler's, those that last."""
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        return [event for event in json.load(file)["traceEvents"] if event.get("ph") == "X"]


def overlap(events: Sequence[Event]) -> Overlap:
    parts = [event for event in events if event.get("cat") == "user_annotation" and event["name"] in PARTS]
    kernels = [event for event in events if event.get("cat") == "kernel"]
    issued = [event for event in events if event["name"].startswith("c10d::")]
    if kernels:
        collectives = [event for event in kernels if "nccl" in event["name"].lower()]
        computing = [event for event in kernels if "nccl" not in event["name"].lower()]
    else:
        trains = {event["tid"] for event in parts}
        collectives = [event for event in events if event["name"].startswith("gloo:")]
        computing = [event for event in events if event["name"].startswith("aten::") and event["tid"] in trains]
    talking, busy = union(map(span, collectives)), union(map(span, computing))
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
        communication=length(talking) / 1e3,
        hidden=common(talking, busy) / 1e3,
        early=early,
        ahead=ahead,
        waits=dict(waits),
    )


def in_words(found: Overlap) -> list[str]:
    size = f", {found.bytes / 1e6:.1f} MB" if found.bytes else ""
    share = found.hidden / found.communication if found.communication else 0.0
    lines = [f"{found.collectives} collectives{size}, {found.communication:.1f} ms, of which {share:.0%} beside computation"]
    for number, ((early, reductions), ahead) in enumerate(zip(found.early, found.ahead, strict=True)):
        begin = f"{early} of {reductions} reductions begin before its last node, the first with {ahead:.0%} of it to come"
        lines.append(f"backward pass {number}: {begin}")
    return lines + [f"the host waits for the GPU: {call}, {count} times, {part}" for (part, call), count in sorted(found.waits.items())]


def span(event: Event) -> Span:
    return event["ts"], event["ts"] + event["dur"]


def union(spans: Iterable[Span]) -> list[Span]:
    """The same time in spans that do not touch, in their order."""
    merged: list[Span] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged


def common(some: Sequence[Span], others: Sequence[Span]) -> float:
    """Time that lies in both of two unions."""
    return length(some) + length(others) - length(union([*some, *others]))


def length(spans: Sequence[Span]) -> float:
    return sum(end - start for start, end in spans)


def _part(time: float, parts: Sequence[Event]) -> str:
    return next((part["name"] for part in parts if part["ts"] <= time < part["ts"] + part["dur"]), "between")


def _bytes(args: dict[str, Any]) -> int:
    """Of a kernel of NCCL's, by what the profiler says of its collective: the larger of what goes in and comes out."""
    elements = max(args.get("In msg nelems", 0), args.get("Out msg nelems", 0))
    return elements * ELEMENT[args["dtype"]] if elements else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    print("\n".join(in_words(overlap(read(parser.parse_args().trace)))))


if __name__ == "__main__":
    main()
