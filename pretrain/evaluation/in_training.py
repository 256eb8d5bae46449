"""Evaluates a job while it trains: its weights and, if there is one, their moving average.

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
from pretrain.evaluation.accuracy import evaluate
from pretrain.monitor.damage import report_bad_images
from pretrain.run.metrics import RunLog
from pretrain.weights.run_model import copy_weights

TITLES = {"weight": "weights", "ema": "moving average"}


@dataclass(frozen=True)
class Evaluator:
    """Evaluates the weights of an engine on the data set of a loader."""

    engine: Any
    stats: BatchStats  # BatchNorm's statistics, averaged where the weights are
    loader: EvalLoader
    classes: Sequence[str]  # of the outputs of the model
    precision: str
    new_model: Callable[[], nn.Module]  # returns a model on the device of the loader, with any weights
    log: RunLog

    def evaluate(self, step: int) -> dict[str, Any]:
        """Evaluates after `step` steps; returns the results by kind of weights, and writes them to the log. Collective.

        Raises:
            ValueError: there are too many bad images, or none that can be used.
        """
        results: dict[str, Any] = {"step": step}
        model = self.new_model()
        for kind in ("weight", "ema") if self.stats.ema_decay else ("weight",):
            buffers = dict(self.engine.module.named_buffers()) | (self.stats.averages if kind == "ema" else {})
            copy_weights(model, zero_state.assemble_tensors(self.engine, kind), buffers)
            result = evaluate(model, self.loader, self.classes, self.precision)
            if result["skipped"]:
                report_bad_images(self.loader.quarantine, step, self.log)
            self.log.line(
                f"evaluation at step {step} ({TITLES[kind]}): top-1 {result['top1']:.2%}, top-5 {result['top5']:.2%}, "
                f"loss {result['loss']:.4f} on {result['images']} images"
                + (f"; {result['skipped']} bad images skipped" if result["skipped"] else "")
            )
            results[kind] = result
        self.log.record("evaluation", **results)
        return results
