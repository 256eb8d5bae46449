"""Command line of the data package.

    python -m data pack SOURCE OUT                      images to shards: OUT/train, and with --holdout OUT/val
    python -m data synthesize OUT                       a small drawn dataset: OUT/train and OUT/val
    python -m data index SHARDS                         a dataset, in place, of shards that others wrote
    python -m data verify FOLDER                        a line for each fault; exit status 1 if there is one
    python -m data stats FOLDER                         samples, classes, sizes, bytes; with --out plots and a contact sheet
    python -m data bench --simulate                     what an index of ImageNet-22K's size costs, beside what is promised
    python -m data bench CONFIG --against timm          how fast a job's images are decoded and augmented, beside timm's loader
    python -m data order CONFIG --epoch 3 --steps 0:4   what a job takes in these steps, and what is drawn for it: a line a sample
    python -m data preview CONFIG --out grid.png        pictures of what a job's network is given

What can't work ends with one line on stderr and exit status 2.
"""

import argparse
import os
import shlex
import sys
from dataclasses import asdict
from pathlib import Path

from benchmarks.loader.index_at_scale import SAMPLES, SHARDS, bench, sorted_shards
from data.augment.recipe import Recipe
from data.common.results import record
from data.dataset.index import Index, open_index
from data.inspect.parameters import lines, parameters
from data.inspect.report import stats, write_report
from data.inspect.shuffle import table
from data.loader.order import make_sample_order
from data.packing.adopt import index_shards
from data.packing.images import MAX_PIXELS, ImageRules
from data.packing.pack import MAX_REJECTED, pack
from data.packing.plan import Settings
from data.packing.sources import read_classes
from data.packing.verify import verify
from data.settings import JobData, invalid_data
from data.synthetic.synthesize import SETS, synthesize


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m data", description="From images to batches: pack, check and inspect datasets.")
    commands = top.add_subparsers(dest="command", required=True)

    _add_pack(commands.add_parser("pack", help="pack images into shards; a packing that was stopped goes on"))

    command = commands.add_parser("synthesize", help="draw a small dataset, OUT/train and OUT/val")
    command.add_argument("out", type=Path)
    command.add_argument("--draw", choices=SETS, default="patterns", help="which set (%(default)s)")
    command.add_argument("--classes", type=int, metavar="N", help="its first classes (all)")
    command.add_argument("--train", type=int, default=1800, help="training images (%(default)s)")
    command.add_argument("--val", type=int, default=300, help="validation images (%(default)s)")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--photographs", action="store_true", help="of 500 x 375 pixels and 110 kB")

    command = commands.add_parser("index", help="make a dataset, in place, of shards that others wrote; no tar is touched")
    command.add_argument("folder", type=Path, metavar="SHARDS")
    command.add_argument(
        "--classes", type=Path, metavar="FILE", help="class names in the order of labels: a list in JSON, or a name a line"
    )
    command.add_argument("--label", metavar="FIELD", help="the field of each .json with the label or class name (default: labels in .cls)")
    command.add_argument("--force", action="store_true", help="even if the folder is a dataset already, and would become another")
    _add_workers(command)

    command = commands.add_parser("verify", help="check a dataset against itself: names, sizes, headers")
    _add_dataset(command)
    command.add_argument("--deep", action="store_true", help="read every byte: checksums and labels, and decode every image")
    _add_workers(command)

    command = commands.add_parser("stats", help="describe a dataset")
    _add_dataset(command)
    command.add_argument("--out", type=Path, metavar="FILE", help="a .png or .html with plots and a contact sheet of random samples")
    command.add_argument("--seed", type=int, default=0, help="of the random samples")

    command = commands.add_parser("bench", help="measure rates, and what is promised; exit status 1 if a promise is broken")
    what = command.add_mutually_exclusive_group(required=True)
    what.add_argument("--simulate", action="store_true", help="of a real index over shards that are holes, as large as ImageNet-22K's")
    what.add_argument("--against", choices=["timm"], help="a job's batches by its loader and by another, and decoding alone")
    what.add_argument("--gpu-sweep", action="store_true", help="a job's batches by the load of a GPU's JPEG decoder, and by threads")
    command.add_argument("overrides", nargs="*", metavar="CONFIG key=value", help="a job's settings, but with --simulate")
    command.add_argument("--samples", type=int, default=SAMPLES, help="to simulate (%(default)s)")
    command.add_argument("--shards", type=int, default=SHARDS, help="to simulate (%(default)s)")
    command.add_argument("--images", type=int, default=2048, help="to measure each way on, a round (%(default)s)")
    command.add_argument("--batch", type=int, help="images of a batch (the job's micro-batch)")
    command.add_argument("--rounds", type=int, default=3, help="in which all ways take turns (%(default)s)")
    command.add_argument("--out", type=Path, metavar="FILE", help="keep the figures in this list of results, in JSON")

    command = commands.add_parser("order", help="print what a job takes in each step and what is drawn for it: a line a sample")
    _add_job(command)
    _add_steps(command)

    command = commands.add_parser("preview", help="draw what a job's network is given: augmented and mixed batches, the evaluation view")
    _add_job(command)
    command.add_argument("--out", type=Path, required=True, metavar="FILE", help="a .png")
    _add_steps(command)
    command.add_argument("--images", type=int, default=16, metavar="N", help="of each step (%(default)s)")
    return top


def _add_pack(command: argparse.ArgumentParser) -> None:
    command.add_argument("source", type=Path, help="class folders, per-class tars, a tar of those, or WebDataset shards")
    command.add_argument("out", type=Path, help="gets a folder for each split")
    command.add_argument("--split", default="train", help="the folder in OUT (%(default)s)")
    command.add_argument("--name", help="what shards are called: NAME-SPLIT-000000.tar (the last part of OUT)")
    command.add_argument(
        "--classes", type=Path, metavar="FILE", help="classes in label order: classes.json, a name a line, or a packed folder"
    )
    command.add_argument(
        "--labels", type=Path, metavar="FILE", help="labels of images without class folders: a CSV, or the development kit's"
    )
    command.add_argument("--holdout", type=_amount, metavar="N", help="images a class, or their share, that become OUT/val")
    command.add_argument(
        "--shard-mb", type=float, metavar="MIB", default=Settings.shard_bytes / 2**20, help="size of a shard (%(default)s)"
    )
    command.add_argument("--seed", type=int, default=0, help="of the order of samples and of the holdout")
    command.add_argument("--max-side", type=int, metavar="PX", help="cap the longer side of images")
    command.add_argument("--resize-short", type=int, metavar="PX", help="cap the shorter side of images")
    command.add_argument("--keep-original", action="store_true", help="leave byte for byte what DALI can read")
    command.add_argument(
        "--max-pixels", type=int, metavar="N", default=MAX_PIXELS, help="refuse larger images from their header (%(default)s)"
    )
    command.add_argument("--max-rejected", type=_amount, default=MAX_REJECTED, metavar="N", help="images, or their share (%(default)s)")
    _add_workers(command)
    command.add_argument("--part", type=_part, default=(0, 1), metavar="I/N", help="pack a share of the shards, from 0/N to N-1/N")
    command.add_argument("--merge", action="store_true", help="pack nothing, only make the dataset of what all parts have packed")


def _amount(text: str) -> int | float:
    """A number, or a share below 1."""
    try:
        amount = float(text) if "." in text else int(text)
    except ValueError:
        amount = -1
    if amount < 0 or (isinstance(amount, float) and amount >= 1):
        raise argparse.ArgumentTypeError(f"{text}: expected a number such as 50, or a share between 0 and 1 such as 0.01")
    return amount


def _part(text: str) -> tuple[int, int]:
    number, slash, count = text.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise argparse.ArgumentTypeError(f"{text}: expected I/N, from 0/N to N-1/N")
    return int(number), int(count)


def _add_dataset(command: argparse.ArgumentParser) -> None:
    command.add_argument("folder", help="or a URL")
    command.add_argument("--cache", metavar="FOLDER", help="for local copies of what is fetched from a URL")


def _add_job(command: argparse.ArgumentParser) -> None:
    command.add_argument("config", type=Path, metavar="CONFIG", help="a job's settings, such as configs/van_b3_in22k.yaml")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="settings that differ: seed, global_batch, data.…")


def _add_steps(command: argparse.ArgumentParser) -> None:
    command.add_argument("--epoch", type=int, default=0, help="counted from 0 (%(default)s)")
    command.add_argument("--steps", type=_steps, default=range(1), metavar="A:B", help="steps A to B - 1 of the epoch, or the first B (1)")


def _steps(text: str) -> range:
    first, colon, last = text.rpartition(":")
    first = first if colon else "0"
    if not (first.isdecimal() and last.isdecimal() and int(first) < int(last)):
        raise argparse.ArgumentTypeError(f"{text}: expected A:B, two step numbers, the smaller first, or a number of steps")
    return range(int(first), int(last))


def _add_workers(command: argparse.ArgumentParser) -> None:
    command.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (%(default)s)")


def main(arguments: list[str] | None = None) -> int:
    given = _parsed(arguments)
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # keys may have bytes that are not UTF-8
    try:
        match given.command:
            case "pack":
                for index in _pack(given):
                    print(stats(index))
            case "synthesize":
                options = {name: vars(given)[name] for name in ("draw", "classes", "train", "val", "seed", "photographs")}
                print(*map(stats, synthesize(given.out, **options)), sep="\n")
            case "index":
                classes = read_classes(given.classes) if given.classes else None
                print(stats(index_shards(given.folder, classes=classes, field=given.label, processes=given.workers, force=given.force)))
            case "verify":
                return 1 if verify(given.folder, given.cache, deep=given.deep, processes=given.workers) else 0
            case "stats":
                index = open_index(given.folder, given.cache)
                print(stats(index))
                if given.out:
                    write_report(index, given.out, seed=given.seed)
            case "bench":
                return _simulate(given) if given.simulate else _bench(given)
            case "order":
                _print_order(given)
            case "preview":
                from data.inspect.preview import preview

                preview(_job(given), given.out, epoch=given.epoch, steps=given.steps, images=given.images)
    except BrokenPipeError:  # the reader of the output, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print(f"{parser().prog} {given.command}: stopped", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"{parser().prog} {given.command}: {error}", file=sys.stderr)
        return 2
    return 0


def _parsed(arguments: list[str] | None) -> argparse.Namespace:
    """argparse takes all key=value before the first option or none; here they may stand anywhere."""
    top = parser()
    given, more = top.parse_known_args(arguments)
    if more and ("overrides" not in given or any(text.startswith("-") for text in more)):
        top.error(f"unrecognized arguments: {' '.join(more)}")
    if more:
        given.overrides += more
    return given


def _job(given: argparse.Namespace) -> JobData:
    from data.common.config_files import load

    return load(JobData, given.config, given.overrides, invalid_data, sections=["data"])


def _pack(given: argparse.Namespace) -> list[Index]:
    settings = Settings(
        split=given.split,
        name=given.name or given.out.absolute().name,
        shard_bytes=round(given.shard_mb * 2**20),
        seed=given.seed,
        holdout=given.holdout,
        classes=read_classes(given.classes) if given.classes else None,
        labels=given.labels,
        rules=ImageRules(
            keep_original=given.keep_original, max_side=given.max_side, resize_short=given.resize_short, max_pixels=given.max_pixels
        ),
    )
    return pack(
        given.source,
        given.out,
        settings,
        max_rejected=given.max_rejected,
        workers=given.workers,
        part=given.part,
        merge_only=given.merge,
    )


def _simulate(given: argparse.Namespace) -> int:
    figures = bench(given.samples, given.shards)
    print(*figures, sep="\n")
    tables = sorted_shards(given.samples, given.shards)
    for title, rows in tables.items():
        print("", title, *table(rows), sep="\n")
    if given.out:
        command = f"python -m data bench --simulate --samples {given.samples} --shards {given.shards}"
        shuffle = {title: [asdict(row) for row in rows] for title, rows in tables.items()}
        record(given.out, command, ["numpy"], rows=[asdict(figure) for figure in figures], shuffle=shuffle)
    return 0 if all(figure.kept for figure in figures) else 1


def _bench(given: argparse.Namespace) -> int:
    """Reads CONFIG from the first of what is no option."""
    if not given.overrides:
        raise ValueError("--against and --gpu-sweep measure a job: python -m data bench CONFIG …")
    given.config, *given.overrides = given.overrides
    job = _job(given)
    from benchmarks.loader import rates as rates

    batch = given.batch or job.engine.micro_batch
    compare = rates.gpu_sweep if given.gpu_sweep else rates.against_timm
    found = compare(job, images=given.images, batch=batch, rounds=given.rounds)
    print(*rates.table(found), sep="\n")
    if given.out:
        what = "--gpu-sweep" if given.gpu_sweep else f"--against {given.against}"
        command = f"python -m data bench {given.config} {what} --images {given.images} --batch {batch} --rounds {given.rounds}"
        record(given.out, shlex.join([*command.split(), *given.overrides]), rates.PACKAGES, **rates.as_result(found, rates.job_device(job)))
    return 0


def _print_order(given: argparse.Namespace) -> None:
    job = _job(given)
    index = open_index(job.data.train, job.data.cache)
    order, recipe = make_sample_order(index, job.data, seed=job.seed, global_batch=job.global_batch), Recipe(job.seed, job.data)
    for step in given.steps:
        ids = order.batch(given.epoch, step)
        drawn = parameters(recipe, given.epoch, ids, order.copies, index)
        print(*lines(given.epoch, step, ids, drawn, index), sep="\n")


if __name__ == "__main__":
    sys.exit(main())
