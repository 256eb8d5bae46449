"""What a training step asks of the host, without a GPU: kernels launched, waits, memory, and how long the host takes.

    python -m benchmarks.training.host

Whole steps of VAN-B3 at 224 px run on a GPU that computes nothing (benchmarks/training/idle_gpu), in turns: our model as
`benchmarks.training` has it,
and what a job runs (`engine_step`), in each ZeRO stage. PyTorch, DeepSpeed and Triton do all that they do with a real one, on which no
step can be shorter. Times are of this machine's CPU; launches, kernels and waits hold for any. Results go to
benchmarks/results/host.json.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.training import idle_gpu
from data.common.results import record_result

RESULT = Path(__file__).parents[1] / "results" / "host.json"
MODEL, IMAGE_SIZE = "van_b3", 224
# What a job's settings have beside the defaults: `model` and `engine`. ZeRO-3 comes last: with it DeepSpeed puts another linear layer in
# the place of torch's, for the whole process.
ENGINES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    **{f"engine, ZeRO-{stage}": ({}, {"zero_stage": stage}) for stage in range(3)},
    "engine, kernels": ({"kernels": "triton"}, {}),
    "engine, graphs": ({"graphs": True}, {}),
    "engine, kernels, graphs": ({"kernels": "triton", "graphs": True}, {}),
    "engine, ZeRO-3": ({}, {"zero_stage": 3}),
}


def steps(micro_batch: int) -> dict[str, Callable[[], Callable[[], object]]]:
    """What makes a training step of each kind, on one batch over and over."""
    import torch

    from benchmarks.training.ways import Job, Way, engine_config, engine_step, new_model, ways

    idle_gpu.trust()
    job = Job(MODEL, IMAGE_SIZE, torch.device("cuda", 0), batch=micro_batch)
    images = torch.zeros(micro_batch, 3, IMAGE_SIZE, IMAGE_SIZE, device=job.device).to(memory_format=torch.channels_last)
    labels = torch.zeros(micro_batch, dtype=torch.int64, device=job.device)

    def by_way(way: Way) -> Callable[[], object]:
        return partial(way.build(job), images, labels)

    def by_engine(model: dict[str, Any], engine: dict[str, Any]) -> Callable[[], object]:
        return partial(engine_step(engine_config(job, model, engine), new_model(job)), images, labels[:, None], None)

    found = {way.name: partial(by_way, way) for way in ways(job.device, None) if way.name in ("own", "own_kernels")}
    return found | {name: partial(by_engine, *given) for name, given in ENGINES.items()}


def measure(args: argparse.Namespace) -> None:
    import torch

    gpu, all_steps, peaks = idle_gpu.IdleGpu(), {}, {}
    gpu.rest()
    for name, make in steps(args.micro_batch).items():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step = all_steps[name] = make()
        step()
        peaks[name] = torch.cuda.max_memory_allocated() - before
        for _ in range(3):  # ZeRO-3 learns what to gather when
            step()
    times: dict[str, list[float]] = {name: [] for name in all_steps}
    for _ in range(args.rounds):
        for name, step in all_steps.items():
            began = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - began)
    rows = []
    for name, step in all_steps.items():
        gpu.watch()
        step()
        gpu.rest()
        graphs = {kernel: int(found[1]) for kernel in gpu.kernels if (found := re.fullmatch(r"graph of (\d+) kernels", kernel))}
        launches, waits, ms = gpu.kernels.total(), gpu.stacks.total(), 1e3 * statistics.median(times[name])
        kernels = launches + sum(gpu.kernels[graph] * (held - 1) for graph, held in graphs.items())
        rows.append({"step": name, "host_ms": ms, "launches": launches, "kernels": kernels, "waits": waits, "gb": peaks[name] / 1e9})
        print(f"{name:24}{ms:6.0f} ms{launches:7} launches{kernels:7} kernels{waits:4} waits{peaks[name] / 1e9:7.1f} GB", flush=True)
        if args.kernels:
            print("\n".join(f"    {count:5} {kernel[: args.kernels]}" for kernel, count in gpu.kernels.most_common(30)))
    images = image_bytes(args.micro_batch)
    print(f"an image's activations take {images['allocated'] / 1e6:.1f} MB, and {images['estimated'] / 1e6:.1f} by the estimate")
    command = f"python -m benchmarks.training.host --micro-batch {args.micro_batch} --rounds {args.rounds}"
    measured = {"image_bytes": images, "rows": rows}
    record_result(
        RESULT, command, ["torch", "deepspeed", "triton"], model=MODEL, image_size=IMAGE_SIZE, micro_batch=args.micro_batch, **measured
    )


def image_bytes(micro_batch: int) -> dict[str, float]:
    """What one image more adds to a step's peak, as PyTorch allocates it, and as `pretrain.monitor.memory` estimates it."""
    import torch

    from benchmarks.training.ways import Job, new_model, ways
    from pretrain.monitor.memory import activation_bytes

    job = Job(MODEL, IMAGE_SIZE, torch.device("cuda", 0))
    (step,) = (way.build(job) for way in ways(job.device, None) if way.name == "own")
    peaks = []
    for batch in (micro_batch, 2 * micro_batch):
        images = torch.zeros(batch, 3, IMAGE_SIZE, IMAGE_SIZE, device=job.device).to(memory_format=torch.channels_last)
        for _ in range(2):  # the optimizer's states
            torch.cuda.reset_peak_memory_stats()
            step(images, torch.zeros(batch, dtype=torch.int64, device=job.device))
        peaks.append(torch.cuda.max_memory_allocated())
    estimated = activation_bytes(new_model(job), IMAGE_SIZE, "bf16", "cuda")
    return {"allocated": (peaks[1] - peaks[0]) / micro_batch, "estimated": estimated}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--micro-batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--kernels", type=int, metavar="WIDTH", help="also list each step's kernels, by names of that width")
    args = parser.parse_args()
    if "IDLE_GPU" in os.environ:
        measure(args)
        os._exit(0)  # what PyTorch frees at the end, this GPU need not
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | idle_gpu.build(Path(folder)) | {"IDLE_GPU": "1"}
        sys.exit(subprocess.run([sys.executable, "-m", "benchmarks.training.host", *sys.argv[1:]], env=environment).returncode)


if __name__ == "__main__":
    main()
