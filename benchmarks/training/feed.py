"""Whether the loader keeps up: a job's step on what its loader brings, beside the same step on one batch repeated.

Both take turns in stretches. The first steps of each stretch are not counted, as many as the loader makes ahead: what it had made before
would come for nothing, and what it makes to fill up again would slow down the other.
"""

import itertools
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from benchmarks.training.layers import deciles
from benchmarks.training.measure import wait_for
from benchmarks.training.ways import engine_step
from data.augment.mixup import mix_pairs
from data.common.placement import Placement
from data.dataset.index import open_index
from data.loader.loaders import TrainLoader
from data.loader.order import make_sample_order
from data.loader.pipeline import Batch
from pretrain.config import Config
from pretrain.engine import distributed
from pretrain.model.build import build_model

KINDS = ("fed", "repeated")


def measure_feed(config: Config, *, rounds: int, steps: int) -> dict[str, Any]:
    """Images a second of both, over `rounds` stretches of `steps` counted steps each, and the ratio of fed to repeated, which is the median
    of the rounds'. A step is one micro-batch of the job, on one rank.

    Raises:
        ValueError: data.train has other classes than the model; or its numbers don't go together with the micro-batch.
    """
    index = open_index(config.data.train, config.data.cache)
    if len(index.classes) != config.model.classes:
        raise ValueError(f"{config.data.train} has {len(index.classes)} classes, but model.classes={config.model.classes}; make them agree")
    micro_batch = config.engine.micro_batch
    order = make_sample_order(index, config.data, seed=config.seed, global_batch=micro_batch)
    torch.manual_seed(config.seed)
    train = engine_step(config, build_model(config))
    device = distributed.rank_device(config.engine)
    ahead = config.data.read_threads + 8  # read, and inside DALI

    def step(batch: Batch) -> None:
        images, targets, share = batch.images, batch.labels[:, None], None
        if batch.mix is not None:
            images, targets, share = mix_pairs(batch.images, batch.labels, batch.mix)
        train(images, targets, share)

    def stretch(batches: Iterator[Batch]) -> float:
        for _ in range(ahead):
            step(next(batches))
        wait_for(device)
        began = time.perf_counter()
        for _ in range(steps):
            step(next(batches))
        wait_for(device)
        return steps * micro_batch / (time.perf_counter() - began)

    rates: dict[str, list[float]] = {kind: [] for kind in KINDS}
    end = 1 + rounds * (ahead + steps) + ahead  # the loader goes on to the last step that counts
    with TrainLoader(index, order, config.data, Placement(device, micro_batch), end=end) as loader:
        fed = iter(loader)
        first = next(fed)
        repeated = itertools.repeat(replace(first, images=first.images.clone()))
        for number in range(rounds):
            for kind in KINDS if number % 2 == 0 else reversed(KINDS):
                rates[kind].append(stretch(fed if kind == "fed" else repeated))
                print(f"round {number + 1} of {rounds}  {kind:9} {rates[kind][-1]:9.2f} images/s", flush=True)
    ratio = statistics.median(a / b for a, b in zip(rates["fed"], rates["repeated"], strict=True))
    return {"micro_batch": micro_batch, "fed_to_repeated": ratio, **{f"{kind}_images_per_s": deciles(rates[kind]) for kind in KINDS}}
