"""Breaks a job from outside, by the variable POISON: Python imports a module of this name when it starts.

POISON="rank 1, step 7"      the rank dies in that step, as with a broken library
POISON="stopped on n1"       preflight stops responding on that node, as if the node hangs
POISON="slow twice"          a step takes three seconds more, until the job has been restarted twice
"""

import importlib.abc
import importlib.machinery
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class Changed(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Loads a module and changes it."""

    def __init__(self, name: str, change: Callable[[Any], None]):
        self._name, self._change = name, change

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name != self._name:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        assert spec is not None
        assert spec.loader is not None
        self._loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        self._change(module)


def die_in_step(optim: Any) -> None:
    """train.py asks for the learning rate at the beginning of each step."""
    rate = optim.learning_rate

    def learning_rate(step: int, *args: Any) -> float:
        if step == number:
            os.kill(os.getpid(), signal.SIGSEGV)
        return rate(step, *args)

    optim.learning_rate = learning_rate


def take_three_seconds(optim: Any) -> None:
    rate = optim.learning_rate

    def learning_rate(*args: Any) -> float:
        time.sleep(3)
        return rate(*args)

    optim.learning_rate = learning_rate


def stop_in_inspection(node: Any) -> None:
    node.Inspection.run = lambda *args: os.kill(os.getpid(), signal.SIGSTOP)


if found := re.fullmatch(r"rank (\d+), step (\d+)", os.environ["POISON"]):
    rank, number = found[1], int(found[2])
    if os.environ.get("RANK") == rank:
        sys.meta_path.insert(0, Changed("pretrain.engine.optim", die_in_step))
elif os.environ["POISON"] == "slow twice":
    if int(os.environ.get("SLURM_RESTART_COUNT", 0)) < 2:
        sys.meta_path.insert(0, Changed("pretrain.engine.optim", take_three_seconds))
elif os.environ["POISON"] == f"stopped on {os.environ.get('SLURMD_NODENAME')}":
    sys.meta_path.insert(0, Changed("launch.preflight.node", stop_in_inspection))
