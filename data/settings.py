"""Defines the settings that decide a job's batches: `seed`, `global_batch`, the section `data:` and part of `engine:`.

The data commands read JobData; pretrain/config.py extends it to a job's whole schema. Defaults are those of the ImageNet-22K recipe, except
that RandAugment and random erasing are off.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from data.common import config_files
from data.common.fields import MISSING, Check, above_0_to_1, at_least, below_1, from_0_to_1, must_be, parsed_by, positive, setting

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Policy:
    """RandAugment: `layers` operators, each applied with a probability.

    A magnitude is drawn with a standard deviation of magnitude_std (uniformly in [0, magnitude] if magnitude_std is infinite) and
    clipped to [0, magnitude_max]. With `increasing`, every operator becomes stronger with its magnitude.
    """

    magnitude: int = 10
    layers: int = 2
    probability: float = 0.5
    magnitude_std: float = 0.0
    magnitude_max: int = 10
    increasing: bool = False


def parse_policy(text: str) -> Policy:
    """Parses a configuration string of timm, such as rand-m9-mstd0.5-inc1.

    Raises ValueError if the policy is not RandAugment or a section is unknown or unsupported.
    """
    kind, *sections = text.split("-")
    if kind != "rand":
        raise ValueError("must be RandAugment, such as rand-m9-mstd0.5-inc1")
    values = {}
    for section in sections:
        match = re.fullmatch(r"(m|n|p|mstd|mmax|inc)(\d+(?:\.\d+)?|inf)", section)
        if match is None or ("." in match[2] and match[1] not in ("p", "mstd")):
            raise ValueError(f"{section!r}: expected m, n, mmax or inc with a whole number, mstd or p with a number, as in m9")
        values[match[1]] = float(match[2])
    std = values.get("mstd", 0.0)
    policy = Policy(
        magnitude=int(values.get("m", 10)),
        layers=int(values.get("n", 2)),
        probability=values.get("p", 0.5),
        magnitude_std=math.inf if std > 100 else std,
        magnitude_max=int(values.get("mmax", 10)),
        increasing=bool(values.get("inc", 0)),
    )
    if not 0 <= policy.probability <= 1 or policy.layers < 1:
        raise ValueError("p must be a probability, 0 to 1, and n at least 1")
    return policy


def _dataset_problem(place: str) -> str | None:
    from data.storage.remote import is_url  # imports asyncio, which only commands that open a dataset need

    folder = Path(place)
    if is_url(place) or (folder / "dataset.json").is_file():
        return None
    problem = "no dataset.json in it" if folder.is_dir() else "no such folder"
    return f"{problem}; make it with: python -m data pack IMAGES {folder.parent} --split {folder.name}"


dataset = Check("a folder or URL of packed shards", _dataset_problem)
policy = parsed_by("RandAugment in timm's notation", parse_policy)
fractions_of_area = must_be("two fractions of an area, the smaller first", lambda area: 0 < area[0] <= area[1] <= 1)
above_0 = must_be("each more than 0", lambda numbers: min(numbers) > 0)
ratios = must_be("more than 0, the smaller first", lambda ratio: 0 < ratio[0] <= ratio[1])


@dataclass
class DataConfig:
    train: str = setting(MISSING, "Images to train on, packed by `python -m data pack`.", dataset, resume="free", on_node=True)
    val: str | None = setting(None, "Images to evaluate on; null: no evaluation.", dataset, resume="free", on_node=True)
    val_except: list[str] = setting(
        [], "Classes of `data.val` whose images are not evaluated, such as those that the head lacks.", resume="free"
    )
    cache: str | None = setting(
        None, "Folder for local copies of shards at URLs; null: a folder in `$SLURM_TMPDIR` or `$TMPDIR`.", resume="free"
    )
    cache_gb: float = setting(100.0, "Size of the cache of each dataset, in GB (10^9 bytes).", positive, resume="free")
    check: Literal["sizes", "checksums"] = setting(
        "sizes",
        "Check of all shards at startup. sizes: only their sizes; checksums: also every byte of those in folders.",
        resume="free",
    )
    max_bad: float = setting(0.001, "Fraction of a dataset's images that may be bad before the job ends.", below_1, resume="free")
    image_size: int = setting(224, "Height and width of the model's input images, in pixels.", positive)
    crop_area: tuple[float, float] = setting(
        (0.08, 1.0), "Random resized crop: smallest and largest fraction of the image's area.", fractions_of_area
    )
    crop_ratio: tuple[float, float] = setting((3 / 4, 4 / 3), "Random resized crop: smallest and largest ratio of width to height.", ratios)
    interpolation: Literal["bilinear", "bicubic", "random"] = setting(
        "bicubic", "Interpolation of crops and of RandAugment's geometric operators; random: one of the two for each image."
    )
    flip: float = setting(0.5, "Probability of a horizontal flip.", from_0_to_1)
    auto_augment: str | None = setting(None, "RandAugment, such as `rand-m9-mstd0.5-inc1`; null: off.", policy)
    color_jitter: float = setting(
        0.0, "Strength of random changes in brightness, contrast and saturation. As in timm, off if RandAugment is on.", at_least(0)
    )
    random_erasing: float = setting(0.0, "Probability that boxes of an image are replaced by noise.", from_0_to_1)
    erasing_count: int = setting(1, "Largest number of boxes that random erasing replaces in an image.", positive)
    repeats: int = setting(
        1, "Copies of a sample in a global batch, each augmented differently; multiplies the steps of an epoch.", positive, resume="fixed"
    )
    mixup: float = setting(0.8, "Alpha of the Beta distribution of mixup; 0: off.", at_least(0))
    cutmix: float = setting(1.0, "Alpha of the Beta distribution of cutmix; 0: off.", at_least(0))
    mix_switch: float = setting(0.5, "Probability of cutmix if mixup and cutmix are both on.", from_0_to_1)
    mean: tuple[float, float, float] = setting(IMAGENET_MEAN, "Mean of each color channel, from 0 to 1, for the normalization.")
    std: tuple[float, float, float] = setting(IMAGENET_STD, "Standard deviation of each color channel, for the normalization.", above_0)
    eval_resize: Literal["crop", "squash"] = setting(
        "crop", "Evaluation. crop: the shorter side is resized to image_size / eval_crop, then a center crop; squash: resized to a square."
    )
    eval_crop: float = setting(0.875, "Evaluation: side of the center crop as a fraction of the resized shorter side.", above_0_to_1)
    lanes: int = setting(64, "Streams of shards that a global batch mixes.", positive, resume="fixed")
    window: int = setting(2048, "Samples of a lane that are shuffled together.", positive, resume="fixed")
    decode_threads: int = setting(4, "CPU threads of DALI on each rank.", positive, resume="free")
    hw_decoder_load: float = setting(
        0.65, "Fraction of JPEGs for a GPU's hardware decoder, if it has one; CUDA kernels decode the rest.", from_0_to_1, resume="free"
    )
    read_threads: int = setting(
        4, "Threads on each rank that read encoded images; each reads one micro-batch ahead.", positive, resume="free"
    )


@dataclass
class JobEngine:
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "Device to train on; auto: a GPU if there is one.", resume="free")
    micro_batch: int = setting(64, "Samples that a rank processes at once; even if mixup or cutmix is on.", positive, resume="free")


@dataclass
class JobData:
    seed: int = setting(0, "Seed of sample order, augmentation, weights and drop path.", resume="fixed")
    global_batch: int = setting(MISSING, "Samples per optimizer step, whatever the number of ranks.", positive, resume="fixed")
    data: DataConfig = field(default_factory=DataConfig)
    engine: JobEngine = field(default_factory=JobEngine)


def data_conflicts(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yields (key, problem) for values of JobData that conflict with each other. Keys may be absent."""
    if (values.get("data.mixup") or values.get("data.cutmix")) and values.get("engine.micro_batch", 0) % 2:
        yield "engine.micro_batch", "must be even: mixup and cutmix mix neighbors in pairs"


def load_job(path: str | Path, overrides: Sequence[str] = ()) -> JobData:
    """Reads the settings of a job's batches. Raises ConfigError, which lists every problem with these settings."""
    return config_files.resolve(JobData, path, overrides, data_conflicts, sections=["data"])[0]
