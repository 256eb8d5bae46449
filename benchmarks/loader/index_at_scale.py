"""What an index costs at the size of ImageNet-22K, shown without the data: a real index over shards that are holes.

    python -m benchmarks.loader.index_at_scale [--samples 14197122] [--shards 4096] [--out FOLDER]

index.npy, classes.json and dataset.json are real; tars are sparse files of the right size, so nothing but their names and sizes can
be used. Each figure stands beside the limit that the documentation promises; the exit status is 1 where a figure exceeds its limit. A
second table shows how well the sample order mixes shards that are sorted by class (shuffle.py). The result goes to
FOLDER/index_at_scale.json (benchmarks/results).
"""

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np

from data.common.results import record_result
from data.dataset.index import DTYPE, Index, Shard, open_index, write_index
from data.inspect.report import format_stats
from data.inspect.shuffle import Row, compare_orders, format_table
from data.loader.order import SampleOrder, select_rank_slots
from data.settings import DataConfig

RESULTS = Path(__file__).parents[1] / "results"
SAMPLES, SHARDS, CLASSES = 14_197_122, 4096, 21_841  # of ImageNet-22K
GLOBAL_BATCH = 8192
SAMPLES_1K, SHARDS_1K, CLASSES_1K = 1_281_167, 540, 1000  # of ImageNet-1K
GLOBAL_BATCH_1K = 512
DEFAULT = DataConfig.lanes, DataConfig.window
CHOICES = [DEFAULT, (64, 512), (64, 8192), (64, 32768), (16, 2048), (256, 2048), (512, 2048)]  # of lanes and window
RANKS = [2**power for power in range(10)]
EPOCHS = 90
RANKS_OF_A_NODE = 4  # share the pages of the index
_STEPS = 270  # that are tried: three of each epoch
_ROUNDS = 3
_SECONDS_TO_MEET = 300
_HEADER_BYTES = 1536  # of a sample in a tar before its image: two headers and the label


@dataclass(frozen=True)
class Figure:
    """Something measured, and the most that it may be, where something is promised of it."""

    what: str
    measured: float
    unit: str
    promised: float | None = None

    @property
    def kept(self) -> bool:
        return self.promised is None or self.measured <= self.promised

    def __str__(self) -> str:
        promise = "" if self.promised is None else f"promised at most {self.promised:g}{'' if self.kept else ': BROKEN'}"
        return f"{self.what:<58}{self.measured:>9.1f} {self.unit:<12}{promise}".rstrip()


def bench(samples: int = SAMPLES, shards: int = SHARDS) -> list[Figure]:
    """Makes a dataset of that size in a temporary folder and measures all figures."""
    with tempfile.TemporaryDirectory(prefix="simulated-") as name:
        folder = Path(name)
        simulate(folder, samples=samples, shards=shards)
        index = open_index(folder)
        alone = ranks_of_a_node(folder, 1)[0]
        together = ranks_of_a_node(folder, RANKS_OF_A_NODE)
        began = time.perf_counter()
        format_stats(index)
        described = time.perf_counter() - began
        order, full = compare_orders(index.samples["label"], index.shard_start, global_batch=GLOBAL_BATCH, choices=[DEFAULT])
        displacement = order.quality.displacement / full.quality.displacement
        return [
            Figure("index.npy, dataset.json and classes.json on disk", bytes_on_disk(folder) / samples, "B a sample", 32),
            Figure("opening", 1000 * alone.opening, "ms", 1000),
            Figure("first batch of ids after opening", 1000 * alone.first_batch, "ms"),
            Figure("order of a step, the worst of many in all epochs", 1000 * slowest_step(index), "ms", 20),
            Figure(f"private memory a rank, {RANKS_OF_A_NODE} of them", max(rank.private for rank in together) / 1e6, "MB", 100),
            Figure("statistics of all samples", described, "s"),
            # As they are packed, that is in random order; what the order itself adds to it is in `sorted_shards`.
            Figure(
                "classes of a batch: entropy short of a full permutation's", max(0.0, full.quality.bits - order.quality.bits), "bits", 0.1
            ),
            Figure("displacement, short of a full permutation's", max(0.0, 100 * (1 - displacement)), "%", 5),
        ]


def sorted_shards(samples: int = SAMPLES, shards: int = SHARDS) -> dict[str, list[Row]]:
    """How the order mixes shards in the order of their classes, with several lanes and windows: of a dataset of that size, and of one
    of ImageNet-1K's."""
    labels_22k = np.sort(uneven_labels(np.random.default_rng(0), samples))
    labels_1k = np.arange(SAMPLES_1K) * CLASSES_1K // SAMPLES_1K
    tables = {}
    for labels, count, classes, batch in (
        (labels_22k, shards, CLASSES, GLOBAL_BATCH),
        (labels_1k, SHARDS_1K, CLASSES_1K, GLOBAL_BATCH_1K),
    ):
        start = np.arange(count + 1) * len(labels) // count
        title = f"{len(labels)} samples in {count} shards, sorted by {classes} classes; a global batch of {batch}"
        tables[title] = compare_orders(labels, start, global_batch=batch, choices=CHOICES)
    return tables


def simulate(folder: Path, *, samples: int = SAMPLES, shards: int = SHARDS, seed: int = 0) -> None:
    """Makes a dataset in `folder` that has everything but images: of each shard only the size is there.

    Sizes are spread as those of photographs are (two gamma-distributed factors), classes as unevenly as those of ImageNet-22K.
    """
    random = np.random.default_rng(seed)
    rows = np.zeros(samples, DTYPE)
    rows["label"] = uneven_labels(random, samples)
    rows["size"] = 2000 + random.gamma(2.0, 45_000, samples)
    rows["width"], rows["height"] = random.gamma(8.0, 60.0, (2, samples)).astype(np.uint16) + 40
    stored = _HEADER_BYTES + -(-rows["size"].astype(np.int64) // 512) * 512
    ends = np.cumsum(stored)
    start = np.arange(shards + 1) * samples // shards
    bounds = np.concatenate([[0], ends])[start]
    rows["offset"] = ends - stored + _HEADER_BYTES - np.repeat(bounds[:-1], np.diff(start))
    described = []
    for number, (count, size) in enumerate(zip(np.diff(start).tolist(), (np.diff(bounds) + 1024).tolist(), strict=True)):
        shard = Shard(f"train-{number:06d}.tar", count, size, f"{number:032x}")
        (folder / shard.name).touch()
        os.truncate(folder / shard.name, size)
        described.append(shard)
    write_index(folder, described, [rows], [f"n{number:08d}" for number in range(CLASSES)])


def uneven_labels(random: np.random.Generator, samples: int) -> np.ndarray:
    weights = random.gamma(2.0, size=CLASSES)
    return random.choice(CLASSES, samples, p=weights / weights.sum())


def bytes_on_disk(folder: Path) -> int:
    """Of what a training maps or reads; the .idx files serve other readers."""
    return sum((folder / name).stat().st_size for name in ("index.npy", "dataset.json", "classes.json"))


def slowest_step(index: Index, seed: int = 0) -> float:
    """Seconds for a rank's ids of a step, the worst over random steps of all epochs and numbers of ranks; no two that follow
    each other share anything that is kept between them.

    Of each step the best of three tries counts, so that it is the step's cost and not what else the machine did.
    """
    order = SampleOrder(index.shard_start, seed=seed, global_batch=GLOBAL_BATCH)
    random = np.random.default_rng(seed)
    steps = random.integers(order.steps_per_epoch, size=_STEPS).tolist()
    epochs = [epoch for _ in range(0, _STEPS, EPOCHS) for epoch in random.permutation(EPOCHS).tolist()]
    ranks = random.choice(RANKS, _STEPS).tolist()
    seconds = np.empty((_ROUNDS, _STEPS))
    for tries in seconds:
        for number, (epoch, step, count) in enumerate(zip(epochs, steps, ranks, strict=True)):
            began = time.perf_counter()
            order.batch(epoch, step)[select_rank_slots(GLOBAL_BATCH, count - 1, count)]
            tries[number] = time.perf_counter() - began
    return float(seconds.min(axis=0).max())


@dataclass(frozen=True)
class Rank:
    """What a process found: seconds to open the dataset and then to the first batch of ids, and the bytes of memory, its alone,
    that it has more of after it has used the dataset than before it opened it."""

    opening: float
    first_batch: float
    private: int


Use = Callable[[Index, int, int], None]  # index, rank, ranks


def use_as_a_rank(index: Index, rank: int, ranks: int) -> None:
    """Takes the rows of the samples of 100 random steps."""
    order = SampleOrder(index.shard_start, seed=0, global_batch=GLOBAL_BATCH)
    random = np.random.default_rng(0)
    for _ in range(100):
        ids = order.batch(int(random.integers(EPOCHS)), int(random.integers(order.steps_per_epoch)))
        index.samples[ids[select_rank_slots(GLOBAL_BATCH, rank, ranks)]]


def ranks_of_a_node(folder: Path, count: int, use: Use = use_as_a_rank) -> list[Rank]:
    """What `count` processes find that open and use a dataset at the same time."""
    context = multiprocessing.get_context("spawn")
    meet = context.Barrier(count, timeout=_SECONDS_TO_MEET)
    with ProcessPoolExecutor(count, context, initializer=_begin, initargs=(meet,)) as pool:
        return list(pool.map(partial(_rank, folder, count, use), range(count)))


_meet: Barrier  # where the ranks of a node wait for each other, so that all are there whenever one measures


def _begin(meet: Barrier) -> None:
    global _meet
    _meet = meet


def _rank(folder: Path, ranks: int, use: Use, rank: int) -> Rank:
    _meet.wait()
    before = private_bytes()
    began = time.perf_counter()
    index = open_index(folder)
    opened = time.perf_counter()
    order = SampleOrder(index.shard_start, seed=0, global_batch=GLOBAL_BATCH)
    index.samples[order.batch(0, 0)[select_rank_slots(GLOBAL_BATCH, rank, ranks)]]
    first = time.perf_counter()
    use(index, rank, ranks)
    _meet.wait()
    private = private_bytes() - before
    _meet.wait()
    return Rank(opened - began, first - opened, private)


def private_bytes() -> int:
    """Memory that this process shares with no other, pages of files that only it has mapped included (Linux)."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith(("Private_Clean", "Private_Dirty")))


def main(arguments: list[str] | None = None) -> int:
    """Measures and records all figures; returns 1 where one exceeds its limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=SAMPLES, help="(%(default)s)")
    parser.add_argument("--shards", type=int, default=SHARDS, help="(%(default)s)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", default=RESULTS, help="for the result as JSON; default: benchmarks/results")
    args = parser.parse_args(arguments)
    figures = bench(args.samples, args.shards)
    print(*figures, sep="\n")
    tables = sorted_shards(args.samples, args.shards)
    for title, rows in tables.items():
        print("", title, *format_table(rows), sep="\n")
    command = f"python -m benchmarks.loader.index_at_scale --samples {args.samples} --shards {args.shards}"
    shuffle = {title: [asdict(row) for row in rows] for title, rows in tables.items()}
    record_result(args.out / "index_at_scale.json", command, ["numpy"], rows=[asdict(figure) for figure in figures], shuffle=shuffle)
    return 0 if all(figure.kept for figure in figures) else 1


if __name__ == "__main__":
    sys.exit(main())
