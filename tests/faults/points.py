"""Points at which a rank's process sends itself a signal.

A point wraps one function of the running code in the rank's own process, so the tested code has no hooks. The jobs (jobs.py) have four
steps an epoch, save after steps 2, 4, 6 and 7 and evaluate after 3, 6 and 7. The signal comes in the fifth step, when step 4 is on disk, or
in the save of step 4, or in the evaluation after step 6.
"""

import itertools
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MICRO_STEPS = 2  # in a step
FIFTH = 4 * MICRO_STEPS + 1  # the micro-step that is hit, counted from 0: the second one of the fifth step
SECOND_SAVE = 1


@dataclass(frozen=True)
class Fault:
    """Describes a signal that a rank sends to itself at a point."""

    point: str
    signal: signal.Signals
    run: Path


@dataclass(frozen=True)
class Point:
    rank: int  # that is hit
    resumes: int  # the step from which a job that was killed here resumes
    wrap: Callable[[Callable[[], None]], None]  # installs the hit


def inject(fault: Fault) -> None:
    """Makes this process send itself the signal at the point. For a process that ends with the job."""
    point = POINTS[fault.point]

    def hit() -> None:
        if point.resumes == 4:  # the save runs beside the training that is hit: which of the two is first must not be chance
            pointer, deadline = fault.run / "checkpoints" / "latest", time.monotonic() + 60
            while fault.point not in IN_THE_SAVE and not (pointer.exists() and pointer.read_text() == "step-000000004"):
                assert time.monotonic() < deadline, "step 4 was not saved"
                time.sleep(0.01)
        (fault.run / "hit").touch()
        os.kill(os.getpid(), fault.signal)
        if fault.signal == signal.SIGSTOP:
            time.sleep(5)  # another thread may be the first that it stops

    point.wrap(hit)


def _wrap(
    owner: Any, name: str, number: int, hit: Callable[[], None], after: bool = False, only: Callable[..., bool] | None = None
) -> None:
    """Hits before, or after, one call of a function; counted from 0, of those that `only` picks."""
    original, calls = getattr(owner, name), itertools.count()

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        due = (only is None or only(*args)) and next(calls) == number
        if due and not after:
            hit()
        result = original(*args, **kwargs)
        if due and after:
            hit()
        return result

    setattr(owner, name, wrapped)


def _loading(hit: Callable[[], None]) -> None:
    from data.loader.loaders import TrainLoader

    original = TrainLoader.__iter__

    def batches(self: Any) -> Iterator[Any]:
        for number, batch in enumerate(original(self)):
            if number == FIFTH:
                hit()
            yield batch

    TrainLoader.__iter__ = batches  # type: ignore[method-assign]


def _forward(hit: Callable[[], None]) -> None:
    from pretrain.model.van import VAN

    _wrap(VAN, "forward_head", FIFTH, hit, only=lambda model, *rest: model.training)


def _backward(hit: Callable[[], None]) -> None:
    from pretrain import train

    original, calls = train.mixed_cross_entropy, itertools.count()

    def loss(*args: Any) -> Any:
        found = original(*args)
        if next(calls) == FIFTH:
            found.register_hook(lambda gradient: hit())
        return found

    train.mixed_cross_entropy = loss


def _all_reduce(hit: Callable[[], None]) -> None:
    from pretrain.engine.batch_stats import BatchStats

    _wrap(BatchStats, "start_averaging", 4, hit, after=True)


def _optimizer(hit: Callable[[], None]) -> None:
    """After the update of the first group's weights, before that of their moving average."""
    import torch

    from pretrain import train

    original, steps = train.learning_rate, []

    def learning_rate(step: int, *args: Any) -> float:
        steps.append(step)
        return original(step, *args)

    train.learning_rate = learning_rate
    _wrap(torch, "_foreach_lerp_", 0, hit, only=lambda *args: steps[-1] == 4)


def _staging(hit: Callable[[], None]) -> None:
    from pretrain.checkpoint.staging import Staging

    original, calls = Staging.copy, itertools.count()

    def copy(self: Any) -> None:
        if next(calls) == SECOND_SAVE:
            for live, host in self._copies[: len(self._copies) // 2]:
                host.copy_(live)
            hit()
        original(self)

    Staging.copy = copy  # type: ignore[method-assign]


def _shard(hit: Callable[[], None]) -> None:
    from pretrain.checkpoint import files

    original, shards = files.write, itertools.count()

    def write(path: Path, content: Any) -> Any:
        if path.suffix == ".distcp" and next(shards) == SECOND_SAVE:
            original(path, content[: len(content) // 2])
            hit()
        return original(path, content)

    files.write = write


def _in_files(name: str, after: bool = False, only: Callable[..., bool] | None = None) -> Callable[[Callable[[], None]], None]:
    def wrap(hit: Callable[[], None]) -> None:
        from pretrain.checkpoint import files

        _wrap(files, name, SECOND_SAVE, hit, after, only)

    return wrap


def _pruning(hit: Callable[[], None]) -> None:
    import shutil

    original = shutil.rmtree

    def rmtree(path: Path, *args: Any, **kwargs: Any) -> None:
        if ".removed-" in Path(path).name:
            next(Path(path).iterdir()).unlink()
            hit()
        original(path, *args, **kwargs)

    shutil.rmtree = rmtree  # type: ignore[assignment]


def _evaluation(hit: Callable[[], None]) -> None:
    from pretrain.evaluation import in_training

    original, calls = in_training.evaluate, itertools.count()

    def evaluate(model: Any, *rest: Any) -> Any:
        if next(calls) == 2:  # of the weights after step 6; after step 3 the weights and their average are evaluated
            handle = model.register_forward_pre_hook(lambda *arguments: (handle.remove(), hit())[0])
        return original(model, *rest)

    in_training.evaluate = evaluate


POINTS = {
    "loading a batch": Point(1, 4, _loading),
    "forward": Point(1, 4, _forward),
    "backward": Point(1, 4, _backward),
    "all-reduce": Point(1, 4, _all_reduce),
    "optimizer's step": Point(1, 4, _optimizer),
    "staging a save": Point(1, 2, _staging),
    "half-way through a shard": Point(1, 2, _shard),
    "before the manifest": Point(0, 2, _in_files("commit")),
    "before the rename": Point(0, 2, _in_files("sync", after=True, only=lambda path: path.name.startswith(".partial"))),
    "before the pointer": Point(0, 4, _in_files("write_pointer")),
    "after the pointer": Point(0, 4, _in_files("write_pointer", after=True)),
    "pruning": Point(0, 4, _pruning),
    "evaluation": Point(1, 4, _evaluation),
}
IN_THE_SAVE = ("before the pointer", "after the pointer", "pruning")
