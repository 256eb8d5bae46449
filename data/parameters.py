"""What is drawn for each sample, in words, for people to read: the parameters of augment.py as the loader asks for them.

for slot, (sample_id, drawn) in enumerate(zip(ids, parameters(seed, epoch, ids, index, settings))):
    print(slot, sample_id, drawn)        # {"crop": "y 12 x 34 h 200 w 180", "flip": "yes", "mix": "cutmix 0.63 …"}
"""

import numpy as np

from data.augment import flip, mix_parameters, random_resized_crop
from data.index import Index, key
from data.order import SampleOrder
from data.settings import DataConfig, JobData


def job_order(job: JobData, index: Index) -> SampleOrder:
    """The order in which a job takes the samples of its training set."""
    return SampleOrder(index.shard_start, job.seed, job.global_batch, job.data.lanes, job.data.window)


def parameters(seed: int, epoch: int, ids: np.ndarray, index: Index, settings: DataConfig) -> list[dict[str, str]]:
    """Of samples in the order of their slots, from an even one on: the name of each parameter and its value. `mix` is there where
    something is mixed; both samples of a pair have the same."""
    rows = index.samples[ids]
    crops = random_resized_crop(seed, epoch, ids, rows["width"], rows["height"], scale=settings.crop_area, ratio=settings.crop_ratio)
    columns = {
        "crop": [f"y {y} x {x} h {h} w {w}" for y, x, h, w in crops.tolist()],
        "flip": ["yes" if flipped else "no" for flipped in flip(seed, epoch, ids, settings.flip).tolist()],
    }
    if settings.mixup or settings.cutmix:
        columns["mix"] = np.repeat(_mixes(seed, epoch, ids[::2], settings), 2)[: len(ids)].tolist()
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _mixes(seed: int, epoch: int, even_ids: np.ndarray, settings: DataConfig) -> list[str]:
    mix = mix_parameters(
        seed,
        epoch,
        even_ids,
        image_size=settings.image_size,
        mixup=settings.mixup,
        cutmix=settings.cutmix,
        switch=settings.mix_switch,
    )
    texts = []
    for (y0, y1, x0, x1), share in zip(mix.box.tolist(), mix.lam.tolist(), strict=True):
        cut = y1 > y0 and x1 > x0
        texts.append(f"cutmix {share:.2f} y {y0}:{y1} x {x0}:{x1}" if cut else f"mixup {share:.2f}")
    return texts


def lines(epoch: int, step: int, ids: np.ndarray, drawn: list[dict[str, str]], index: Index) -> list[str]:
    """A line a slot of a step's global batch: name=value, two blanks apart."""
    labels = index.samples["label"][ids].tolist()
    found = []
    for slot, (sample_id, label, own) in enumerate(zip(ids.tolist(), labels, drawn, strict=True)):
        about = {"epoch": epoch, "step": step, "slot": slot, "key": key(index, sample_id), "class": index.classes[label]}
        found.append("  ".join(f"{name}={value}" for name, value in {**about, **own}.items()))
    return found
