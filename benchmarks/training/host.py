"""Work of the host in a training step, without a GPU: launches, kernels, waits, memory, and the host's time.

    python -m benchmarks.training.host

Runs whole steps of VAN-B3 at 224 px on a GPU that computes nothing (idle_gpu/): our model as in `benchmarks.training`, and a job's step
in each ZeRO stage. PyTorch, DeepSpeed and Triton do all that they do with a real GPU, where no step can be shorter. Times are of this
machine's CPU; launches, kernels and waits hold for any.
"""

import os
import re
import statistics
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.harness import command_line, in_turns, parser, report, seconds
from benchmarks.training import idle_gpu

MODULE = "benchmarks.training.host"
MODEL, IMAGE_SIZE = "van_b3", 224
# Settings of `model` and `engine` that differ from the defaults. ZeRO-3 is last, as DeepSpeed replaces torch's linear layer for the whole
# process then.
ENGINES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    **{f"engine, ZeRO-{stage}": ({}, {"zero_stage": stage}) for stage in range(3)},
    "engine, kernels": ({"kernels": "triton"}, {}),
    "engine, graphs": ({"graphs": True}, {}),
    "engine, kernels, graphs": ({"kernels": "triton", "graphs": True}, {}),
    "engine, ZeRO-3": ({}, {"zero_stage": 3}),
}


def step_builders(micro_batch: int) -> dict[str, Callable[[], Callable[[], object]]]:
    """Returns functions that build the training step of each case, on one batch repeated."""
    import torch

    from benchmarks.training.step_cases import Case, Job, all_cases, engine_config, engine_step, new_model

    idle_gpu.skip_trials()
    job = Job(MODEL, IMAGE_SIZE, torch.device("cuda", 0), batch=micro_batch)
    images = torch.zeros(micro_batch, 3, IMAGE_SIZE, IMAGE_SIZE, device=job.device).to(memory_format=torch.channels_last)
    labels = torch.zeros(micro_batch, dtype=torch.int64, device=job.device)

    def build_case(case: Case) -> Callable[[], object]:
        return partial(case.build(job), images, labels)

    def build_engine(model: dict[str, Any], engine: dict[str, Any]) -> Callable[[], object]:
        return partial(engine_step(engine_config(job, model, engine), new_model(job)), images, labels[:, None], None)

    builders: dict[str, Callable[[], Callable[[], object]]] = {}
    for case in all_cases(job.device, None):
        if case.name in ("ours", "ours_kernels"):
            builders[case.name] = partial(build_case, case)
    return builders | {name: partial(build_engine, *given) for name, given in ENGINES.items()}


def measure(args: Namespace) -> None:
    """Measures and reports all cases, in a process that sees the idle GPU."""
    import torch

    gpu, steps, peaks = idle_gpu.IdleGpu(), {}, {}
    gpu.rest()
    for name, build in step_builders(args.micro_batch).items():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step = steps[name] = build()
        step()
        peaks[name] = torch.cuda.max_memory_allocated() - before
        for _ in range(3):  # ZeRO-3 learns the order of its gathers
            step()
    times = in_turns({name: partial(seconds, step) for name, step in steps.items()}, args.rounds)
    rows = []
    for name, step in steps.items():
        gpu.watch()
        step()
        gpu.rest()
        launches = gpu.kernels.total()
        graphs = {kernel: int(held[1]) for kernel in gpu.kernels if (held := re.fullmatch(r"graph of (\d+) kernels", kernel))}
        kernels = launches + sum(gpu.kernels[graph] * (held - 1) for graph, held in graphs.items())
        counts = {"launches": launches, "kernels": kernels, "waits": gpu.stacks.total(), "gb": peaks[name] / 1e9}
        rows.append({"case": name, "host_ms": 1e3 * statistics.median(times[name]), **counts})
        if args.kernels:
            print(name, *(f"    {count:5} {kernel[: args.kernels]}" for kernel, count in gpu.kernels.most_common(30)), sep="\n")
    images = image_bytes(args.micro_batch)
    print(f"activations of an image: {images['allocated'] / 1e6:.1f} MB allocated, {images['estimated'] / 1e6:.1f} MB estimated")
    command = command_line(MODULE, {"micro_batch": args.micro_batch, "rounds": args.rounds})
    facts = {"model": MODEL, "image_size": IMAGE_SIZE, "micro_batch": args.micro_batch, "image_bytes": images}
    report(args.out / "host.json", command, ["torch", "deepspeed", "triton"], **facts, rows=rows)


def image_bytes(micro_batch: int) -> dict[str, float]:
    """Returns the growth of a step's peak memory per image, as allocated and as `pretrain.monitor.memory` estimates it."""
    import torch

    from benchmarks.training.step_cases import Job, all_cases, new_model
    from pretrain.monitor.memory import activation_bytes

    job = Job(MODEL, IMAGE_SIZE, torch.device("cuda", 0))
    (step,) = (case.build(job) for case in all_cases(job.device, None) if case.name == "ours")
    peaks = []
    for batch in (micro_batch, 2 * micro_batch):
        images = torch.zeros(batch, 3, IMAGE_SIZE, IMAGE_SIZE, device=job.device).to(memory_format=torch.channels_last)
        for _ in range(2):  # the first creates the optimizer states
            torch.cuda.reset_peak_memory_stats()
            step(images, torch.zeros(batch, dtype=torch.int64, device=job.device))
        peaks.append(torch.cuda.max_memory_allocated())
    estimated = activation_bytes(new_model(job), IMAGE_SIZE, "bf16", "cuda")
    return {"allocated": (peaks[1] - peaks[0]) / micro_batch, "estimated": estimated}


def main() -> None:
    options = parser(MODULE, __doc__)
    options.add_argument("--micro-batch", type=int, default=64)
    options.add_argument("--rounds", type=int, default=9)
    options.add_argument("--kernels", type=int, metavar="WIDTH", help="also list the kernels of each step, with names of that width")
    args = options.parse_args()
    if "IDLE_GPU" in os.environ:
        measure(args)
        os._exit(0)  # skips PyTorch's clean-up
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | idle_gpu.build(Path(folder)) | {"IDLE_GPU": "1"}
        sys.exit(subprocess.run([sys.executable, "-m", MODULE, *sys.argv[1:]], env=environment).returncode)


if __name__ == "__main__":
    main()
