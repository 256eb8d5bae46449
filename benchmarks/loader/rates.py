"""Measures the images per second of a job's data loader, of timm's loader, and of decoding alone.

Both loaders read the same shards and apply the same crops, flips, interpolation and augmentation, without mixup and cutmix. timm gets a
map-style dataset that reads an image from its shard and opens it with Pillow. Every loader is measured with several numbers of threads or
processes; all cases take turns, and the setting with the best median represents its loader. The clock starts after as many batches as a
loader prefetches and stops while more are to come. CPU time counts all threads and processes; the images per CPU second depend less on
other load of the machine.
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
from torch.utils.data import Dataset

from benchmarks.harness import median_ratio, run_in_turns, synchronize, time_call
from data.common.placement import Placement
from data.dataset.index import Index, open_index
from data.loader.loaders import TrainLoader
from data.loader.order import make_sample_order
from data.loader.store import ShardStore
from data.settings import DataConfig, JobData

OURS, TIMM = "this loader", "timm"
DECODING = "DALI, decoding whole images alone"
PACKAGES = ("torch", "nvidia-dali-cuda130", "timm", "pillow", "numpy")
_HARDWARE_LOADS = (0.0, 0.12, 0.35, 0.65, 0.9)  # values of hw_decoder_load
_READ_THREADS = (1, 2, 4)
_IN_MEMORY = 512  # encoded images that decoding alone repeats

Batches = Callable[[int], AbstractContextManager[Iterator[Any]]]  # opens a loader of that many batches


@dataclass(frozen=True)
class Case:
    """A loader and its settings. `parallel`: batches made in parallel. `prefetched`: batches made before the first is taken."""

    name: str
    settings: dict[str, Any]
    batches: Batches
    parallel: int = 1
    prefetched: int = 8

    def __str__(self) -> str:
        return f"{self.name}: {', '.join(f'{name} {value}' for name, value in self.settings.items())}"


@dataclass
class Rates:
    """Images per second, and per second of CPU time, of each round of a case."""

    case: Case
    per_s: list[float] = field(default_factory=list)
    per_cpu_s: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.per_s)


def compare_with_timm(job: JobData, *, images: int, batch: int, rounds: int) -> list[Rates]:
    """Measures this loader, timm's and decoding alone, each with several numbers of threads or processes.

    Each case makes `images`, at least two batches, in each of its turns. Raises ValueError for a dataset at a URL.
    """
    index, settings, device = _open(job)
    cores = len(os.sched_getaffinity(0))
    workers = [0, *list_counts(2 * cores)]
    cases = []
    for decode, read in itertools.product(list_counts(cores), _READ_THREADS):
        cases.append(make_case(index, job.seed, settings, batch, device, {"decode_threads": decode, "read_threads": read}))
    for prefetcher, count in itertools.product((False, True), workers):
        batches = partial(timm_batches, index, settings, batch, device, count, prefetcher)
        cases.append(Case(TIMM, {"workers": count, "prefetcher": "on" if prefetcher else "off"}, batches, max(count, 1), 2 * count + 2))
    for count in list_counts(cores):
        cases.append(Case(DECODING, {"threads": count}, partial(decode_with_dali, index, batch, device, count, {})))
    return measure(cases, images=images, batch=batch, device=device, rounds=rounds)


def sweep_gpu(job: JobData, *, images: int, batch: int, rounds: int) -> list[Rates]:
    """Measures this loader and decoding alone on a GPU, by the load of its hardware decoder and by threads.

    Raises ValueError without a GPU, and for a dataset at a URL.
    """
    index, settings, device = _open(job)
    if device.type != "cuda":
        raise ValueError("--gpu-sweep needs a GPU that torch sees, and engine.device=auto or cuda")
    cases = []
    for load, count in itertools.product(_HARDWARE_LOADS, list_counts(len(os.sched_getaffinity(0)))):
        options = {"hw_decoder_load": load}
        cases.append(make_case(index, job.seed, settings, batch, device, {**options, "decode_threads": count}))
        cases.append(Case(DECODING, {**options, "threads": count}, partial(decode_with_dali, index, batch, device, count, options)))
    return measure(cases, images=images, batch=batch, device=device, rounds=rounds)


def _open(job: JobData) -> tuple[Index, DataConfig, torch.device]:
    index = open_index(job.data.train, job.data.cache)
    if index.remote:
        raise ValueError(f"{index.place}: rates are measured on a folder; timm's workers read it by position")
    return index, replace(job.data, mixup=0.0, cutmix=0.0), choose_device(job)


def choose_device(job: JobData) -> torch.device:
    on_gpu = torch.cuda.is_available() if job.engine.device == "auto" else job.engine.device == "cuda"
    return torch.device("cuda", 0) if on_gpu else torch.device("cpu")


def list_counts(most: int) -> list[int]:
    """Returns 1, 2, 4, 8 … and `most`."""
    return sorted({2**power for power in range(most.bit_length()) if 2**power <= most} | {most})


# ---------------------------------------------------------------- loaders


def make_case(index: Index, seed: int, settings: DataConfig, batch: int, device: torch.device, changes: dict[str, Any]) -> Case:
    """Makes the case of this loader with `changes` to the job's settings."""
    changed = replace(settings, **changes)

    @contextmanager
    def batches(count: int) -> Iterator[Iterator[Any]]:
        order = make_sample_order(index, changed, seed=seed, global_batch=batch)
        with TrainLoader(index, order, changed, Placement(device, micro_batch=batch), end=count) as loader:
            yield iter(loader)

    return Case(OURS, changes, batches, prefetched=changed.read_threads + 8)  # read, and inside DALI


class ShardImages(Dataset):
    """A map-style dataset that repeats the images of the shards up to `length`, opened with Pillow; timm sets its transform."""

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


# The fields of DataConfig that change an image, with their names in timm's create_loader.
TIMM_NAMES = {
    "crop_area": "scale", "crop_ratio": "ratio", "flip": "hflip", "mean": "mean", "std": "std", "interpolation": "interpolation",
    "auto_augment": "auto_augment", "color_jitter": "color_jitter", "random_erasing": "re_prob", "erasing_count": "re_count",
}  # fmt: skip


def to_timm_arguments(settings: DataConfig) -> dict[str, Any]:
    """Converts the settings to arguments of timm's create_loader."""
    recipe = {timm_name: getattr(settings, name) for name, timm_name in TIMM_NAMES.items()}
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
        **to_timm_arguments(settings),
    )
    if prefetcher:  # timm brings the batches to the device
        yield iter(loader)
    else:
        yield ((images.to(device, non_blocking=True), labels.to(device, non_blocking=True)) for images, labels in loader)


@contextmanager
def decode_with_dali(
    index: Index, batch: int, device: torch.device, threads: int, options: dict[str, Any], count: int
) -> Iterator[Iterator[Any]]:
    with ShardStore(index) as store:
        encoded = [store.read(sample_id) for sample_id in range(min(_IN_MEMORY, len(index)))]
    repeated = itertools.cycle(encoded)
    device_id = device.index if device.type == "cuda" else None
    pipeline = Pipeline(batch_size=batch, num_threads=threads, device_id=device_id, prefetch_queue_depth=2, exec_dynamic=True)
    with pipeline:
        source: Any = fn.external_source(lambda: list(itertools.islice(repeated, batch)), batch=True, dtype=DALIDataType.UINT8)
        decoder = "mixed" if device.type == "cuda" else "cpu"
        pipeline.set_outputs(fn.decoders.image(source, device=decoder, output_type=DALIImageType.RGB, adjust_orientation=False, **options))
    pipeline.build()
    yield (pipeline.run() for _ in range(count))


# ---------------------------------------------------------------- measurement


def measure(cases: Sequence[Case], *, images: int, batch: int, device: torch.device, rounds: int) -> list[Rates]:
    """Measures all cases in turns.

    The images of a turn are rounded up to whole groups of parallel batches. Otherwise the rate would depend on how many of these are half
    done when the clock starts.
    """
    warnings.filterwarnings("ignore", message="This DataLoader will create .* worker processes")  # more than cores is measured too

    def run(rates: Rates) -> None:
        counted = -(-max(images // batch, 2) // rates.case.parallel) * rates.case.parallel
        wall, cpu = time_case(rates.case, counted, device)
        rates.per_s.append(counted * batch / wall)
        rates.per_cpu_s.append(counted * batch / cpu)
        print(f"{rates.per_s[-1]:7.0f} images/s   {rates.case}", file=sys.stderr, flush=True)

    measured = [Rates(case) for case in cases]
    run_in_turns({str(number): partial(run, rates) for number, rates in enumerate(measured)}, rounds)
    return measured


def time_case(case: Case, counted: int, device: torch.device) -> tuple[float, float]:
    """Returns wall-clock and CPU seconds of `counted` batches after the prefetched ones, while more are to come."""
    with case.batches(case.prefetched + counted + case.prefetched) as batches:

        def take(count: int) -> None:
            for _ in range(count):
                next(batches)
            synchronize(device)

        take(case.prefetched)
        used = cpu_time()
        return time_call(lambda: take(counted)), cpu_time() - used


def cpu_time() -> float:
    """Returns the CPU seconds of this process and of its running children."""
    return time.process_time() + sum(sum(child.cpu_times()[:2]) for child in psutil.Process().children(recursive=True))


def find_best(measured: Sequence[Rates], name: str) -> Rates:
    """Returns the rates of a loader at the setting with the highest median."""
    return max((rates for rates in measured if rates.case.name == name), key=lambda rates: rates.median)


def compute_ratios(measured: Sequence[Rates]) -> list[dict[str, Any]]:
    """Returns a row for each pair of loaders, each at its best setting: medians of the rounds' ratios."""
    names = {rates.case.name for rates in measured}
    rows = []
    for name, other in [(OURS, TIMM), (OURS, DECODING)]:
        if {name, other} <= names:
            one, two = find_best(measured, name), find_best(measured, other)
            rate, cpu = median_ratio(one.per_s, two.per_s), median_ratio(one.per_cpu_s, two.per_cpu_s)
            rows.append({"ratio": f"{name} to {other}", "images_per_s": rate, "images_per_cpu_s": cpu})
    return rows


def list_rows(measured: Sequence[Rates]) -> list[dict[str, Any]]:
    """Returns a row for each case, with all rounds."""
    return [
        {"case": rates.case.name, **rates.case.settings, "images_per_s": rates.per_s, "images_per_cpu_s": rates.per_cpu_s}
        for rates in measured
    ]
