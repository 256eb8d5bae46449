"""Draws the images that a job's network receives: augmented and mixed batches, and the evaluation view of the val set.

    python -m data preview CONFIG --out grid.png [--epoch 0] [--steps 0:2] [key=value …]

The images come from the training and evaluation loaders, on the CPU; only the normalization is undone. The text under an image lists
its augmentation parameters (parameters.py). Images are in slot order.
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
from data.inspect.parameters import list_parameters
from data.inspect.report import render_png, shorten
from data.loader.loaders import EvalLoader, TrainLoader, compute_resized_shape
from data.loader.order import SampleOrder, make_sample_order
from data.settings import DataConfig, JobData

_COLUMNS = 8
_CELL_INCHES = 1.8  # side of an image
_LINE_INCHES = 0.12  # height of a line of text under an image
_LINE_CHARACTERS = 36
_CPU = torch.device("cpu")


@dataclass(frozen=True, eq=False)
class Picture:
    """An image to draw, RGB, float32 (H, W, 3) from 0 to 1, and the text under it."""

    pixels: np.ndarray
    title: str
    lines: list[str]


def write_preview(job: JobData, out: Path, *, epoch: int, steps: Sequence[int], images: int) -> None:
    """Writes a .png of the first `images` slots of each step, and of as many samples of data.val, if set.

    Raises ValueError for another file extension, and for a step outside of the epoch.
    """
    if out.suffix != ".png":
        raise ValueError(f"{out}: a preview is a .png")
    index = open_index(job.data.train, job.data.cache)
    order = make_sample_order(index, job.data, seed=job.seed, global_batch=job.global_batch)
    sections = {}
    for step in steps:
        pictures = load_step(index, order, job.data, epoch, step, images)
        sections[f"{index.place}   epoch {epoch}, step {step}: slots 0 to {len(pictures) - 1} of {job.global_batch}"] = pictures
    if job.data.val:
        val = open_index(job.data.val, job.data.cache)
        view = "squashed" if job.data.eval_resize == "squash" else f"center crops, {job.data.eval_crop:g} of the shorter side"
        sections[f"{val.place}   evaluation view: {view}"] = load_evaluation_view(val, job.data, images)
    with warnings.catch_warnings(action="ignore"):  # matplotlib warns of class names in letters that its font lacks
        out.write_bytes(_draw(sections))


def load_step(index: Index, order: SampleOrder, settings: DataConfig, epoch: int, step: int, images: int) -> list[Picture]:
    """Loads the first slots of a training step, at most `images`, a divisor of the global batch.

    Raises ValueError for a step outside of the epoch.
    """
    is_mixed = bool(settings.mixup or settings.cutmix)
    divisors = [count for count in range(1, min(images, order.global_batch) + 1) if order.global_batch % count == 0]
    slots = max(count for count in divisors if count % 2 == 0 or not is_mixed)
    ids = order.batch(epoch, step)[:slots]  # raises the ValueError
    start = epoch * order.steps_per_epoch + step
    with TrainLoader(index, order, settings, Placement(_CPU, micro_batch=slots), start=start, end=start + 1) as loader:
        batch = next(iter(loader))
    pixels, labels, partners = batch.images, batch.labels, batch.labels
    weights = torch.ones(slots)
    if batch.mix is not None:
        pixels, targets, weights = mix_pairs(batch.images, batch.labels, batch.mix)
        labels, partners = targets.unbind(1)
    names = [shorten(name) for name in index.classes]
    titles = [
        names[label] if label == partner or share == 1 else f"{names[label]} {share:.0%}\n{names[partner]} {1 - share:.0%}"
        for label, partner, share in zip(labels.tolist(), partners.tolist(), weights.tolist(), strict=True)
    ]
    parameters = list_parameters(Recipe(order.seed, settings), epoch, ids, order.copies[:slots], index)
    lines = [[f"{name} {value}" for name, value in texts.items()] for texts in parameters]
    return [Picture(*cell) for cell in zip(_denormalize(pixels, settings), titles, lines, strict=True)]


def load_evaluation_view(index: Index, settings: DataConfig, images: int) -> list[Picture]:
    """Loads `images` samples, evenly spaced in the dataset, as evaluation sees them."""
    first_rank = Placement(_CPU, micro_batch=images, ranks=max(1, len(index) // images))
    with EvalLoader(index, settings, first_rank) as loader:
        batch = next(iter(loader))
    rows = index.samples[batch.ids]
    resized = compute_resized_shape(rows["width"], rows["height"], settings)
    lines = [
        [f"{width} x {height} → {w} x {h}"]
        for width, height, (h, w) in zip(rows["width"].tolist(), rows["height"].tolist(), resized.tolist(), strict=True)
    ]
    titles = [shorten(index.classes[label]) for label in batch.labels.tolist()]
    return [Picture(*cell) for cell in zip(_denormalize(batch.images, settings), titles, lines, strict=True)]


def _denormalize(images: torch.Tensor, settings: DataConfig) -> np.ndarray:
    """Returns normalized images (B, 3, H, W) as float32 (B, H, W, 3), from 0 to 1."""
    pixels = images.permute(0, 2, 3, 1).numpy() * np.array(settings.std, np.float32) + np.array(settings.mean, np.float32)
    return pixels.clip(0, 1)


def _draw(sections: dict[str, list[Picture]]) -> bytes:
    texts = {
        title: ["\n".join(textwrap.fill(line, _LINE_CHARACTERS, subsequent_indent="  ") for line in picture.lines) for picture in pictures]
        for title, pictures in sections.items()
    }
    heights = []
    for title, pictures in sections.items():
        lines = 4 + max(text.count("\n") for text in texts[title])
        heights.append(0.4 + -(-len(pictures) // _COLUMNS) * (_CELL_INCHES + _LINE_INCHES * lines))
    figure = Figure(figsize=(_COLUMNS * _CELL_INCHES, sum(heights)), layout="constrained")
    parts = figure.subfigures(len(sections), 1, squeeze=False, height_ratios=heights).ravel()
    for part, (title, pictures) in zip(parts, sections.items(), strict=True):
        part.suptitle(title, x=0.01, ha="left", fontsize=9, family="monospace", parse_math=False)
        cells = part.subplots(-(-len(pictures) // _COLUMNS), _COLUMNS, squeeze=False).ravel()
        for axes in cells[len(pictures) :]:
            axes.set_axis_off()
        for axes, picture, text in zip(cells, pictures, texts[title], strict=False):
            axes.imshow(picture.pixels)
            axes.set_title(picture.title, fontsize=7, parse_math=False)
            axes.set_xlabel(text, fontsize=5.5, family="monospace", loc="left", parse_math=False)
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
    return render_png(figure, dpi=160)
