"""One process of a job, or what a run made: train, config, status, evaluate, export, checkpoints.

python -m pretrain train CONFIG [--force-config] key=value …
    one rank of a job, with RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT set, or the only one, without them; `python -m launch`
    starts one for each GPU
python -m pretrain config CONFIG key=value … | --list [PATTERN] | --markdown
    the settings of a job, each with the place that set it; or all settings: type, default, meaning, rule on resume
python -m pretrain status [RUN …] [--follow]
    how a run stands, or as a table all runs below runs/ or below the folders that are named; needs no GPU and no job of its own
python -m pretrain evaluate SOURCE [CONFIG] [key=value …] [--weights raw|ema] [--probe N]
    top-1, top-5 and loss on data.val of a run, a checkpoint, or weights in any format that a job can start from; CONFIG says by what to
    judge them, and a run needs none. --probe: what the backbone's features are good for, by k-NN and a linear classifier on at most N
    images a class of data.train. One process, or all ranks of a job: python -m launch evaluate …
python -m pretrain export RUN
    a finished run's weights to RUN/weights, in the formats of run.export
python -m pretrain export RUN_OR_CHECKPOINT --format official|timm|mmpretrain|mmseg|hf --out PATH
    [--weights raw|ema] [--dtype fp32|bf16|fp16] [--features-only] [--license TEXT] [--force]
python -m pretrain checkpoints RUN [--verify | --compare A B | --prune KEEP]
    lists a run's checkpoints; reads every byte; compares two bit by bit; removes those that need not stay
"""

import argparse
import faulthandler
import gc
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import data
import pretrain
from data.common.command_line import is_override, parse
from pretrain.run.exit_codes import EXIT_CONFIG

_EXPORTS = ("format", "out", "weights", "dtype", "features_only", "license", "force")  # options of an export


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m pretrain", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    train_parser = commands.add_parser("train", help="one rank of a training job")
    train_parser.add_argument("config", type=Path)
    train_parser.add_argument("overrides", nargs="*", metavar="key=value")
    train_parser.add_argument("--force-config", action="store_true", help="go on with a run though its settings have changed")
    config_parser = commands.add_parser("config", help="the settings of a job, or all settings that there are")
    config_parser.add_argument("config", type=Path, nargs="?", metavar="CONFIG")
    config_parser.add_argument("overrides", nargs="*", metavar="key=value")
    config_parser.add_argument("--list", nargs="?", const="", metavar="PATTERN", help="all settings whose key or meaning contains PATTERN")
    config_parser.add_argument("--markdown", action="store_true", help="docs/configuration.md")
    status_parser = commands.add_parser("status", help="how runs stand")
    status_parser.add_argument("runs", nargs="*", type=Path, default=[Path("runs")], metavar="RUN")
    status_parser.add_argument("--follow", action="store_true", help="go on showing until Ctrl-C")
    evaluate_parser = commands.add_parser("evaluate", help="accuracy of a run, a checkpoint or a weights file on data.val")
    evaluate_parser.add_argument("source", type=Path, metavar="SOURCE")
    evaluate_parser.add_argument("overrides", nargs="*", metavar="CONFIG key=value")
    evaluate_parser.add_argument("--probe", type=int, metavar="N", help="of the features, by at most N images a class of data.train")
    export_parser = commands.add_parser("export", help="weights for other projects")
    export_parser.add_argument("source", type=Path, metavar="RUN_OR_CHECKPOINT")
    export_parser.add_argument("--format", choices=("official", "timm", "mmpretrain", "mmseg", "hf"))
    export_parser.add_argument("--out", type=Path)
    export_parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32")
    export_parser.add_argument("--features-only", action="store_true", help="without the head")
    export_parser.add_argument("--license", default="not stated", help="for the model card")
    export_parser.add_argument("--force", action="store_true", help="replace what is there")
    for sub in (evaluate_parser, export_parser):
        sub.add_argument("--weights", choices=("raw", "ema"), default="raw", help="the weights, or their moving average")
    checkpoints_parser = commands.add_parser("checkpoints", help="lists, verifies, compares and prunes a run's checkpoints")
    checkpoints_parser.add_argument("run", type=Path, metavar="RUN")
    wish = checkpoints_parser.add_mutually_exclusive_group()
    wish.add_argument("--verify", action="store_true", help="read every byte; exit code 1 where one is damaged")
    wish.add_argument(
        "--compare", nargs=2, metavar=("A", "B"), help="each a step of RUN or a checkpoint's directory; exit code 1 where they differ"
    )
    wish.add_argument(
        "--prune", type=int, metavar="KEEP", help="keep so many of the newest, and those that the run's settings keep for good"
    )
    args = parse(parser)
    if args.command == "config" and (args.config is not None) + (args.list is not None) + args.markdown != 1:
        config_parser.error("give CONFIG, --list or --markdown")
    if args.command == "export" and (args.format is None or args.out is None):
        alone = [f"--{name.replace('_', '-')}" for name in _EXPORTS if getattr(args, name) != export_parser.get_default(name)]
        if alone:
            parser.error(f"{', '.join(alone)}: to export with options takes --format and --out; without any, RUN's own formats are written")
    try:
        run = {
            "train": _train, "config": _config, "status": _status, "evaluate": _evaluate, "export": _export, "checkpoints": _checkpoints,
        }[args.command]  # fmt: skip
        return run(args)
    except ValueError as error:
        if not raised_here(error):
            raise
        # What a user can mend: a message, no traceback.
        if _falls_to_us(error):
            rank = int(os.environ.get("RANK", 0))
            print(f"error on rank {rank}: {error}" if rank else f"error: {error}", file=sys.stderr, flush=True)
        return EXIT_CONFIG


def _falls_to_us(error: ValueError) -> bool:
    """Whether this rank is the one to tell of an error: what all ranks have found is told once, what one has found by that one."""
    from data.common.config_files import ConfigError

    if isinstance(error, ConfigError):  # all read the same settings
        return int(os.environ.get("RANK", 0)) == 0
    from pretrain.monitor.faults import is_first_to_report

    return is_first_to_report(str(error))


def raised_here(error: ValueError) -> bool:
    """Whether this project's own code raised it: there a ValueError tells a user what to mend, from a library it is a bug."""
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    return any(raised_in.is_relative_to(Path(package.__file__).parent) for package in (data, pretrain))  # type: ignore[arg-type]


@contextmanager
def lasting_imports() -> Iterator[None]:
    """Keeps the garbage collector away from what is imported inside, for good: torch and all that comes with it are 700,000 objects that
    stay. Looking through them takes a quarter of the import, half a second of a rank whenever it happens while training, and two
    seconds at the end."""
    gc.disable()
    yield
    gc.freeze()
    gc.enable()


def _train(args: argparse.Namespace) -> int:
    # A USR1 in the minutes of a start would end the job for good: it waits for train's Requests. TERM doesn't: it ends the others
    # of a rank that failed.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    faulthandler.enable()
    from pretrain import config as settings

    config = settings.load(args.config, args.overrides)
    with lasting_imports():
        from pretrain.engine import distributed
        from pretrain.train import train

    code = train(config, force_config=args.force_config)
    distributed.stop()
    return code


def _config(args: argparse.Namespace) -> int:
    from pretrain.config_command import listing, markdown, resolved

    if args.markdown:
        print(markdown(), end="")
    else:
        print(*(listing(args.list) if args.list is not None else resolved(args.config, args.overrides)), sep="\n")
    return 0


def _status(args: argparse.Namespace) -> int:
    from pretrain.run.status import status

    return status(args.runs, args.follow)


def _evaluate(args: argparse.Namespace) -> int:
    with lasting_imports():
        from pretrain.engine import distributed
        from pretrain.evaluation.command import print_evaluation

    config = Path(args.overrides.pop(0)) if args.overrides and not is_override(args.overrides[0]) else None
    print_evaluation(args.source, config, args.overrides, average=args.weights == "ema", probe=args.probe)
    distributed.stop()
    return 0


def _export(args: argparse.Namespace) -> int:
    with lasting_imports():
        from pretrain.weights.export import export, export_run

    if args.format is None:
        export_run(args.source)
        return 0
    options = {"dtype": args.dtype, "features_only": args.features_only, "license": args.license, "force": args.force}
    print(export(args.source, args.format, args.out, average=args.weights == "ema", **options))
    return 0


def _checkpoints(args: argparse.Namespace) -> int:
    from pretrain.checkpoint import command

    return command.run(args.run, args.verify, args.compare, args.prune)


if __name__ == "__main__":
    sys.exit(main())
