"""What a job may choose of its data: the `data:` section of a configuration, and what the loaders take.

`train` and `val` are packed datasets: folders, or URLs (s3://, gs://, https://) that are read through the cache. The defaults are
those of the ImageNet-22K recipe.
"""

from dataclasses import dataclass
from typing import Literal

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass
class DataConfig:
    train: str = "???"  # folder or URL of packed shards (python -m data pack); has no default
    val: str | None = None  # folder or URL of packed shards to evaluate on; none: no evaluation
    cache: str | None = None  # folder for local copies of what lies at URLs; none: one in $SLURM_TMPDIR or $TMPDIR
    cache_gb: float = 100.0  # of shards that it may hold, of each dataset (10^9 bytes)
    check: Literal["sizes", "checksums"] = "sizes"  # of all shards at the start; checksums reads every byte of those in folders
    max_bad: float = 0.001  # share of a dataset's images that may turn out bad before the job gives up
    image_size: int = 224
    crop_area: tuple[float, float] = (0.08, 1.0)  # random resized crop: share of the image's area
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)  # and its width to height
    flip: float = 0.5  # probability of a horizontal flip
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
    read_threads: int = 4  # threads that read encoded images, a rank; each reads one micro-batch ahead of need
