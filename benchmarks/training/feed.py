"""Training speed of a job fed by its data loader, against the same step on a repeated batch.

Both take turns. The first steps of each turn, as many as the loader prefetches, are not timed: batches prefetched before the turn would
count as free, and refilling the queue would slow down the turn on the repeated batch.
"""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from benchmarks.harness import median_ratio, run_in_turns, synchronize, time_call
from benchmarks.training.step_cases import engine_step
from data.augment.mixup import mix_pairs
from data.common.placement import Placement
from data.dataset.index import open_index
from data.loader.loaders import TrainLoader
from data.loader.order import make_sample_order
from data.loader.pipeline import Batch
from pretrain.config import Config
from pretrain.engine import distributed
from pretrain.model.build import build_model


def measure_feed(config: Config, *, rounds: int, steps: int) -> list[dict[str, Any]]:
    """Measures a job's step of one micro-batch on one rank, fed and repeated, in `rounds` turns of `steps` timed steps.

    Returns:
        A row for each, with the images/s of every round; the fed row has the ratio to the repeated rate.

    Raises:
        ValueError: data.train has other classes than the model, or its settings conflict with the micro-batch.
    """
    index = open_index(config.data.train, config.data.cache)
    if len(index.classes) != config.model.classes:
        raise ValueError(f"{config.data.train} has {len(index.classes)} classes, but model.classes={config.model.classes}; make them agree")
    micro_batch = config.engine.micro_batch
    order = make_sample_order(index, config.data, seed=config.seed, global_batch=micro_batch)
    torch.manual_seed(config.seed)
    train = engine_step(config, build_model(config))
    device = distributed.select_device(config.engine)
    prefetched = config.data.read_threads + 8  # batches read ahead, and batches inside DALI

    def run(batches: Iterator[Batch], count: int) -> None:
        for batch in itertools.islice(batches, count):
            images, targets, share = batch.images, batch.labels[:, None], None
            if batch.mix is not None:
                images, targets, share = mix_pairs(batch.images, batch.labels, batch.mix)
            train(images, targets, share)
        synchronize(device)

    def turn(name: str, batches: Iterator[Batch]) -> float:
        run(batches, prefetched)
        rate = steps * micro_batch / time_call(partial(run, batches, steps))
        print(f"{name:9} {rate:9.2f} images/s", flush=True)
        return rate

    end = 1 + rounds * (prefetched + steps) + prefetched  # keeps the loader busy until the last timed step
    with TrainLoader(index, order, config.data, Placement(device, micro_batch), end=end) as loader:
        fed = iter(loader)
        first = next(fed)
        repeated = itertools.repeat(replace(first, images=first.images.clone()))
        rates = run_in_turns({"fed": partial(turn, "fed", fed), "repeated": partial(turn, "repeated", repeated)}, rounds)
    ratio = median_ratio(rates["fed"], rates["repeated"])
    return [
        {"case": "fed", "micro_batch": micro_batch, "images_per_s": rates["fed"], "to_repeated": ratio},
        {"case": "repeated", "micro_batch": micro_batch, "images_per_s": rates["repeated"]},
    ]
