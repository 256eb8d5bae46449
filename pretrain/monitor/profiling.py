"""Marks the phases of a step and traces steps with torch.profiler, for Perfetto (ui.perfetto.dev) or chrome://tracing.

    profiler = Profiler(position, settings.profiled_steps("200:205"), folder / "profile", log.line)
    for each step: profiler.start_step(step); with profiler.phase("forward", micro_step): …
    profiler.close(step)

The first rank of each node writes RUN/profile/steps-200-205-rank-0.json.gz, in which each phase of a step is a named range. Starting,
ending and writing a trace pause training for seconds and wait for the device; the results of the steps stay the same, bit for bit.
"""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, record_function

from pretrain.run.position import Phase, SharedPosition


class Profiler:
    """Marks phases for `position` and the trace, and traces `steps`, counted from 0, into `folder`."""

    def __init__(self, position: SharedPosition, steps: range, folder: Path, log_line: Callable[[str], None]):
        self._steps = steps if os.environ["LOCAL_RANK"] == "0" else range(0)
        self._position, self._folder, self._log_line = position, folder, log_line
        self._running: profile | None = None
        self._first, self._step = 0, 0

    def start_step(self, step: int) -> None:
        """Starts or ends the trace if due at this step."""
        self._step = step
        self._position.set(step, "data", 0)
        if self._running is None and step in self._steps:
            activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])
            self._running, self._first = profile(activities=activities), step
            self._running.start()
        elif step not in self._steps:
            self.close(step)

    def phase(self, name: Phase, micro_step: int | None = None) -> AbstractContextManager:
        """Returns a context that marks a phase of the step in the trace."""
        self._position.set(self._step, name, micro_step)
        return record_function(name) if self._running is not None else nullcontext()

    def close(self, step: int) -> None:
        """Ends the trace before this step and writes it; does nothing if no trace is running."""
        if self._running is None:
            return
        running, self._running = self._running, None
        running.stop()
        path = self._folder / f"steps-{self._first}-{step}-rank-{dist.get_rank()}.json.gz"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            running.export_chrome_trace(str(path))
            self._log_line(f"profile of steps {self._first} to {step - 1}: {path}")
        except OSError as error:
            self._log_line(f"{path} could not be written: {error}")
