"""Evaluates a job during training: its weights and, if there is one, their moving average.

evaluator = Evaluator(engine, stats, val_loader, index.classes, precision, new_model, log)
results = evaluator.evaluate(step)      # {"step": 500, "weight": {"top1": …}, "ema": {…}}
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from data.loader.loaders import EvalLoader
from pretrain.engine import zero_state
from pretrain.engine.batch_stats import BatchStats
from pretrain.evaluation.accuracy import evaluate, format_result
from pretrain.monitor.damage import report_bad_images
from pretrain.run.log import RunLog
from pretrain.weights.run_model import copy_weights

TITLES = {"weight": "weights", "ema": "moving average"}


@dataclass(frozen=True)
class Evaluator:
    """Evaluates the weights of an engine on a loader's dataset."""

    engine: Any
    stats: BatchStats  # BatchNorm statistics, with a moving average if the weights have one
    loader: EvalLoader
    classes: Sequence[str]  # of the model's outputs
    precision: str
    new_model: Callable[[], nn.Module]  # returns a model on the loader's device, with any weights
    log: RunLog

    def evaluate(self, step: int) -> dict[str, Any]:
        """Evaluates after `step` steps; logs and returns the results by kind of weights. Collective.

        Raises:
            ValueError: too many images are bad, or all.
        """
        results: dict[str, Any] = {"step": step}
        model = self.new_model()
        for kind in ("weight", "ema") if self.stats.ema_decay else ("weight",):
            buffers = dict(self.engine.module.named_buffers()) | (self.stats.averages if kind == "ema" else {})
            copy_weights(model, zero_state.assemble_tensors(self.engine, kind), buffers)
            result = evaluate(model, self.loader, self.classes, self.precision)
            if result["skipped"]:
                report_bad_images(self.loader.quarantine, step, self.log)
            self.log.line(f"evaluation at step {step} ({TITLES[kind]}): {format_result(result)}")
            results[kind] = result
        self.log.record("evaluation", **results)
        return results
