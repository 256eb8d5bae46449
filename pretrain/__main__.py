"""Runs the commands of pretraining; `python -m pretrain COMMAND --help` lists the options of a command.

train CONFIG key=value …              one rank of a training job; `python -m launch` starts one for each GPU
config CONFIG key=value …             the settings of a job and where each was set; --list and --markdown show all settings
status [RUN …]                        state of one run, or a table of all runs below runs/ or below the given folders
evaluate SOURCE [CONFIG] key=value …  top-1, top-5 and loss on data.val, or k-NN and linear-probe accuracy
export RUN                            a finished run's weights to RUN/weights, in the formats of run.export
export RUN --format F --out PATH      the weights of a run or a checkpoint in one format
checkpoints RUN                       lists, verifies, compares or prunes the checkpoints of a run
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
from pretrain.model.formats import FORMATS
from pretrain.run.exit_codes import EXIT_CONFIG


def main() -> int:
    args = parse_arguments()
    try:
        return args.run(args)
    except ValueError as error:
        if not _is_for_user(error):
            raise
        rank = int(os.environ.get("RANK", 0))
        if _should_report(error, rank):
            print(f"error on rank {rank}: {error}" if rank else f"error: {error}", file=sys.stderr, flush=True)
        return EXIT_CONFIG


def parse_arguments() -> argparse.Namespace:
    """Parses the command line; `run` of the result is the function of the command."""
    parser = argparse.ArgumentParser(prog="python -m pretrain", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="Run one rank of a training job.")
    train.add_argument("config", type=Path, metavar="CONFIG", help="YAML file of the job's settings")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace those of CONFIG")
    train.add_argument("--force-config", action="store_true", help="resume the run although its settings have changed")

    config = commands.add_parser("config", help="Show the settings of a job, or all settings.")
    config.add_argument("config", type=Path, nargs="?", metavar="CONFIG", help="YAML file of the job's settings")
    config.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace those of CONFIG")
    config.add_argument("--list", nargs="?", const="", metavar="PATTERN", help="all settings whose key or meaning contains PATTERN")
    config.add_argument("--markdown", action="store_true", help="print docs/configuration.md")

    status = commands.add_parser("status", help="Show the state of runs; needs no GPU and does not contact the jobs.")
    status.add_argument("runs", nargs="*", type=Path, default=[Path("runs")], metavar="RUN", help="run directory, or folder of runs")
    status.add_argument("--follow", action="store_true", help="repeat until Ctrl-C")

    evaluate = commands.add_parser("evaluate", help="Evaluate a run, a checkpoint or a weights file on data.val.")
    evaluate.add_argument("source", type=Path, metavar="SOURCE", help="run, checkpoint, or weights in any format that a job can start from")
    evaluate.add_argument("overrides", nargs="*", metavar="CONFIG key=value", help="settings of the evaluation; a run needs no CONFIG")
    evaluate.add_argument("--probe", type=int, metavar="N", help="k-NN and linear-probe accuracy from N images a class of data.train")

    export = commands.add_parser("export", help="Write weights in the formats that other projects load.")
    export.add_argument("source", type=Path, metavar="RUN", help="run directory, or with --format also a checkpoint")
    export.add_argument("--format", choices=FORMATS, help="timm exists for every model, the others for VAN")
    export.add_argument("--out", type=Path, metavar="PATH", help="file or folder to write")
    export.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="type of the weights")
    export.add_argument("--features-only", action="store_true", help="leave the head out")
    export.add_argument("--license", default="not stated", metavar="TEXT", help="license in the model card")
    export.add_argument("--force", action="store_true", help="replace an existing export")
    for command in (evaluate, export):
        command.add_argument("--weights", choices=("raw", "ema"), default="raw", help="the weights or their moving average")

    checkpoints = commands.add_parser("checkpoints", help="List, verify, compare or prune the checkpoints of a run.")
    checkpoints.add_argument("folder", type=Path, metavar="RUN")
    action = checkpoints.add_mutually_exclusive_group()
    action.add_argument("--verify", action="store_true", help="read every byte; exit code 1 if a checkpoint is damaged")
    action.add_argument("--compare", nargs=2, metavar=("A", "B"), help="two steps of RUN, or paths; exit code 1 if they differ")
    action.add_argument("--prune", type=int, metavar="KEEP", help="keep the KEEP newest, and those that the run's settings keep for good")

    functions = {train: _train, config: _config, status: _status, evaluate: _evaluate, export: _export, checkpoints: _checkpoints}
    for command, function in functions.items():
        command.set_defaults(run=function)
    args = parse(parser)
    if args.run is _config and (args.config is not None) + (args.list is not None) + args.markdown != 1:
        config.error("give CONFIG, --list or --markdown")
    if args.run is _export and (args.format is None or args.out is None):
        _reject_options(args, export)
    return args


def _reject_options(args: argparse.Namespace, export: argparse.ArgumentParser) -> None:
    """Ends with a usage error if an export without --format and --out has other options."""
    names = ("format", "out", "weights", "dtype", "features_only", "license", "force")
    given = [f"--{name.replace('_', '-')}" for name in names if getattr(args, name) != export.get_default(name)]
    if given:
        export.error(f"{', '.join(given)}: options need both --format and --out; without options, RUN's own formats are written")


def _should_report(error: ValueError, rank: int) -> bool:
    """Returns whether this rank prints an error: rank 0 for wrong settings, which all ranks read; otherwise the first rank to fail."""
    from data.common.config_files import ConfigError

    if isinstance(error, ConfigError):
        return rank == 0
    from pretrain.monitor.damage import is_first_to_report

    return is_first_to_report(str(error))


def _is_for_user(error: ValueError) -> bool:
    """Returns whether this project raised the error: its ValueErrors are for users, those of libraries are bugs."""
    file = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    return any(file.is_relative_to(Path(package.__file__).parent) for package in (data, pretrain))  # type: ignore[arg-type]


@contextmanager
def lasting_imports() -> Iterator[None]:
    """Excludes the objects that the block imports from garbage collection.

    torch and its dependencies create 700,000 permanent objects. Traversing them would take a quarter of the import time, half a second in
    each collection during training, and two seconds at exit.
    """
    gc.disable()
    yield
    gc.freeze()
    gc.enable()


def _train(args: argparse.Namespace) -> int:
    # USR1 would kill a rank that has no handler yet; blocked, it stays pending until train() handles it. TERM is not blocked: a launcher
    # uses it to end the other ranks when one has failed.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    faulthandler.enable()
    from pretrain import config as settings

    config = settings.load(args.config, args.overrides)
    with lasting_imports():
        from pretrain.engine import distributed
        from pretrain.train import Trainer

    code = Trainer(config, args.force_config).train()
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

    return command.run(args.folder, args.verify, args.compare, args.prune)


if __name__ == "__main__":
    sys.exit(main())
