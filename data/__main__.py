"""Command line of the data package.

    python -m data pack SOURCE OUT                      packs images into shards: OUT/train, and with --holdout OUT/val
    python -m data synthesize OUT                       draws a small dataset: OUT/train and OUT/val
    python -m data index SHARDS                         makes a dataset of shards that other tools wrote, in place
    python -m data verify FOLDER                        prints one line per fault; exit status 1 if there is one
    python -m data stats FOLDER                         prints samples, classes and sizes; --out writes plots and a contact sheet
    python -m data order CONFIG --epoch 3 --steps 0:4   prints each sample that a job takes in these steps, with its augmentation
    python -m data preview CONFIG --out grid.png        draws the images that a job's network receives

An error that the user can correct ends the command with one line on stderr and exit status 2.
"""

import argparse
import os
import sys
from pathlib import Path

from data.augment.recipe import Recipe
from data.common.command_line import parse
from data.dataset.index import open_index
from data.inspect.parameters import format_slots, list_parameters
from data.inspect.report import format_stats, write_report
from data.loader.order import make_sample_order
from data.packing.adopt import index_shards
from data.packing.images import MAX_PIXELS, ImageRules
from data.packing.labels import read_classes
from data.packing.pack import MAX_REJECTED, pack
from data.packing.plan import Settings
from data.packing.verify import verify
from data.settings import load_job
from data.synthetic.synthesize import SETS, synthesize


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m data", description="Packs, checks and inspects image datasets.")
    commands = parser.add_subparsers(dest="command", required=True)

    command = commands.add_parser("pack", help="Pack images into shards; an interrupted packing resumes.")
    _add_pack_options(command)
    command.set_defaults(run=_pack)

    command = commands.add_parser("synthesize", help="Draw a small dataset, OUT/train and OUT/val.")
    command.add_argument("out", type=Path, help="An empty or new folder.")
    command.add_argument("--draw", choices=SETS, default="patterns", help="The set of classes (default %(default)s).")
    command.add_argument("--classes", type=int, metavar="N", help="Draw only the first N classes of the set.")
    command.add_argument("--train", type=int, default=1800, help="Number of training images (default %(default)s).")
    command.add_argument("--val", type=int, default=300, help="Number of validation images (default %(default)s).")
    command.add_argument("--seed", type=int, default=0, help="Seed of the drawings (default %(default)s).")
    command.add_argument("--photographs", action="store_true", help="Draw images of 500 x 375 pixels and about 110 kB.")
    command.set_defaults(run=_synthesize)

    command = commands.add_parser("index", help="Make a dataset of shards that other tools wrote, in place; no tar is changed.")
    command.add_argument("folder", type=Path, metavar="SHARDS", help="The folder of the .tar files.")
    command.add_argument("--classes", type=Path, metavar="FILE", help="Class names in label order: a JSON list, or one name per line.")
    command.add_argument("--label", metavar="FIELD", help="Take labels or class names from this .json field (default: labels in .cls).")
    command.add_argument("--force", action="store_true", help="Replace a different dataset in the folder.")
    _add_workers(command)
    command.set_defaults(run=_index)

    command = commands.add_parser("verify", help="Check names, sizes and headers of a dataset.")
    _add_dataset(command)
    command.add_argument("--deep", action="store_true", help="Also read every byte: checksums, labels, and every image decoded.")
    _add_workers(command)
    command.set_defaults(run=_verify)

    command = commands.add_parser("stats", help="Describe a dataset.")
    _add_dataset(command)
    command.add_argument("--out", type=Path, metavar="FILE", help="Write a .png or .html with plots and a contact sheet.")
    command.add_argument("--seed", type=int, default=0, help="Seed of the contact sheet's random samples (default %(default)s).")
    command.set_defaults(run=_stats)

    command = commands.add_parser("order", help="Print each sample that a job takes, with its augmentation.")
    _add_job(command)
    command.set_defaults(run=_order)

    command = commands.add_parser("preview", help="Draw augmented and mixed batches and the evaluation view of a job.")
    _add_job(command)
    command.add_argument("--out", type=Path, required=True, metavar="FILE", help="The .png to write.")
    command.add_argument("--images", type=int, default=16, metavar="N", help="Images per step (default %(default)s).")
    command.set_defaults(run=_preview)
    return parser


def _add_pack_options(command: argparse.ArgumentParser) -> None:
    def add(name: str, text: str, **options: object) -> None:
        command.add_argument(name, help=text, **options)  # type: ignore[arg-type]

    add("source", "Class folders, one tar per class, a tar of class tars, or WebDataset shards.", type=Path)
    add("out", "The output folder, with one folder per split.", type=Path)
    add("--split", "The split's folder in OUT (default %(default)s).", default="train")
    add("--name", "Name the shards NAME-SPLIT-000000.tar (default: the last part of OUT).")
    add("--classes", "Classes in label order: classes.json, one name per line, or a packed folder.", type=Path, metavar="FILE")
    add("--labels", "Labels of images without class folders: a CSV, or the development kit's list.", type=Path, metavar="FILE")
    add("--holdout", "Images per class, or fraction of all images, to hold out for OUT/val.", type=_parse_amount, metavar="N")
    add("--shard-mb", "Size of a shard (default %(default)s).", type=float, metavar="MIB", default=Settings.shard_bytes / 2**20)
    add("--seed", "Seed of the sample order and of the holdout (default %(default)s).", type=int, default=0)
    add("--max-side", "Shrink images whose longer side exceeds this.", type=int, metavar="PX")
    add("--resize-short", "Shrink images whose shorter side exceeds this.", type=int, metavar="PX")
    add("--keep-original", "Store files byte for byte if DALI can read them.", action="store_true")
    add("--max-pixels", "Reject images with more pixels, by their header (default %(default)s).", type=int, metavar="N", default=MAX_PIXELS)
    add("--max-rejected", "Images, or fraction of all images, that may be rejected (default %(default)s).",
        type=_parse_amount, metavar="N", default=MAX_REJECTED)  # fmt: skip
    _add_workers(command)
    add("--part", "Pack one of N parts of the shards, from 0/N to N-1/N.", type=_parse_part, metavar="I/N", default=(0, 1))
    add("--merge", "Pack nothing; make the dataset from the shards that all parts have packed.", action="store_true")


def _add_dataset(command: argparse.ArgumentParser) -> None:
    command.add_argument("folder", help="The dataset's folder or URL.")
    command.add_argument("--cache", metavar="FOLDER", help="Keep local copies of files from a URL here.")


def _add_job(command: argparse.ArgumentParser) -> None:
    command.add_argument("config", type=Path, metavar="CONFIG", help="A job's settings, such as configs/van_b3_in22k.yaml.")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="Settings that override the file's: seed, global_batch, data.…")
    command.add_argument("--epoch", type=int, default=0, help="Epoch, counted from 0 (default %(default)s).")
    command.add_argument(
        "--steps", type=_parse_steps, default=range(1), metavar="A:B", help="Steps A to B - 1 of the epoch, or the first B (default 1)."
    )


def _add_workers(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--workers", type=int, default=len(os.sched_getaffinity(0)), help="Number of worker processes (default %(default)s)."
    )


def _parse_amount(text: str) -> int | float:
    """Parses a whole number, or a fraction in [0, 1)."""
    try:
        amount = float(text) if "." in text else int(text)
    except ValueError:
        amount = -1
    if amount < 0 or (isinstance(amount, float) and amount >= 1):
        raise argparse.ArgumentTypeError(f"{text}: expected a number such as 50, or a fraction between 0 and 1 such as 0.01")
    return amount


def _parse_part(text: str) -> tuple[int, int]:
    number, slash, count = text.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise argparse.ArgumentTypeError(f"{text}: expected I/N, from 0/N to N-1/N")
    return int(number), int(count)


def _parse_steps(text: str) -> range:
    first, colon, last = text.rpartition(":")
    first = first if colon else "0"
    if not (first.isdecimal() and last.isdecimal() and int(first) < int(last)):
        raise argparse.ArgumentTypeError(f"{text}: expected A:B, two step numbers, the smaller first, or a number of steps")
    return range(int(first), int(last))


def main(arguments: list[str] | None = None) -> int:
    parser = build_parser()
    args = parse(parser, arguments)
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # keys may have bytes that are not UTF-8
    try:
        return args.run(args) or 0
    except BrokenPipeError:  # the reader of the output, such as head, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print(f"{parser.prog} {args.command}: stopped", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"{parser.prog} {args.command}: {error}", file=sys.stderr)
        return 2


def _pack(args: argparse.Namespace) -> None:
    settings = Settings(
        split=args.split,
        name=args.name or args.out.absolute().name,
        shard_bytes=round(args.shard_mb * 2**20),
        seed=args.seed,
        holdout=args.holdout,
        classes=read_classes(args.classes) if args.classes else None,
        labels=args.labels,
        rules=ImageRules(
            keep_original=args.keep_original, max_side=args.max_side, resize_short=args.resize_short, max_pixels=args.max_pixels
        ),
    )
    indexes = pack(
        args.source, args.out, settings, max_rejected=args.max_rejected, workers=args.workers, part=args.part, merge_only=args.merge
    )
    for index in indexes:
        print(format_stats(index))


def _synthesize(args: argparse.Namespace) -> None:
    indexes = synthesize(
        args.out, draw=args.draw, classes=args.classes, train=args.train, val=args.val, seed=args.seed, photographs=args.photographs
    )
    for index in indexes:
        print(format_stats(index))


def _index(args: argparse.Namespace) -> None:
    classes = read_classes(args.classes) if args.classes else None
    print(format_stats(index_shards(args.folder, classes=classes, field=args.label, processes=args.workers, force=args.force)))


def _verify(args: argparse.Namespace) -> int:
    return 1 if verify(args.folder, args.cache, deep=args.deep, processes=args.workers) else 0


def _stats(args: argparse.Namespace) -> None:
    index = open_index(args.folder, args.cache)
    print(format_stats(index))
    if args.out:
        write_report(index, args.out, seed=args.seed)


def _order(args: argparse.Namespace) -> None:
    job = load_job(args.config, args.overrides)
    index = open_index(job.data.train, job.data.cache)
    order, recipe = make_sample_order(index, job.data, seed=job.seed, global_batch=job.global_batch), Recipe(job.seed, job.data)
    for step in args.steps:
        ids = order.batch(args.epoch, step)
        parameters = list_parameters(recipe, args.epoch, ids, order.copies, index)
        print(*format_slots(args.epoch, step, ids, parameters, index), sep="\n")


def _preview(args: argparse.Namespace) -> None:
    from data.inspect.preview import write_preview  # imports torch and DALI

    write_preview(load_job(args.config, args.overrides), args.out, epoch=args.epoch, steps=args.steps, images=args.images)


if __name__ == "__main__":
    sys.exit(main())
