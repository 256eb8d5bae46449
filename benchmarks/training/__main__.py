"""Training benchmarks of this machine: printed while they run, summed up in a table, and kept as JSON.

python -m benchmarks.training --gpu [--only layers|steps] [--model van_b3 …] [--image-size 224] [--batch N] [--precision bf16|fp16|fp32]
    [--peer PATH] [--ways WAY …] [--rounds 9] [--out FOLDER]
    a GPU: the depth-wise layers of a model, Triton's kernels beside PyTorch's operator; then whole training steps of VAN-B3 to B6, each way
    at its best micro-batch. --peer: a checkout of the authors' VAN-Classification, which is measured in turns with this project
python -m benchmarks.training --cpu [--model van_b0 …] [--image-size 224] [--batch 16] [--peer PATH] [--rounds 9] [--out FOLDER]
    whole training steps on the CPU
python -m benchmarks.training --gpu|--cpu [--rounds 9] [--steps 50] [--out FOLDER] --feed CONFIG key=value …
    the training step of a job fed by its data loader, beside the same step on one batch repeated

Results go to FOLDER (benchmarks/results) as lists of measurements with machine, versions and commit, written after each model:
layers_GPU.json, steps_GPU.json or steps_cpu.json, feed_GPU.json or feed_cpu.json.
"""

import argparse
import re
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.training import layers, peer, roofline
from benchmarks.training.measure import measure, row
from benchmarks.training.ways import Job, Way, new_model, ways
from data.common.results import record_result
from pretrain.engine.precision import DTYPES
from pretrain.monitor.flops import mfu, peak_flops, training_flops

RESULTS = Path(__file__).parents[1] / "results"
STEP_MODELS = {"cuda": ["van_b3", "van_b4", "van_b5", "van_b6"], "cpu": ["van_b0"]}
LAYER_BATCH = 64
CPU_BATCH = 16


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m benchmarks.training", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    where = top.add_mutually_exclusive_group(required=True)
    where.add_argument("--gpu", action="store_true", help="depth-wise layers, by Triton and by PyTorch, and whole steps")
    where.add_argument("--cpu", action="store_true", help="whole steps")
    top.add_argument("--only", choices=("layers", "steps"), help="with --gpu")
    top.add_argument("--model", nargs="+", choices=[f"van_b{n}" for n in range(7)], help="default: B3 to B6 on a GPU, B0 on a CPU")
    top.add_argument("--image-size", type=int, default=224)
    top.add_argument("--batch", type=int, help="default: 64 for layers, 16 on a CPU, for steps on a GPU the best of each way")
    top.add_argument("--precision", choices=("bf16", "fp16", "fp32"), default="bf16", help="of the layers")
    top.add_argument("--peer", type=Path, metavar="PATH", help="a checkout of the authors' VAN-Classification")
    top.add_argument("--ways", nargs="+", metavar="WAY", help="measure these steps only (benchmarks/training/ways.py)")
    top.add_argument("--feed", nargs="+", metavar="CONFIG key=value", help="measure the step of this job, fed by its data loader")
    top.add_argument("--rounds", type=int, default=9, help="number of turns of each way")
    top.add_argument("--steps", type=int, default=50, help="timed in a round of --feed")
    top.add_argument("--out", type=Path, metavar="FOLDER", default=RESULTS, help="for the results as JSON; default: benchmarks/results")
    return top


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmarks that the arguments name; returns the exit code, 2 after a mistake of the user's."""
    try:
        run(parser().parse_args(arguments))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


def run(args: Namespace) -> None:
    """Runs the benchmarks that the parsed arguments name.

    Raises:
        ValueError: --gpu without a GPU that the kernels run on; --peer is no checkout of the authors' code; a job's settings can't work.
    """
    device = torch.device("cpu")
    if args.gpu:
        device = layers.usable_gpu()
    if args.feed:
        _feed(args, device)
        return
    authors = peer.load(args.peer) if args.peer is not None else None
    if args.gpu and args.only != "steps":
        for model in args.model or ["van_b3"]:
            _layers(args, model, device)
    if args.only != "layers":
        for model in args.model or STEP_MODELS[device.type]:
            _steps(args, model, device, authors)


def _layers(args: Namespace, model: str, device: torch.device) -> None:
    batch = args.batch or LAYER_BATCH
    job = {"model": model, "image_size": args.image_size, "batch": batch, "precision": args.precision}
    print(f"\n{model}, {args.image_size} px, {batch} images, {args.precision}", flush=True)
    found = layers.bench(layers.layers(model, args.image_size), batch, DTYPES[args.precision], device)
    command = f"python -m benchmarks.training --gpu --only layers {_options(job)}"
    record_result(_file(args, "layers", device), command, ["torch", "triton"], **about(device), **job, **found)


def _steps(args: Namespace, model: str, device: torch.device, authors: Any) -> None:
    job = Job(model, args.image_size, device)
    batch = args.batch or (CPU_BATCH if device.type == "cpu" else None)
    print(f"\n{model}, {args.image_size} px: a training step", flush=True)
    limits = {"copy_bytes_per_s": layers.copy_bytes_per_s(device), "product_flops_per_s": layers.product_flops_per_s(device)}
    found = measure(job, chosen(ways(device, authors), args.ways), batch=batch, rounds=args.rounds)
    rows = judged([row(one, found) for one in found], job, **limits)
    print("\n".join(table(rows)), flush=True)
    options = {"model": model, "image_size": args.image_size, "batch": batch, "rounds": args.rounds}
    options |= {"ways": args.ways and " ".join(args.ways), "peer": authors and "PATH"}
    command = f"python -m benchmarks.training --{'gpu' if args.gpu else 'cpu'} --only steps {_options(options)}"
    theirs = {"peer_sha256": peer.fingerprint(authors)} if authors is not None else {}
    packages = ["torch", "triton", "timm", "deepspeed"]
    described = {"model": model, "image_size": args.image_size, "drop_path": job.drop_path, "classes": job.classes}
    record_result(_file(args, "steps", device), command, packages, **about(device), **described, **theirs, **limits, rows=rows)


def chosen(all_ways: Sequence[Way], names: Sequence[str] | None) -> list[Way]:
    """Those of the names, in their own order; without names all that hold no memory of others.

    Raises:
        ValueError: there is no such way here.
    """
    unknown = set(names or ()) - {way.name for way in all_ways}
    if unknown:
        raise ValueError(f"--ways: no {', '.join(sorted(unknown))} here; there are {', '.join(way.name for way in all_ways)}")
    return [way for way in all_ways if (way.name in names if names else not way.holds)]


def _feed(args: Namespace, device: torch.device) -> None:
    from benchmarks.training.feed import measure_feed
    from pretrain import config as settings

    config = settings.load(Path(args.feed[0]), [*args.feed[1:], f"engine.device={device.type}"], unused=("data.val",))
    found = measure_feed(config, rounds=args.rounds, steps=args.steps)
    print(f"fed by the loader a step makes {found['fed_to_repeated']:.1%} of the images/s that it makes of one batch repeated", flush=True)
    command = f"python -m benchmarks.training --{device.type.replace('cuda', 'gpu')} --rounds {args.rounds} --steps {args.steps}"
    command += f" --feed {' '.join(args.feed)}"
    packages = ["torch", "deepspeed", "nvidia-dali-cuda130"]
    job = {"model": config.model.name, "kernels": config.model.kernels, "image_size": config.data.image_size}
    record_result(_file(args, "feed", device), command, packages, **about(device), **job, precision=config.engine.precision, **found)


def about(device: torch.device) -> dict[str, Any]:
    """What of the machine decides the times."""
    if device.type == "cpu":
        return {
            "device": "cpu", "instructions": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads(),
            "bf16_instructions": torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        }  # fmt: skip
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": properties.name, "memory_gb": properties.total_memory / 1e9, "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }  # fmt: skip


def judged(rows: Sequence[dict[str, Any]], job: Job, copy_bytes_per_s: float, product_flops_per_s: float) -> list[dict[str, Any]]:
    """The rows with what of the device each used: the share of a measured matrix product's FLOP/s; and of a GPU the share of a measured
    copy's bytes/s that the fused roofline's bytes come to, MFU, and the share of the fused roofline by its data sheet, the last two only
    where it is in their tables."""
    flops, peak = training_flops(new_model(job), job.image_size), peak_flops(job.device, "bf16")
    sheet = roofline.by_name(torch.cuda.get_device_name(job.device)) if job.device.type == "cuda" else None
    least = roofline.image_bytes(job.model, job.image_size, roofline.FUSED)
    found = []
    for one in rows:
        if "failed" not in one:
            rate = one["images_per_s"]["median"]
            one = one | {"share_of_product": rate * flops / product_flops_per_s}
            if job.device.type == "cuda":
                one["share_of_copy"] = rate * least / copy_bytes_per_s
            if peak is not None:
                one["mfu"] = mfu(rate, flops, peak)
            if sheet is not None:
                one["share_of_roofline"] = rate / roofline.attainable(job.model, job.image_size, roofline.FUSED, sheet)
        found.append(one)
    return found


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A line a way: images a second (median and deciles), and what else there is."""
    lines = ["", f"{'':22} {'micro-batch':>11} {'images/s':>9} {'(deciles)':>19}"]
    for one in rows:
        if "failed" in one:
            lines.append(f"{one['way']:22} failed: {one['failed']}")
            continue
        rate = one["images_per_s"]
        spread = f"{rate['tenth']:.2f} to {rate['ninetieth']:.2f}"
        line = f"{one['way']:22} {one['micro_batch']:>11} {rate['median']:>9.2f} {spread:>19}"
        shares = {
            "memory_gb": "{:.1f} GB",
            "mfu": "MFU {:.1%}",
            "share_of_roofline": "{:.0%} of the roofline",
            "share_of_copy": "{:.0%} of a copy",
            "share_of_product": "{:.0%} of a product",
        }
        line += "".join(f"  {text.format(one[key])}" for key, text in shares.items() if key in one)
        line += "".join(f"  {times:.2f} x {peer}" for peer, times in one.get("times_the", {}).items())
        lines.append(line)
    return lines


def _file(args: Namespace, kind: str, device: torch.device) -> Path:
    name = "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device)
    return args.out / f"{kind}_{re.sub(r'[^a-z0-9]+', '_', name.lower())}.json"


def _options(values: dict[str, Any]) -> str:
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in values.items() if value is not None)


if __name__ == "__main__":
    sys.exit(main())
