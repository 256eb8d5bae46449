"""What a job may choose of its data: the `data:` section of a configuration, and what the loaders take.

`train` and `val` are packed datasets: folders, or URLs (s3://, gs://, https://) that are read through the cache. The defaults are
those of the ImageNet-22K recipe, but for RandAugment and random erasing, which are off. JobData is all that decides a job's batches: what
the data commands read of its configuration.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from data.augment.randaugment import parse_policy
from data.storage.remote import is_url

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass
class DataConfig:
    train: str = "???"  # folder or URL of packed shards (python -m data pack); has no default
    val: str | None = None  # folder or URL of packed shards to evaluate on; none: no evaluation
    val_except: list[str] = field(default_factory=list)  # classes of val whose images evaluation leaves out: those that the head lacks
    cache: str | None = None  # folder for local copies of what lies at URLs; none: one in $SLURM_TMPDIR or $TMPDIR
    cache_gb: float = 100.0  # of shards that it may hold, of each dataset (10^9 bytes)
    check: Literal["sizes", "checksums"] = "sizes"  # of all shards at the start; checksums reads every byte of those in folders
    max_bad: float = 0.001  # share of a dataset's images that may turn out bad before the job gives up
    image_size: int = 224
    crop_area: tuple[float, float] = (0.08, 1.0)  # random resized crop: share of the image's area
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)  # and its width to height
    interpolation: Literal["bilinear", "bicubic", "random"] = "bicubic"  # of crops to their size, and of RandAugment's geometry
    flip: float = 0.5  # probability of a horizontal flip
    auto_augment: str | None = None  # RandAugment in timm's words, such as rand-m9-mstd0.5-inc1; none: off
    color_jitter: float = 0.0  # of brightness, contrast and saturation; as in timm, off while auto_augment is on
    random_erasing: float = 0.0  # probability that a box becomes noise, each pixel its own
    erasing_count: int = 1  # boxes at most
    repeats: int = 1  # times that a sample is in a global batch, each time augmented otherwise; an epoch has as many times more steps
    mixup: float = 0.8  # alpha of mixup's Beta distribution; 0: off
    cutmix: float = 1.0  # alpha of cutmix's; 0: off
    mix_switch: float = 0.5  # probability of cutmix where both are on
    mean: tuple[float, float, float] = IMAGENET_MEAN  # of the normalisation, in units of full intensity
    std: tuple[float, float, float] = IMAGENET_STD
    eval_resize: Literal["crop", "squash"] = "crop"  # shorter side to size / eval_crop and a centre crop, or straight to the size
    eval_crop: float = 0.875
    lanes: int = 64  # streams of shards that one global batch mixes
    window: int = 2048  # samples of a lane that are shuffled together
    decode_threads: int = 4  # DALI's CPU threads, a rank
    hw_decoder_load: float = 0.65  # share of JPEGs that a GPU's own decoder takes, where it has one; CUDA kernels take the others
    read_threads: int = 4  # threads that read encoded images, a rank; each reads one micro-batch ahead of need


@dataclass
class JobEngine:
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: a GPU where there is one
    micro_batch: int = 64  # samples a rank takes through the network at once


@dataclass
class JobData:
    seed: int = 0
    global_batch: int = "???"  # type: ignore[assignment]  # samples in an optimizer step; has no default
    data: DataConfig = field(default_factory=DataConfig)
    engine: JobEngine = field(default_factory=JobEngine)


def invalid_data(values: dict[str, Any]) -> list[tuple[str, str]]:
    """(key, what is wrong) of the values, by dotted key of JobData, that have the right type but can't work. Keys may be absent."""
    wrong: list[tuple[str, str]] = []
    for key in ("data.train", "data.val"):
        folder = values.get(key)
        if folder is not None and not is_url(folder) and not (Path(folder) / "dataset.json").is_file():
            what = "no such folder" if not Path(folder).is_dir() else "no dataset.json in it"
            wrong.append((key, f"{what}; make it with: python -m data pack IMAGES {Path(folder).parent} --split {Path(folder).name}"))
    positive = ["global_batch", "data.image_size", "data.lanes", "data.window", "data.decode_threads", "data.read_threads"]
    positive += ["data.cache_gb", "data.erasing_count", "data.repeats", "engine.micro_batch"]
    wrong += failing(values, positive, lambda value: 0 < value < math.inf, "must be more than 0 and finite")
    at_least_0 = ["data.mixup", "data.cutmix", "data.color_jitter"]
    wrong += failing(values, at_least_0, lambda value: 0 <= value < math.inf, "must be at least 0 and finite")
    probabilities = ["data.flip", "data.mix_switch", "data.random_erasing"]
    wrong += failing(values, probabilities, lambda value: 0 <= value <= 1, "must be a probability, 0 to 1")
    wrong += failing(values, ["data.max_bad"], lambda value: 0 <= value < 1, "must be at least 0 and less than 1")
    wrong += failing(values, ["data.hw_decoder_load"], lambda value: 0 <= value <= 1, "must be a share, 0 to 1")
    if values.get("data.auto_augment") is not None:
        try:
            parse_policy(values["data.auto_augment"])
        except ValueError as error:
            wrong.append(("data.auto_augment", str(error)))
    wrong += failing(values, ["data.eval_crop"], lambda value: 0 < value <= 1, "must be a share, more than 0 and at most 1")
    shares = "must be two shares of an area, the smaller first"
    wrong += failing(values, ["data.crop_area"], lambda area: 0 < area[0] <= area[1] <= 1, shares)
    in_order = "must be more than 0, the smaller first"
    wrong += failing(values, ["data.crop_ratio"], lambda ratio: 0 < ratio[0] <= ratio[1] < math.inf, in_order)
    if values.get("data.mixup") or values.get("data.cutmix"):
        even = "must be even: mixup and cutmix mix neighbours in pairs"
        wrong += failing(values, ["engine.micro_batch"], lambda micro: micro % 2 == 0, even)
    return wrong


def failing(values: dict[str, Any], keys: Sequence[str], holds: Callable[[Any], bool], text: str) -> list[tuple[str, str]]:
    """(key, text) of the values that are set and for which it does not hold."""
    return [(key, text) for key in keys if values.get(key) is not None and not holds(values[key])]
