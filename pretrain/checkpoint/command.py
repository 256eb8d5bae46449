"""What `python -m pretrain checkpoints RUN` does: lists a run's checkpoints, verifies, compares and prunes them, in one process."""

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pretrain.checkpoint import files
from pretrain.checkpoint.lock import acquire
from pretrain.checkpoint.pieces import kind_of, read, saved_tensors
from pretrain.checkpoint.retention import Retention, saved_in, score_of
from pretrain.run.directory import CHECKPOINTS, TRAINER, checkpoint_name, list_checkpoints, step_of


def run(folder: Path, verify: bool, compared: Sequence[str] | None, keep: int | None) -> int:
    """Returns the exit code. Without a wish it lists.

    Args:
        folder: of the run.
        compared: two checkpoints, each a step of the run or a directory.
        keep: how many of the newest to keep when pruning.

    Raises:
        ValueError: no checkpoints there, none is whole, or the run is in use and can't be pruned.
    """
    checkpoints = folder / CHECKPOINTS
    if not list_checkpoints(checkpoints):
        raise ValueError(f"there are no checkpoints in {checkpoints}")
    if compared:
        return compare(*(checkpoints / checkpoint_name(int(name)) if name.isdigit() else Path(name) for name in compared))
    if keep is not None:
        return prune(folder, keep)
    return show(checkpoints, verify)


def show(folder: Path, verify: bool) -> int:
    """Prints a line for each checkpoint; returns 1 when one that was verified is damaged."""
    pointed, damaged = files.pointed(folder), 0
    print(f"{'step':>9} {'epoch':>8} {'saved':16} {'MB':>9} {'ranks':>5} {'ZeRO':>4} {'top-1':>7}  state")
    for path in list_checkpoints(folder):
        faults = files.verify(path) if verify else []
        damaged += bool(faults)
        state = ("; ".join(faults) or "whole") if verify else ", ".join(sorted({kind_of(name) for name in _names(path)}))
        print(f"{_row(path)}  {state}{'  <- latest' if pointed == path.name else ''}")
    return int(damaged > 0)


def _row(path: Path) -> str:
    step = step_of(path)
    saved = time.strftime("%Y-%m-%d %H:%M", time.localtime(path.stat().st_mtime))
    size = sum(file.stat().st_size for file in path.iterdir()) / 1e6
    try:
        trainer = json.loads((path / TRAINER).read_bytes())
    except (OSError, ValueError):
        return f"{step:9} {'?':>8} {saved:16} {size:9.1f} {'?':>5} {'?':>4} {'?':>7}"
    top1 = score_of(trainer, "top1")
    return (
        f"{step:9} {trainer['epoch']:8.2f} {saved:16} {size:9.1f} {trainer['ranks']:5} {trainer['zero_stage']:4} "
        f"{'' if top1 is None else f'{top1:.2%}':>7}"
    )


def _names(path: Path) -> list[str]:
    """Of the tensors in a checkpoint; none where it can't be read."""
    try:
        return list(saved_tensors(path))
    except Exception:  # a damaged pickle raises all kinds of errors; --verify says what is wrong
        return []


def compare(one: Path, other: Path) -> int:
    """Prints how two checkpoints differ, by kind of tensor; returns 1 when they do.

    Raises:
        ValueError: one is damaged or is none.
    """
    for path in (one, other):
        if faults := files.verify(path):
            raise ValueError(f"checkpoint {path} can't be compared: {'; '.join(faults)}")
    names: list[dict[str, Any]] = [saved_tensors(path) for path in (one, other)]
    differ = False
    for kind in sorted({kind_of(name) for of_one in names for name in of_one}):
        # Kind by kind: all of a large model's at once would take much memory.
        first, second = read(one, (kind,)), read(other, (kind,))
        alone = first.keys() ^ second.keys()
        common = [name for name in first if name in second and first[name].shape == second[name].shape]
        unlike = [name for name in common if not first[name].equal(second[name])]
        alone |= {name for name in first if name in second} - set(common)
        line = f"{kind:12} {len(common) - len(unlike)} of {len(first | second)} tensors are the same bits"
        if unlike:
            distance = {name: float((first[name].double() - second[name].double()).abs().max()) for name in unlike}
            farthest = max(distance, key=distance.__getitem__)
            line += f"; the greatest difference is {distance[farthest]:.3g}, in {farthest}"
        if alone:
            line += f"; {len(alone)} are in one alone or of another shape, as {min(alone)}"
        print(line)
        differ |= bool(unlike or alone)
    print(f"{one} and {other} are {'different' if differ else 'the same'}")
    return int(differ)


def prune(run: Path, keep: int) -> int:
    """Removes whole checkpoints that need not stay; what is damaged is left for a person to look at.

    Raises:
        ValueError: the run is in use, no checkpoint is whole, or `keep` is less than 1.
    """
    if keep < 1:
        raise ValueError(f"--prune {keep} would remove the last checkpoint; keep 1 or more")
    lock = acquire(run, print)
    try:
        folder = run / CHECKPOINTS
        files.remove_leftovers(folder, print)
        newest = files.newest_whole(folder, print)
        assert newest is not None
        trainer = json.loads((newest / TRAINER).read_bytes())
        chosen = trainer["config"]["run"]
        every = round(chosen["keep_every"] * trainer["step"] / trainer["epoch"])
        retention = Retention(keep, every, chosen["keep_best"])
        whole = [saved for saved in saved_in(folder, retention.best) if saved.path == newest or not files.verify(saved.path)]
        for path in retention.let_go(whole, trainer["step"]):
            size = sum(file.stat().st_size for file in path.iterdir())
            files.remove(path)
            print(f"removed {path}, {size / 1e6:.1f} MB")
    finally:
        os.unlink(lock)
    return 0
