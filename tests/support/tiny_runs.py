"""Makes two runs of two steps, for tests of exports, evaluation and initial weights. The fixture is `runs`."""

from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from tests.support.configs import make_config

CLASSES = [f"class {number}" for number in range(7)]


def make_runs(folder: str) -> None:
    """Writes the runs FOLDER/averaged, with a moving average, and FOLDER/plain, and their weights to FOLDER/….pt. Runs on one rank."""
    from pretrain import config as settings
    from pretrain.checkpoint import Checkpoints, Retention, lock_run
    from pretrain.engine import distributed
    from pretrain.engine.batch_stats import BatchStats
    from pretrain.engine.engine import build_engine
    from pretrain.model.build import build_model
    from pretrain.run.log import RunLog

    data = {"image_size": 32, "mean": [0.4, 0.5, 0.6]}
    config = make_config(classes=len(CLASSES), lr=1e-3, data=data, engine={"micro_batch": 4, "precision": "bf16"})
    distributed.start(config.engine)
    for name, ema_decay in (("averaged", 0.9), ("plain", 0.0)):
        config.engine.ema_decay, config.data.eval_resize = ema_decay, "crop" if ema_decay else "squash"
        model = build_model(config)
        engine = build_engine(config, model, 1)
        stats = BatchStats(model, ema_decay)
        run, log = Path(folder, name), RunLog(None)
        checkpoints = Checkpoints(run / "checkpoints", engine, stats, retention=Retention(3), lock=lock_run(run, log.line), log=log)
        average = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        for _ in range(2):
            images = torch.randn(4, 3, 32, 32).to(memory_format=torch.channels_last)
            engine.backward(nn.functional.cross_entropy(engine(images).float(), torch.arange(4)))
            stats.start_averaging()
            engine.step()
            stats.finish()
            for key, tensor in model.state_dict().items():
                average[key] = tensor.clone() if key.endswith("num_batches_tracked") else 0.9 * average[key] + 0.1 * tensor
        trainer = {"step": 2, "identity": {"steps": 2}, "classes": CLASSES, "evaluation": None}
        checkpoints.save({**trainer, "config": settings.as_dict(config)})
        checkpoints.close()
        torch.save({"raw": {key: tensor.clone() for key, tensor in model.state_dict().items()}, "ema": average}, Path(folder, f"{name}.pt"))
    distributed.stop()


def trained_weights(runs: Path, kind: str) -> dict[str, torch.Tensor]:
    """Returns the state dict of RUNS/averaged in the training process: kind `raw`, or `ema`, computed here by its formula."""
    return torch.load(runs / "averaged.pt")[kind]


def new_model(classes: int = len(CLASSES)) -> nn.Module:
    torch.manual_seed(5)
    return timm.create_model("van_b0", num_classes=classes)


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def assert_trained(actual: dict[str, Any], runs: Path, kind: str) -> None:
    """Raises AssertionError unless weights are equal bit by bit, or averages but for rounding."""
    if kind == "raw":
        assert_same(actual, trained_weights(runs, "raw"))
    else:
        torch.testing.assert_close(actual, trained_weights(runs, "ema"), rtol=1e-5, atol=1e-6)
