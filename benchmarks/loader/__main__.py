"""Compares the images per second of a job's data loader with timm's loader and with decoding alone.

python -m benchmarks.loader CONFIG --against timm [--images 2048] [--batch N] [--rounds 3] [--out FOLDER] [key=value …]
    this loader and timm's with the same settings, over the shards of data.train
python -m benchmarks.loader CONFIG --gpu-sweep [--images 2048] [--batch N] [--rounds 3] [--out FOLDER] [key=value …]
    this loader and decoding alone on a GPU, by the load of its hardware decoder and by threads

The result goes to FOLDER/loader.json (benchmarks/results). rates.py describes the method.
"""

import argparse
import shlex
import sys
from pathlib import Path

import torch

from benchmarks import harness
from benchmarks.loader import rates
from data.common.command_line import parse
from data.settings import load_job

MODULE = "benchmarks.loader"


def parser() -> argparse.ArgumentParser:
    options = harness.make_parser(MODULE, __doc__)
    options.add_argument("config", type=Path, metavar="CONFIG")
    options.add_argument("overrides", nargs="*", metavar="key=value")
    compared = options.add_mutually_exclusive_group(required=True)
    compared.add_argument("--against", choices=["timm"], help="compare with this loader")
    compared.add_argument("--gpu-sweep", action="store_true", help="vary the load of the GPU's JPEG decoder and the threads")
    options.add_argument("--images", type=int, default=2048, help="images of each case in a round (%(default)s)")
    options.add_argument("--batch", type=int, help="images of a batch (the job's micro-batch)")
    options.add_argument("--rounds", type=int, default=3, help="turns of each case (%(default)s)")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Measures a job's data loader, prints the table and stores the result; returns the exit code, 2 after a user error."""
    args = parse(parser(), arguments)
    try:
        job = load_job(args.config, args.overrides)
        batch = args.batch or job.engine.micro_batch
        compare = rates.sweep_gpu if args.gpu_sweep else rates.compare_with_timm
        measured = compare(job, images=args.images, batch=batch, rounds=args.rounds)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    given = {"gpu_sweep": args.gpu_sweep, "against": args.against, "images": args.images, "batch": batch, "rounds": args.rounds}
    command = f"{harness.format_command(MODULE, given)} {shlex.join([str(args.config), *args.overrides])}"
    device = rates.choose_device(job)
    facts = {"device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu", "torch_threads": torch.get_num_threads()}
    tables = {"rows": rates.list_rows(measured), "ratios": rates.compute_ratios(measured)}
    harness.report(args.out / "loader.json", command, rates.PACKAGES, **facts, **tables)
    return 0


if __name__ == "__main__":
    sys.exit(main())
