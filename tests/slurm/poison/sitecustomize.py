"""Kills a rank in a step, as a broken library would: POISON="rank 1, step 7". Python imports this by its name when it starts."""

import importlib.abc
import importlib.machinery
import os
import re
import signal
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

RANK, STEP = map(int, re.findall(r"\d+", os.environ["POISON"]))


class Poisoned(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Loads pretrain.optim with a learning rate that kills at STEP: train.py asks for it at the beginning of each step."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name != "pretrain.optim":
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
        rate = module.learning_rate

        def learning_rate(step: int, *args: Any) -> float:
            if step == STEP:
                os.kill(os.getpid(), signal.SIGSEGV)
            return rate(step, *args)

        module.learning_rate = learning_rate


if os.environ.get("RANK") == str(RANK):
    sys.meta_path.insert(0, Poisoned())
