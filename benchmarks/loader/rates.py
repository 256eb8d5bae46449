"""How fast a job's images are decoded and augmented: this loader beside timm's, and both beside decoding alone.

    python -m benchmarks.loader CONFIG --against timm [--images 2048] [--batch 64] [key=value …]
    python -m benchmarks.loader CONFIG --gpu-sweep

Both loaders read the same shards and do the same to an image: the job's crops, flips, interpolation and augmentation, without mixup
and cutmix. timm's gets a map-style dataset that reads an image by its position in a shard and opens it with Pillow. Every way is tried
with several numbers of threads or processes; all take turns in each of several rounds, and the best by its median stands for its way.
A rate counts batches that are made while more are to come, after as many as were made ahead. An image's CPU time, from which the rate
for each core that is kept busy follows, is that of all threads and processes, and is moved less by what else the machine does.
"""

import io
import itertools
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import psutil
import torch
from nvidia.dali import fn
from nvidia.dali.pipeline import Pipeline
from nvidia.dali.types import DALIDataType, DALIImageType
from PIL import Image
from timm.data import create_loader
from torch.utils.data import DataLoader, Dataset

from data.common.placement import Placement
from data.dataset.index import Index, open_index
from data.loader.loaders import TrainLoader
from data.loader.order import make_sample_order
from data.loader.store import ShardStore
from data.settings import DataConfig, JobData

OWN, TIMM = "this loader", "timm"
OWN_DECODING, TIMM_DECODING = "DALI, decoding whole images alone", "Pillow, decoding whole images alone"
PACKAGES = ("torch", "nvidia-dali-cuda130", "timm", "pillow", "numpy")
_HARDWARE_LOADS = (0.0, 0.12, 0.35, 0.65, 0.9)  # of DALI's hw_decoder_load
_READ_THREADS = (1, 2, 4)
_IN_MEMORY = 512  # encoded images that decoding alone is fed, over and over

Batches = Callable[[int], AbstractContextManager[Iterator[Any]]]  # opens a loader of so many batches


@dataclass(frozen=True)
class Way:
    """Something to be measured, with the threads or processes that it was given."""

    name: str
    settings: dict[str, Any]
    batches: Batches
    at_a_time: int = 1  # batches that are made side by side
    ahead: int = 8  # batches that are made before the first is taken, or a few more

    def __str__(self) -> str:
        return f"{self.name}: {', '.join(f'{name} {value}' for name, value in self.settings.items())}"


@dataclass
class Rates:
    """What each round found of a way: images a second, and a second of CPU time."""

    way: Way
    a_second: list[float] = field(default_factory=list)
    a_cpu_second: list[float] = field(default_factory=list)


def against_timm(job: JobData, *, images: int, batch: int, rounds: int) -> list[Rates]:
    """All ways, with all numbers of threads and processes. Raises ValueError for a dataset at a URL."""
    index, settings, device = _opened(job)
    cores = len(os.sched_getaffinity(0))
    workers = [0, *counts(2 * cores)]
    ways = []
    for decode, read in itertools.product(counts(cores), _READ_THREADS):
        ways.append(own_way(index, job.seed, settings, batch, device, {"decode_threads": decode, "read_threads": read}))
    for prefetcher, count in itertools.product((False, True), workers):
        way = {"workers": count, "prefetcher": "on" if prefetcher else "off"}
        batches = partial(timm_batches, index, settings, batch, device, count, prefetcher)
        ways.append(Way(TIMM, way, batches, max(count, 1), 2 * count + 2))
    for count in counts(cores):
        ways.append(Way(OWN_DECODING, {"threads": count}, partial(decoded_by_dali, index, batch, device, count, {})))
    for count in workers:
        ways.append(Way(TIMM_DECODING, {"workers": count}, partial(decoded_by_pillow, index, batch, count), max(count, 1), 2 * count + 2))
    return measure(ways, images=images, batch=batch, device=device, rounds=rounds)


def gpu_sweep(job: JobData, *, images: int, batch: int, rounds: int) -> list[Rates]:
    """This loader and decoding alone on a GPU, by the share of images that its hardware decoder takes and by threads.

    Raises ValueError without a GPU, and for a dataset at a URL.
    """
    index, settings, device = _opened(job)
    if device.type != "cuda":
        raise ValueError("--gpu-sweep needs a GPU that torch sees, and engine.device=auto or cuda")
    ways = []
    for load, count in itertools.product(_HARDWARE_LOADS, counts(len(os.sched_getaffinity(0)))):
        loaded = {"hw_decoder_load": load}
        ways.append(own_way(index, job.seed, settings, batch, device, {**loaded, "decode_threads": count}))
        ways.append(Way(OWN_DECODING, {**loaded, "threads": count}, partial(decoded_by_dali, index, batch, device, count, loaded)))
    return measure(ways, images=images, batch=batch, device=device, rounds=rounds)


def _opened(job: JobData) -> tuple[Index, DataConfig, torch.device]:
    index = open_index(job.data.train, job.data.cache)
    if index.remote:
        raise ValueError(f"{index.place}: rates are measured on a folder; timm's workers read it by position")
    return index, replace(job.data, mixup=0.0, cutmix=0.0), job_device(job)


def job_device(job: JobData) -> torch.device:
    on_gpu = torch.cuda.is_available() if job.engine.device == "auto" else job.engine.device == "cuda"
    return torch.device("cuda", 0) if on_gpu else torch.device("cpu")


def counts(most: int) -> list[int]:
    """1, 2, 4, 8 … and `most`."""
    return sorted({2**power for power in range(most.bit_length()) if 2**power <= most} | {most})


# ---------------------------------------------------------------- the ways


def own_way(index: Index, seed: int, settings: DataConfig, batch: int, device: torch.device, changes: dict[str, Any]) -> Way:
    """This loader with other threads, or more, than the job has."""
    changed = replace(settings, **changes)

    @contextmanager
    def batches(count: int) -> Iterator[Iterator[Any]]:
        order = make_sample_order(index, changed, seed=seed, global_batch=batch)
        with TrainLoader(index, order, changed, Placement(device, micro_batch=batch), end=count) as loader:
            yield iter(loader)

    return Way(OWN, changes, batches, ahead=changed.read_threads + 8)  # read, and inside DALI


class ShardImages(Dataset):
    """A map-style dataset of `length` images of the shards, over and over, opened with Pillow; timm sets its transform."""

    def __init__(self, index: Index, length: int) -> None:
        self.index, self.length = index, length
        self.store = ShardStore(index)
        self.transform: Callable[[Image.Image], Any] | None = None

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: int) -> tuple[Any, int]:
        sample_id = number % len(self.index)
        image = Image.open(io.BytesIO(self.store.read(sample_id).tobytes())).convert("RGB")
        return self.transform(image) if self.transform else image, int(self.index.samples["label"][sample_id])


# Of DataConfig, what decides what is done to an image, and its name in timm's create_loader.
TIMM_NAMES = {
    "crop_area": "scale",
    "crop_ratio": "ratio",
    "flip": "hflip",
    "mean": "mean",
    "std": "std",
    "interpolation": "interpolation",
    "auto_augment": "auto_augment",
    "color_jitter": "color_jitter",
    "random_erasing": "re_prob",
    "erasing_count": "re_count",
}


def timm_recipe(settings: DataConfig) -> dict[str, Any]:
    """The settings as arguments of timm's create_loader."""
    recipe = {name: getattr(settings, own) for own, name in TIMM_NAMES.items()}
    return {**recipe, "color_jitter": settings.color_jitter or None, "re_mode": "pixel"}  # a jitter of 0 costs time, None does not


@contextmanager
def timm_batches(
    index: Index, settings: DataConfig, batch: int, device: torch.device, workers: int, prefetcher: bool, count: int
) -> Iterator[Iterator[Any]]:
    loader = create_loader(
        ShardImages(index, count * batch),  # type: ignore[arg-type]  # timm takes any map-style dataset with a transform
        input_size=(3, settings.image_size, settings.image_size),
        batch_size=batch,
        is_training=True,
        num_workers=workers,
        use_prefetcher=prefetcher,
        pin_memory=device.type == "cuda",
        device=device,
        **timm_recipe(settings),
    )
    if prefetcher:  # timm brings the batches to the device
        yield iter(loader)
    else:
        yield ((images.to(device, non_blocking=True), labels.to(device, non_blocking=True)) for images, labels in loader)


@contextmanager
def decoded_by_dali(
    index: Index, batch: int, device: torch.device, threads: int, options: dict[str, Any], count: int
) -> Iterator[Iterator[Any]]:
    with ShardStore(index) as store:
        encoded = [store.read(sample_id) for sample_id in range(min(_IN_MEMORY, len(index)))]
    again = itertools.cycle(encoded)
    pipeline = Pipeline(
        batch_size=batch,
        num_threads=threads,
        device_id=device.index if device.type == "cuda" else None,
        prefetch_queue_depth=2,
        exec_dynamic=True,
    )
    with pipeline:
        source: Any = fn.external_source(lambda: list(itertools.islice(again, batch)), batch=True, dtype=DALIDataType.UINT8)
        where = "mixed" if device.type == "cuda" else "cpu"
        pipeline.set_outputs(fn.decoders.image(source, device=where, output_type=DALIImageType.RGB, adjust_orientation=False, **options))
    pipeline.build()
    yield (pipeline.run() for _ in range(count))


@contextmanager
def decoded_by_pillow(index: Index, batch: int, workers: int, count: int) -> Iterator[Iterator[Any]]:
    dataset = ShardImages(index, count * batch)
    dataset.transform = lambda image: None  # decoded, and not kept
    yield iter(DataLoader(dataset, batch, shuffle=True, num_workers=workers, collate_fn=len))


# ---------------------------------------------------------------- measuring


def measure(ways: Sequence[Way], *, images: int, batch: int, device: torch.device, rounds: int) -> list[Rates]:
    """The rates of all ways, which take turns; every other round goes through them backwards."""
    found = [Rates(way) for way in ways]
    warnings.filterwarnings("ignore", message="This DataLoader will create .* worker processes")  # more than cores: that is tried too
    for number in range(rounds):
        for rates in found if number % 2 == 0 else reversed(found):
            # Whole turns of all that make batches side by side, or it would depend on the moment how many were just being made.
            counted = -(-max(images // batch, 2) // rates.way.at_a_time) * rates.way.at_a_time
            seconds, cpu_seconds = timed(rates.way, counted, device)
            rates.a_second.append(counted * batch / seconds)
            rates.a_cpu_second.append(counted * batch / cpu_seconds)
            print(f"round {number + 1} of {rounds}   {rates.a_second[-1]:7.0f} images/s   {rates.way}", file=sys.stderr, flush=True)
    return found


def timed(way: Way, counted: int, device: torch.device) -> tuple[float, float]:
    """Seconds, and seconds of CPU time, of `counted` batches after those that were made ahead, while more are to come."""
    with way.batches(way.ahead + counted + way.ahead) as batches:
        for _ in range(way.ahead):
            next(batches)
        _wait_for(device)
        began, used = time.perf_counter(), cpu_time()
        for _ in range(counted):
            next(batches)
        _wait_for(device)
        return time.perf_counter() - began, cpu_time() - used


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def cpu_time() -> float:
    """Seconds of CPU time that this process and those it started, as far as they still run, have used."""
    return time.process_time() + sum(sum(child.cpu_times()[:2]) for child in psutil.Process().children(recursive=True))


# ---------------------------------------------------------------- telling


def best(found: Sequence[Rates], name: str) -> Rates:
    """The number of threads or processes with which a way is fastest, by its median."""
    return max((rates for rates in found if rates.way.name == name), key=lambda rates: statistics.median(rates.a_second))


def ratios(found: Sequence[Rates]) -> dict[str, dict[str, float]]:
    """The best of this loader to the best of each other way, and timm's to its own ceiling: medians of the rounds' ratios."""
    names = {rates.way.name for rates in found}
    pairs = [(OWN, TIMM), (OWN, OWN_DECODING), (TIMM, TIMM_DECODING)]
    result = {}
    for one, other in pairs:
        if {one, other} <= names:
            a, b = best(found, one), best(found, other)
            result[f"{one} to {other}"] = {
                "rate": statistics.median(x / y for x, y in zip(a.a_second, b.a_second, strict=True)),
                "rate_for_each_busy_core": statistics.median(x / y for x, y in zip(a.a_cpu_second, b.a_cpu_second, strict=True)),
            }
    return result


def table(found: Sequence[Rates]) -> list[str]:
    """The medians, a line a way and setting with the best of each way marked, and the ratios."""
    marked = {id(best(found, rates.way.name)) for rates in found}
    lines = ["", f"{'images/s':>10} {'a busy core':>12}"]
    for rates in found:
        mark = "*" if id(rates) in marked else " "
        lines.append(f"{statistics.median(rates.a_second):>10.0f} {statistics.median(rates.a_cpu_second):>12.0f} {mark} {rates.way}")
    lines += ["", f"{'rate':>10} {'a busy core':>12}   the best (*) of"]
    for pair, ratio in ratios(found).items():
        lines.append(f"{ratio['rate']:>10.2f} {ratio['rate_for_each_busy_core']:>12.2f}   {pair}")
    return lines


def as_result(found: Sequence[Rates], device: torch.device) -> dict[str, Any]:
    """What is to be kept: all rounds of all ways, and the ratios."""
    rows = [
        {"way": rates.way.name, **rates.way.settings, "images_a_second": rates.a_second, "images_a_cpu_second": rates.a_cpu_second}
        for rates in found
    ]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {"device": name, "torch_threads": torch.get_num_threads(), "rows": rows, "ratios": ratios(found)}
