"""Benchmarks training on this machine: prints progress and a table of results, and stores them as JSON.

python -m benchmarks.training --gpu [--only layers|steps] [--model van_b3 …] [--image-size 224] [--batch N] [--precision bf16|fp16|fp32]
    [--peer PATH] [--cases CASE …] [--rounds 9] [--out FOLDER]
    a GPU: the depthwise layers of a model, Triton kernels against PyTorch's operator; then whole training steps of VAN-B3 to B6, each case
    at its best micro-batch. --peer: a checkout of the authors' VAN-Classification, measured in turns with this project
python -m benchmarks.training --cpu [--model van_b0 …] [--image-size 224] [--batch 16] [--peer PATH] [--rounds 9] [--out FOLDER]
    whole training steps on the CPU
python -m benchmarks.training --gpu|--cpu [--rounds 9] [--steps 50] [--out FOLDER] --feed CONFIG key=value …
    the training step of a job fed by its data loader, against the same step on a repeated batch

Results go to FOLDER (benchmarks/results), written after each model: layers_GPU.json, steps_GPU.json or steps_cpu.json,
feed_GPU.json or feed_cpu.json.
"""

import argparse
import re
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from benchmarks.training import layers, peer, roofline
from benchmarks.training.step_cases import Job, all_cases, new_model, select_cases
from benchmarks.training.steps import measure, row
from pretrain import config as settings
from pretrain.engine.precision import DTYPES
from pretrain.monitor.flops import mfu, peak_flops, training_flops

MODULE = "benchmarks.training"
STEP_MODELS = {"cuda": ["van_b3", "van_b4", "van_b5", "van_b6"], "cpu": ["van_b0"]}
LAYER_BATCH = 64
CPU_BATCH = 16


def parser() -> argparse.ArgumentParser:
    options = harness.make_parser(MODULE, __doc__)
    device = options.add_mutually_exclusive_group(required=True)
    device.add_argument("--gpu", action="store_true", help="depthwise layers and whole steps")
    device.add_argument("--cpu", action="store_true", help="whole steps")
    options.add_argument("--only", choices=("layers", "steps"), help="with --gpu")
    options.add_argument("--model", nargs="+", choices=[f"van_b{n}" for n in range(7)], help="default: B3 to B6 on a GPU, B0 on a CPU")
    options.add_argument("--image-size", type=int, default=224)
    options.add_argument("--batch", type=int, help="default: 64 for layers, 16 on a CPU, for steps on a GPU the best of each case")
    options.add_argument("--precision", choices=("bf16", "fp16", "fp32"), default="bf16", help="of the layers")
    options.add_argument("--peer", type=Path, metavar="PATH", help="a checkout of the authors' VAN-Classification")
    options.add_argument("--cases", nargs="+", metavar="CASE", help="measure these steps only (benchmarks/training/step_cases.py)")
    options.add_argument("--feed", nargs="+", metavar="CONFIG key=value", help="measure the step of this job, fed by its data loader")
    options.add_argument("--rounds", type=int, default=9, help="turns of each case")
    options.add_argument("--steps", type=int, default=50, help="timed in a turn of --feed")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmarks that the arguments select; returns the exit code, 2 after a user error."""
    try:
        run(parser().parse_args(arguments))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


def run(args: Namespace) -> None:
    """Runs the benchmarks that the parsed arguments select.

    Raises:
        ValueError: --gpu without a GPU that the kernels support; --peer is no checkout of the authors' code; a job's settings are invalid.
    """
    device = layers.usable_gpu() if args.gpu else torch.device("cpu")
    if args.feed:
        _measure_feed(args, device)
        return
    authors = peer.load(args.peer) if args.peer is not None else None
    if args.gpu and args.only != "steps":
        for model in args.model or ["van_b3"]:
            _measure_layers(args, model, device)
    if args.only != "layers":
        for model in args.model or STEP_MODELS[device.type]:
            _measure_steps(args, model, device, authors)


def _measure_layers(args: Namespace, model: str, device: torch.device) -> None:
    batch = args.batch or LAYER_BATCH
    job = {"model": model, "image_size": args.image_size, "batch": batch, "precision": args.precision}
    print(f"\n{model}, {args.image_size} px, {batch} images, {args.precision}", flush=True)
    copy, rows = layers.measure(layers.layers(model, args.image_size), batch, DTYPES[args.precision], device)
    command = harness.format_command(MODULE, {"gpu": True, "only": "layers", **job})
    facts = {**describe_device(device), **job, "copy_bytes_per_s": copy}
    harness.report(_result_path(args, "layers", device), command, ["torch", "triton"], **facts, rows=rows)


def _measure_steps(args: Namespace, model: str, device: torch.device, authors: Any) -> None:
    job = Job(model, args.image_size, device)
    batch = args.batch or (CPU_BATCH if device.type == "cpu" else None)
    print(f"\n{model}, {args.image_size} px: a training step", flush=True)
    limits = {"copy_bytes_per_s": layers.copy_bytes_per_s(device), "product_flops_per_s": layers.product_flops_per_s(device)}
    measured = measure(job, select_cases(all_cases(device, authors), args.cases), batch=batch, rounds=args.rounds)
    rows = [one | shares(one, job, **limits) for one in (row(one, measured) for one in measured)]
    options = {"model": model, "image_size": args.image_size, "batch": batch, "rounds": args.rounds}
    options |= {"cases": args.cases, "peer": "PATH" if authors else None}
    command = harness.format_command(MODULE, {"gpu": args.gpu, "cpu": args.cpu, "only": "steps", **options})
    facts = {**describe_device(device), "model": model, "image_size": args.image_size, "drop_path": job.drop_path, "classes": job.classes}
    if authors is not None:
        facts["peer_sha256"] = peer.fingerprint(authors)
    packages = ["torch", "triton", "timm", "deepspeed"]
    harness.report(_result_path(args, "steps", device), command, packages, **facts, **limits, rows=rows)


def _measure_feed(args: Namespace, device: torch.device) -> None:
    from benchmarks.training.feed import measure_feed

    config = settings.load(Path(args.feed[0]), [*args.feed[1:], f"engine.device={device.type}"], unchecked=("data.val",))
    rows = measure_feed(config, rounds=args.rounds, steps=args.steps)
    options = {"gpu": args.gpu, "cpu": args.cpu, "rounds": args.rounds, "steps": args.steps, "feed": args.feed}
    facts: dict[str, Any] = {"model": config.model.name, "kernels": config.model.kernels, "image_size": config.data.image_size}
    facts |= {"precision": config.engine.precision, **describe_device(device)}
    packages = ["torch", "deepspeed", "nvidia-dali-cuda130"]
    harness.report(_result_path(args, "feed", device), harness.format_command(MODULE, options), packages, **facts, rows=rows)


def describe_device(device: torch.device) -> dict[str, Any]:
    """Returns the properties of the device and its software that affect times."""
    if device.type == "cpu":
        instructions, has_bf16 = torch.backends.cpu.get_cpu_capability(), torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return {"device": "cpu", "instructions": instructions, "threads": torch.get_num_threads(), "bf16_instructions": has_bf16}
    properties = torch.cuda.get_device_properties(device)
    versions = {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return {"device": properties.name, "memory_gb": properties.total_memory / 1e9, **versions}


def shares(measured: dict[str, Any], job: Job, copy_bytes_per_s: float, product_flops_per_s: float) -> dict[str, float]:
    """Returns a case's median rate as shares of the device's limits; empty if the case failed.

    share_of_product is the step's FLOP/s over those of a product of large matrices. On a GPU, share_of_copy is the fused roofline's bytes/s
    over those of a copy; for GPUs in the tables of data sheets, MFU and share_of_roofline are added.
    """
    if "failed" in measured:
        return {}
    rate, flops = harness.deciles(measured["images_per_s"])["median"], training_flops(new_model(job), job.image_size)
    assert flops is not None
    result = {"share_of_product": rate * flops / product_flops_per_s}
    if job.device.type == "cuda":
        result["share_of_copy"] = rate * roofline.image_bytes(job.model, job.image_size, roofline.FUSED) / copy_bytes_per_s
        peak, sheet = peak_flops(job.device, "bf16"), roofline.find_device(torch.cuda.get_device_name(job.device))
        if peak is not None:
            result["mfu"] = mfu(rate, flops, peak)
        if sheet is not None:
            result["share_of_roofline"] = rate / roofline.attainable(job.model, job.image_size, roofline.FUSED, sheet)
    return result


def _result_path(args: Namespace, kind: str, device: torch.device) -> Path:
    name = "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device)
    return args.out / f"{kind}_{re.sub(r'[^a-z0-9]+', '_', name.lower())}.json"


if __name__ == "__main__":
    sys.exit(main())
