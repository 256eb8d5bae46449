"""The parts of a step, in which this process's place (place.py) moves on, and a trace of some steps by torch.profiler, to be opened in
Perfetto (ui.perfetto.dev) or chrome://tracing.

    profiler = Profiler(place, settings.profiled_steps("200:205"), folder / "profile", log.line)
    for each step: profiler.at(step); with profiler.part("forward"): …
    profiler.close(step)

Each node's first rank traces itself and writes RUN/profile/steps-200-205-rank-0.json.gz, in which the parts of a step are ranges of their
names: data, forward, backward, optimizer; log, evaluation, save. Beginning, ending and writing it stop training for seconds, and it waits
for the device; what the steps compute stays the same, bit for bit.
"""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, record_function

from pretrain.run.place import Part, Place


class Profiler:
    """Args:
    steps: to trace, counted from 0; an empty range for none.
    line: tells a person where the trace is.
    """

    def __init__(self, place: Place, steps: range, folder: Path, line: Callable[[str], None]):
        self._steps = steps if os.environ["LOCAL_RANK"] == "0" else range(0)
        self._place, self._folder, self._line = place, folder, line
        self._running: profile | None = None
        self._first, self._step = 0, 0

    def at(self, step: int) -> None:
        """Call at the beginning of each step: begins and ends the trace."""
        self._step = step
        self._place.at(step, "data")
        if self._running is None and step in self._steps:
            activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])
            self._running, self._first = profile(activities=activities), step
            self._running.start()
        elif self._running is not None and step not in self._steps:
            self._write(step)

    def part(self, name: Part, micro_step: int) -> AbstractContextManager:
        """A part of a step, by name in the trace."""
        self._place.at(self._step, name, micro_step)
        return record_function(name) if self._running is not None else nullcontext()

    def close(self, step: int) -> None:
        """Writes a trace that training's end, before this step, cut short."""
        if self._running is not None:
            self._write(step)

    def _write(self, step: int) -> None:
        assert self._running is not None
        running, self._running = self._running, None
        running.stop()
        path = self._folder / f"steps-{self._first}-{step}-rank-{dist.get_rank()}.json.gz"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            running.export_chrome_trace(str(path))
            self._line(f"profile of steps {self._first} to {step - 1}: {path}")
        except OSError as error:
            self._line(f"{path} could not be written: {error}")
