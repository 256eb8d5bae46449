"""Runs `python -m pretrain checkpoints RUN`: lists, verifies, compares or prunes a run's checkpoints, in one process."""

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

from pretrain.checkpoint import files
from pretrain.checkpoint.lock import acquire
from pretrain.checkpoint.pieces import get_kind, list_tensors, read_tensors
from pretrain.checkpoint.retention import Retention, get_score, list_saved
from pretrain.run.directory import CHECKPOINTS, TRAINER, checkpoint_name, list_checkpoints, step_of


def run(folder: Path, verify: bool, compared: Sequence[str] | None, keep: int | None) -> int:
    """Runs the command and returns its exit code. Without options it lists.

    Args:
        folder: the run directory.
        verify: read every file and report damage.
        compared: two checkpoints to compare, each a step of the run or a directory.
        keep: prune, and keep this many of the newest.
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
    """Prints a line for each checkpoint; returns 1 if `verify` finds damage, and otherwise 0."""
    pointed, damaged = files.read_pointer(folder), 0
    print(f"{'step':>9} {'epoch':>8} {'saved':16} {'MB':>9} {'ranks':>5} {'ZeRO':>4} {'top-1':>7}  state")
    for path in list_checkpoints(folder):
        faults = files.verify(path) if verify else []
        damaged += bool(faults)
        state = ("; ".join(faults) or "whole") if verify else ", ".join(sorted({get_kind(name) for name in _list_names(path)}))
        print(f"{_describe(path)}  {state}{'  <- latest' if pointed == path.name else ''}")
    return int(damaged > 0)


def _describe(path: Path) -> str:
    step = step_of(path)
    saved = time.strftime("%Y-%m-%d %H:%M", time.localtime(path.stat().st_mtime))
    size = sum(file.stat().st_size for file in path.iterdir()) / 1e6
    try:
        trainer = json.loads((path / TRAINER).read_bytes())
    except (OSError, ValueError):
        return f"{step:9} {'?':>8} {saved:16} {size:9.1f} {'?':>5} {'?':>4} {'?':>7}"
    top1 = get_score(trainer, "top1")
    return (
        f"{step:9} {trainer['epoch']:8.2f} {saved:16} {size:9.1f} {trainer['ranks']:5} {trainer['zero_stage']:4} "
        f"{'' if top1 is None else f'{top1:.2%}':>7}"
    )


def _list_names(path: Path) -> list[str]:
    """Returns the names of the tensors in a checkpoint; empty if they can't be read."""
    try:
        return list(list_tensors(path))
    except Exception:  # a damaged pickle raises errors of any kind; --verify reports the damage
        return []


def compare(one: Path, other: Path) -> int:
    """Prints the differences of two checkpoints by kind of tensor; returns 1 if they differ, else 0; ValueError if one is damaged."""
    for path in (one, other):
        if faults := files.verify(path):
            raise ValueError(f"checkpoint {path} can't be compared: {'; '.join(faults)}")
    kinds = sorted({get_kind(name) for path in (one, other) for name in list_tensors(path)})
    is_different = False
    for kind in kinds:  # one kind at a time, to limit the memory for a large model
        first, second = read_tensors(one, (kind,)), read_tensors(other, (kind,))
        common = [name for name in first if name in second and first[name].shape == second[name].shape]
        unlike = [name for name in common if not first[name].equal(second[name])]
        unmatched = (first | second).keys() - set(common)
        line = f"{kind:12} {len(common) - len(unlike)} of {len(first | second)} tensors are equal bit for bit"
        if unlike:
            distance = {name: float((first[name].double() - second[name].double()).abs().max()) for name in unlike}
            farthest = max(distance, key=distance.__getitem__)
            line += f"; the largest difference is {distance[farthest]:.3g}, in {farthest}"
        if unmatched:
            line += f"; {len(unmatched)} are in one checkpoint only or differ in shape, for example {min(unmatched)}"
        print(line)
        is_different |= bool(unlike or unmatched)
    print(f"{one} and {other} are {'different' if is_different else 'the same'}")
    return int(is_different)


def prune(run: Path, keep: int) -> int:
    """Removes the whole checkpoints that retention does not keep, but no damaged ones; ValueError if the run is in use."""
    if keep < 1:
        raise ValueError(f"--prune {keep} would remove the last checkpoint; keep 1 or more")
    lock = acquire(run, print)
    try:
        folder = run / CHECKPOINTS
        files.remove_leftovers(folder, print)
        newest = files.find_newest_whole(folder, print)
        assert newest is not None
        trainer = json.loads((newest / TRAINER).read_bytes())
        settings = trainer["config"]["run"]
        every = round(settings["keep_every"] * trainer["step"] / trainer["epoch"])
        retention = Retention(keep, every, settings["keep_best"])
        whole = [saved for saved in list_saved(folder, retention.best) if saved.path == newest or not files.verify(saved.path)]
        for path in retention.select_expired(whole, trainer["step"]):
            size = sum(file.stat().st_size for file in path.iterdir())
            files.remove(path)
            print(f"removed {path}, {size / 1e6:.1f} MB")
    finally:
        os.unlink(lock)
    return 0
