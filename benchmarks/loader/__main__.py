"""Data loader benchmarks: the images a second of a job's loader beside timm's, and of both beside decoding alone.

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

from benchmarks.loader import rates
from data.common.config_files import load
from data.common.results import record_result
from data.settings import JobData, invalid_data

RESULTS = Path(__file__).parents[1] / "results"


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m benchmarks.loader", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    top.add_argument("config", type=Path, metavar="CONFIG")
    top.add_argument("overrides", nargs="*", metavar="key=value")
    compared = top.add_mutually_exclusive_group(required=True)
    compared.add_argument("--against", choices=["timm"], help="compare with this loader")
    compared.add_argument("--gpu-sweep", action="store_true", help="vary the load of the GPU's JPEG decoder and the threads")
    top.add_argument("--images", type=int, default=2048, help="timed of each way in a round (%(default)s)")
    top.add_argument("--batch", type=int, help="images of a batch (the job's micro-batch)")
    top.add_argument("--rounds", type=int, default=3, help="number of turns of each way (%(default)s)")
    top.add_argument("--out", type=Path, metavar="FOLDER", default=RESULTS, help="for the result as JSON; default: benchmarks/results")
    return top


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark that the arguments name; returns the exit code, 2 after a mistake of the user's."""
    args = parser().parse_intermixed_args(arguments)
    try:
        run(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


def run(args: argparse.Namespace) -> None:
    """Measures the job of args.config, prints the table and records the result.

    Raises:
        ValueError: the settings are wrong, the dataset lies at a URL, or --gpu-sweep has no GPU.
    """
    job = load(JobData, args.config, args.overrides, invalid_data, sections=["data"])
    batch = args.batch or job.engine.micro_batch
    compare = rates.gpu_sweep if args.gpu_sweep else rates.against_timm
    measured = compare(job, images=args.images, batch=batch, rounds=args.rounds)
    print(*rates.table(measured), sep="\n")
    compared = ["--gpu-sweep"] if args.gpu_sweep else ["--against", args.against]
    numbers = ["--images", str(args.images), "--batch", str(batch), "--rounds", str(args.rounds)]
    command = shlex.join(["python", "-m", "benchmarks.loader", str(args.config), *compared, *numbers, *args.overrides])
    record_result(args.out / "loader.json", command, rates.PACKAGES, **rates.as_result(measured, rates.job_device(job)))


if __name__ == "__main__":
    sys.exit(main())
