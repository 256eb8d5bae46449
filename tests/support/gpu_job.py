"""A job on a GPU that computes nothing (tests/support/idle_gpu), in a process that sees one.

    python -m tests.support.gpu_job CONFIG key=value …

DALI, which such a GPU is not enough for, makes batches on the CPU. Prints a line of JSON for each step: in
which functions of the project the host has waited for the device, and how many kernels and graphs it has launched.
"""

import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from data.common.placement import Placement
from data.dataset.index import Index
from data.loader.loaders import TrainLoader
from data.loader.order import SampleOrder
from data.settings import DataConfig
from pretrain import config as settings
from pretrain import train as training
from tests.support import REPOSITORY, idle_gpu

ROOT = str(REPOSITORY)


class FromCpu(TrainLoader):
    def __init__(self, index: Index, order: SampleOrder, settings: DataConfig, placement: Placement, **options: Any) -> None:
        super().__init__(index, order, settings, replace(placement, device=torch.device("cpu")), **options)
        self._to = placement.device

    def __iter__(self) -> Iterator[Any]:
        for batch in super().__iter__():
            images, labels = (tensor.pin_memory().to(self._to, non_blocking=True) for tensor in (batch.images, batch.labels))
            yield replace(batch, images=images.contiguous(memory_format=torch.channels_last), labels=labels)


def main() -> None:
    gpu = idle_gpu.IdleGpu()
    idle_gpu.skip_trials()
    torch._tensor_str._str = lambda *_, **__: "a tensor"  # type: ignore[attr-defined]  # DeepSpeed would show numbers, and there are none
    training.TrainLoader = FromCpu  # type: ignore[misc]
    start_step = training.Profiler.start_step

    def start_counted_step(self: Any, step: int) -> None:
        found = Counter[str]()
        for stack, times in gpu.stacks.items():
            calls = re.findall(rf'File "{ROOT}/(?!\.venv)(\S+)", line \d+, in (\w+)', stack)
            found["{}:{}".format(*calls[-1]) if calls else stack] += times
        print(json.dumps({"step": step - 1, "waits": found, "launches": gpu.kernels.total()}), flush=True)
        start_step(self, step)
        gpu.watch()

    training.Profiler.start_step = start_counted_step  # type: ignore[method-assign]
    print(json.dumps({"code": training.Trainer(settings.load(Path(sys.argv[1]), sys.argv[2:])).train()}), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
