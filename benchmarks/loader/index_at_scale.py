"""Measures the cost of an index at the size of ImageNet-22K without the data: a real index over sparse shards.

    python -m benchmarks.loader.index_at_scale [--samples 14197122] [--shards 4096] [--out FOLDER]

index.npy, classes.json and dataset.json are real; tars are sparse files of the right size, so only their names and sizes can be used. Each
figure is compared with its documented limit, and the exit status is 1 if a figure exceeds its limit.

A second table compares how well the sample order and a full permutation mix shards that are sorted by class. That is the worst case: in
shards that `python -m data pack` writes, a hash of the key decides the position of a sample, and every order is random.
"""

import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import harness
from data.dataset.index import DTYPE, Index, Shard, open_index, write_index
from data.loader.order import SampleOrder, select_rank_slots
from data.settings import DataConfig

MODULE = "benchmarks.loader.index_at_scale"
SAMPLES, SHARDS, CLASSES = 14_197_122, 4096, 21_841  # ImageNet-22K
GLOBAL_BATCH = 8192
SAMPLES_1K, SHARDS_1K, CLASSES_1K = 1_281_167, 540, 1000  # ImageNet-1K
GLOBAL_BATCH_1K = 512
DEFAULT = DataConfig.lanes, DataConfig.window
CHOICES = [DEFAULT, (64, 512), (64, 8192), (64, 32768), (16, 2048), (256, 2048), (512, 2048)]  # lanes, window
RANKS = [2**power for power in range(10)]
EPOCHS = 90
RANKS_PER_NODE = 4  # share the pages of the index
_STEPS = 270  # three of each epoch
_MIXED_STEPS = 48  # each of another epoch
_ROUNDS = 3
_SECONDS_TO_MEET = 300
_HEADER_BYTES = 1536  # bytes before the image of a sample in a tar: two headers and the label


@dataclass(frozen=True)
class Figure:
    """A measured value and its documented upper limit, if there is one."""

    name: str
    measured: float
    unit: str
    limit: float | None = None

    @property
    def is_kept(self) -> bool:
        return self.limit is None or self.measured <= self.limit


def measure(samples: int = SAMPLES, shards: int = SHARDS) -> list[Figure]:
    """Makes a dataset of this size in a temporary folder and measures all figures."""
    with tempfile.TemporaryDirectory(prefix="simulated-") as name:
        folder = Path(name)
        simulate(folder, samples=samples, shards=shards)
        index = open_index(folder)
        alone = run_ranks(folder, 1)[0]
        together = run_ranks(folder, RANKS_PER_NODE)
        order, full = compare(index.samples["label"], index.shard_start, global_batch=GLOBAL_BATCH, choices=[DEFAULT]).values()
        # Samples lie in random order here, as in packed shards; `measure_sorted_shards` shows the effect of the order alone.
        entropy, displacement = full.entropy_bits - order.entropy_bits, order.displacement / full.displacement
        return [
            Figure("index.npy, dataset.json and classes.json on disk", count_bytes_on_disk(folder) / samples, "B/sample", 32),
            Figure("opening", 1000 * alone.opening, "ms", 1000),
            Figure(f"order of a step, slowest of {_STEPS} in all epochs", 1000 * time_slowest_step(index), "ms", 20),
            Figure(f"private memory of a rank, {RANKS_PER_NODE} on the node", max(rank.private for rank in together) / 1e6, "MB", 100),
            Figure("entropy of a batch's classes, short of a full permutation's", max(0.0, entropy), "bits", 0.1),
            Figure("displacement, short of a full permutation's", max(0.0, 100 * (1 - displacement)), "%", 5),
        ]


def measure_sorted_shards(samples: int = SAMPLES, shards: int = SHARDS) -> dict[str, list[dict[str, Any]]]:
    """Measures how orders with different lanes and windows mix shards sorted by class: a table for each size of dataset."""
    labels_22k = np.sort(draw_uneven_labels(np.random.default_rng(0), samples))
    labels_1k = np.arange(SAMPLES_1K) * CLASSES_1K // SAMPLES_1K
    tables = {}
    sizes = {"22K": (labels_22k, shards, GLOBAL_BATCH), "1K": (labels_1k, SHARDS_1K, GLOBAL_BATCH_1K)}
    for name, (labels, count, batch) in sizes.items():
        start = np.arange(count + 1) * len(labels) // count
        tables[f"sorted_shards_of_{name}"] = list_rows(compare(labels, start, global_batch=batch, choices=CHOICES))
    return tables


def simulate(folder: Path, *, samples: int = SAMPLES, shards: int = SHARDS, seed: int = 0) -> None:
    """Makes a dataset without images in `folder`: each shard is a sparse file of the right size.

    Sizes are distributed as those of photographs (gamma), classes as unevenly as ImageNet-22K's.
    """
    random = np.random.default_rng(seed)
    rows = np.zeros(samples, DTYPE)
    rows["label"] = draw_uneven_labels(random, samples)
    rows["size"] = 2000 + random.gamma(2.0, 45_000, samples)
    rows["width"], rows["height"] = random.gamma(8.0, 60.0, (2, samples)).astype(np.uint16) + 40
    stored = _HEADER_BYTES + -(-rows["size"].astype(np.int64) // 512) * 512
    ends = np.cumsum(stored)
    start = np.arange(shards + 1) * samples // shards
    bounds = np.concatenate([[0], ends])[start]
    rows["offset"] = ends - stored + _HEADER_BYTES - np.repeat(bounds[:-1], np.diff(start))
    entries = []
    for number, (count, size) in enumerate(zip(np.diff(start).tolist(), (np.diff(bounds) + 1024).tolist(), strict=True)):
        shard = Shard(f"train-{number:06d}.tar", count, size, f"{number:032x}")
        (folder / shard.name).touch()
        os.truncate(folder / shard.name, size)
        entries.append(shard)
    write_index(folder, entries, [rows], [f"n{number:08d}" for number in range(CLASSES)])


def draw_uneven_labels(random: np.random.Generator, samples: int) -> np.ndarray:
    weights = random.gamma(2.0, size=CLASSES)
    return random.choice(CLASSES, samples, p=weights / weights.sum())


def count_bytes_on_disk(folder: Path) -> int:
    """Returns the bytes of the files that training maps or reads; the .idx files serve other readers."""
    return sum((folder / name).stat().st_size for name in ("index.npy", "dataset.json", "classes.json"))


def time_slowest_step(index: Index, seed: int = 0) -> float:
    """Returns the seconds to compute a rank's ids in the slowest of random steps, epochs and numbers of ranks.

    Successive steps belong to different epochs, so no step benefits from cached work of the one before. The fastest of three runs of a
    step counts, to exclude other load of the machine.
    """
    order = SampleOrder(index.shard_start, seed=seed, global_batch=GLOBAL_BATCH)
    random = np.random.default_rng(seed)
    steps = random.integers(order.steps_per_epoch, size=_STEPS).tolist()
    epochs = [epoch for _ in range(0, _STEPS, EPOCHS) for epoch in random.permutation(EPOCHS).tolist()]
    ranks = random.choice(RANKS, _STEPS).tolist()
    seconds = np.empty((_ROUNDS, _STEPS))
    for tries in seconds:
        for number, (epoch, step, count) in enumerate(zip(epochs, steps, ranks, strict=True)):
            start = time.perf_counter()
            order.batch(epoch, step)[select_rank_slots(GLOBAL_BATCH, count - 1, count)]
            tries[number] = time.perf_counter() - start
    return float(seconds.min(axis=0).max())


@dataclass(frozen=True)
class Rank:
    """Measurements of a process: seconds to open the dataset, and growth of its private memory in bytes."""

    opening: float
    private: int


Use = Callable[[Index, int, int], None]  # index, rank, ranks


def use_as_a_rank(index: Index, rank: int, ranks: int) -> None:
    """Reads the index rows of the samples of 100 random steps."""
    order = SampleOrder(index.shard_start, seed=0, global_batch=GLOBAL_BATCH)
    random = np.random.default_rng(0)
    for _ in range(100):
        ids = order.batch(int(random.integers(EPOCHS)), int(random.integers(order.steps_per_epoch)))
        index.samples[ids[select_rank_slots(GLOBAL_BATCH, rank, ranks)]]


def run_ranks(folder: Path, count: int, use: Use = use_as_a_rank) -> list[Rank]:
    """Returns the measurements of `count` processes that open and use a dataset at the same time."""
    context = multiprocessing.get_context("spawn")
    meet = context.Barrier(count, timeout=_SECONDS_TO_MEET)
    with ProcessPoolExecutor(count, context, initializer=_init_worker, initargs=(meet,)) as pool:
        return list(pool.map(partial(_rank, folder, count, use), range(count)))


_meet: Barrier  # keeps all ranks alive while one measures


def _init_worker(meet: Barrier) -> None:
    global _meet
    _meet = meet


def _rank(folder: Path, ranks: int, use: Use, rank: int) -> Rank:
    _meet.wait()
    before = read_private_bytes()
    start = time.perf_counter()
    index = open_index(folder)
    opening = time.perf_counter() - start
    use(index, rank, ranks)
    _meet.wait()
    private = read_private_bytes() - before
    _meet.wait()
    return Rank(opening, private)


def read_private_bytes() -> int:
    """Returns the memory that this process shares with no other, including pages of files that it alone maps (Linux)."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith(("Private_Clean", "Private_Dirty")))


@dataclass(frozen=True)
class Mixing:
    """Measures of how well an order mixes, as means over steps.

    Attributes:
        displacement: |place in the epoch - place in the shards|, both from 0 to 1; 1/3 for a full permutation.
        pairs_of_one_class: fraction of the pairs of slots 2i and 2i + 1, which mixup and cutmix mix, that have one class.
        classes: distinct classes in a global batch.
        entropy_bits: entropy of the distribution of classes in a global batch.
    """

    displacement: float
    pairs_of_one_class: float
    classes: float
    entropy_bits: float


def measure_mixing(labels: np.ndarray, batches: Iterable[tuple[float, np.ndarray]]) -> Mixing:
    """Measures batches of (position in the epoch from 0 to 1, sample ids). `labels`, (N,), are in shard order."""
    steps = []
    for place, ids in batches:
        pairs = labels[ids].reshape(-1, 2)
        share = np.unique(labels[ids], return_counts=True)[1] / len(ids)
        displacement = np.abs(ids / len(labels) - place).mean()
        steps.append((displacement, (pairs[:, 0] == pairs[:, 1]).mean(), len(share), -(share * np.log2(share)).sum()))
    return Mixing(*np.mean(steps, axis=0).tolist())


def compare(
    labels: np.ndarray, shard_start: np.ndarray, *, global_batch: int, choices: Sequence[tuple[int, int]], seed: int = 0
) -> dict[str, Mixing]:
    """Measures the orders of `choices`, (lanes, window) each, and a full permutation, by name, on the same random steps."""
    random = np.random.default_rng(seed)
    orders = [SampleOrder(shard_start, seed=seed, global_batch=global_batch, lanes=lanes, window=window) for lanes, window in choices]
    steps_per_epoch = orders[0].steps_per_epoch
    steps = random.integers(steps_per_epoch, size=_MIXED_STEPS).tolist()
    places = [(step + 0.5) / steps_per_epoch for step in steps]
    measured = {}
    for order in orders:
        batches = (order.batch(epoch, step) for epoch, step in enumerate(steps))
        measured[f"{order.lanes} lanes, windows of {order.window}"] = measure_mixing(labels, zip(places, batches, strict=True))
    drawn = (random.choice(len(labels), global_batch, replace=False) for _ in steps)
    return measured | {"full permutation": measure_mixing(labels, zip(places, drawn, strict=True))}


def list_rows(measured: dict[str, Mixing]) -> list[dict[str, Any]]:
    """Returns a row for each order, with displacements relative to the full permutation's."""
    full = measured["full permutation"].displacement
    return [{"order": order, **asdict(one), "displacement": one.displacement / full} for order, one in measured.items()]


def main(arguments: list[str] | None = None) -> int:
    """Measures and stores all figures; returns 1 if one exceeds its limit."""
    options = harness.make_parser(MODULE, __doc__)
    options.add_argument("--samples", type=int, default=SAMPLES, help="(%(default)s)")
    options.add_argument("--shards", type=int, default=SHARDS, help="(%(default)s)")
    args = options.parse_args(arguments)
    figures = measure(args.samples, args.shards)
    tables = {"rows": [asdict(figure) for figure in figures]} | measure_sorted_shards(args.samples, args.shards)
    command = harness.format_command(MODULE, {"samples": args.samples, "shards": args.shards})
    harness.report(args.out / "index_at_scale.json", command, ["numpy"], **tables)
    exceeded = [figure for figure in figures if not figure.is_kept]
    for figure in exceeded:
        print(f"{figure.name}: {figure.measured:.4g} {figure.unit} exceeds the limit of {figure.limit:g}", file=sys.stderr)
    return 1 if exceeded else 0


if __name__ == "__main__":
    sys.exit(main())
