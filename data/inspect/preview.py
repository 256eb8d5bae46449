"""Draws what the network is given, for a person to judge: augmented and mixed batches, and the evaluation view of the val set.

    python -m data preview CONFIG --out grid.png [--epoch 0] [--steps 0:2] [key=value …]

The pictures come through the loaders of a training, on the CPU, and have only the normalisation undone. Under each stands what was
drawn for it (parameters.py); its place in the sample order is that of its slot.
"""

import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from data.augment.mixup import mix_pairs
from data.augment.recipe import Recipe
from data.common.placement import Placement
from data.dataset.index import Index, open_index
from data.inspect.parameters import parameters
from data.inspect.report import saved, short
from data.loader.loaders import EvalLoader, TrainLoader, compute_resized_shape
from data.loader.order import SampleOrder, make_sample_order
from data.settings import DataConfig, JobData

IMAGES = 16  # of a step
_ACROSS = 8
_CELL = 1.8  # inches of a picture's side
_LINE = 0.12  # inches of a line of text under it
_CHARACTERS = 36  # that fit on it
_CPU = torch.device("cpu")


@dataclass(frozen=True, eq=False)
class Picture:
    """`pixels` are RGB, float32 (H, W, 3) from 0 to 1; `about` the lines under them."""

    pixels: np.ndarray
    title: str
    about: list[str]


def preview(job: JobData, out: Path, *, epoch: int, steps: Sequence[int], images: int = IMAGES) -> None:
    """Writes a .png with the first slots, at most `images`, of each of these steps of the epoch, and with as many samples of
    data.val, where there is one.

    Raises ValueError for another kind of file, and for steps that the epoch does not have.
    """
    if out.suffix != ".png":
        raise ValueError(f"{out}: a preview is a .png")
    index = open_index(job.data.train, job.data.cache)
    order = make_sample_order(index, job.data, seed=job.seed, global_batch=job.global_batch)
    sections = {}
    for step in steps:
        pictures = trained_on(index, order, job.data, epoch, step, images)
        sections[f"{index.place}   epoch {epoch}, step {step}: slots 0 to {len(pictures) - 1} of {job.global_batch}"] = pictures
    if job.data.val:
        val = open_index(job.data.val, job.data.cache)
        how = "squashed" if job.data.eval_resize == "squash" else f"their centres, {job.data.eval_crop:g} of the shorter side"
        sections[f"{val.place}   as evaluation sees it: {how}"] = evaluated_on(val, job.data, images)
    with warnings.catch_warnings(action="ignore"):  # matplotlib's, of class names in letters that its font lacks
        out.write_bytes(_drawn(sections))


def trained_on(index: Index, order: SampleOrder, settings: DataConfig, epoch: int, step: int, images: int) -> list[Picture]:
    """The first slots of a step, as many as divide the global batch."""
    mixes = bool(settings.mixup or settings.cutmix)
    fit = [count for count in range(1, min(images, order.global_batch) + 1) if order.global_batch % count == 0]
    shown = max(count for count in fit if count % 2 == 0 or not mixes)
    start = epoch * order.steps_per_epoch + step
    ids = order.batch(epoch, step)[:shown]  # and so an error for a step that there isn't
    with TrainLoader(index, order, settings, Placement(_CPU, micro_batch=shown), start=start, end=start + 1) as loader:
        batch = next(iter(loader))
    pixels, own, partner = batch.images, batch.labels, batch.labels
    weight = torch.ones(shown)
    if batch.mix is not None:
        pixels, targets, weight = mix_pairs(batch.images, batch.labels, batch.mix)
        own, partner = targets.unbind(1)
    names = [short(name) for name in index.classes]
    titles = [
        names[label] if label == other or share == 1 else f"{names[label]} {share:.0%}\n{names[other]} {1 - share:.0%}"
        for label, other, share in zip(own.tolist(), partner.tolist(), weight.tolist(), strict=True)
    ]
    drawn = parameters(Recipe(order.seed, settings), epoch, ids, order.copies[:shown], index)
    about = [[f"{name} {value}" for name, value in own.items()] for own in drawn]
    return [Picture(*cell) for cell in zip(_unnormalised(pixels, settings), titles, about, strict=True)]


def evaluated_on(index: Index, settings: DataConfig, images: int) -> list[Picture]:
    """Samples from all over the dataset."""
    first = Placement(_CPU, micro_batch=images, ranks=max(1, len(index) // images))
    with EvalLoader(index, settings, first) as loader:
        batch = next(iter(loader))
    rows = index.samples[batch.ids]
    resized = compute_resized_shape(rows["width"], rows["height"], settings)
    about = [
        [f"{width} x {height} → {w} x {h}"]
        for width, height, (h, w) in zip(rows["width"].tolist(), rows["height"].tolist(), resized.tolist(), strict=True)
    ]
    titles = [short(index.classes[label]) for label in batch.labels.tolist()]
    return [Picture(*cell) for cell in zip(_unnormalised(batch.images, settings), titles, about, strict=True)]


def _unnormalised(images: torch.Tensor, settings: DataConfig) -> np.ndarray:
    """float32 (B, H, W, 3), from 0 to 1."""
    pixels = images.permute(0, 2, 3, 1).numpy() * np.array(settings.std, np.float32) + np.array(settings.mean, np.float32)
    return pixels.clip(0, 1)


def _drawn(sections: dict[str, list[Picture]]) -> bytes:
    texts = {
        title: ["\n".join(textwrap.fill(line, _CHARACTERS, subsequent_indent="  ") for line in picture.about) for picture in pictures]
        for title, pictures in sections.items()
    }
    heights = []
    for title, pictures in sections.items():
        lines = 4 + max(text.count("\n") for text in texts[title])
        heights.append(0.4 + -(-len(pictures) // _ACROSS) * (_CELL + _LINE * lines))
    figure = Figure(figsize=(_ACROSS * _CELL, sum(heights)), layout="constrained")
    parts = figure.subfigures(len(sections), 1, squeeze=False, height_ratios=heights).ravel()
    for part, (title, pictures) in zip(parts, sections.items(), strict=True):
        part.suptitle(title, x=0.01, ha="left", fontsize=9, family="monospace", parse_math=False)
        cells = part.subplots(-(-len(pictures) // _ACROSS), _ACROSS, squeeze=False).ravel()
        for axes in cells[len(pictures) :]:
            axes.set_axis_off()
        for axes, picture, text in zip(cells, pictures, texts[title], strict=False):
            axes.imshow(picture.pixels)
            axes.set_title(picture.title, fontsize=7, parse_math=False)
            axes.set_xlabel(text, fontsize=5.5, family="monospace", loc="left", parse_math=False)
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
    return saved(figure, dpi=160)
