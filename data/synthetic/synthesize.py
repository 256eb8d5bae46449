"""Draws a small dataset for tests, demos and continuous integration: OUT/train and OUT/val, packed.

    python -m data synthesize OUT --draw patterns --train 1800 --val 300 --seed 0 [--photographs]

`--draw figures` is the harder set: 50 classes, each a shape with a surface. `--draw other-figures` combines the same shapes and surfaces
into ten other classes, one per shape: features learned from the first set help with the second, and no class is in both. JPEG quality
varies.

--photographs blends the drawings into crops of a photograph, with as many pixels and bytes as ImageNet's images: for benchmarks.
"""

import io
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from data.common.counter_rng import Draw, hash64
from data.common.progress import report_progress
from data.dataset.index import Index
from data.dataset.shards import Sample, write_dataset
from data.packing.pack import create_empty_folder
from data.synthetic.drawings import PATTERNS, SHAPES, SURFACES, Drawer, draw_figure, draw_pattern, draw_photograph

SHARD_BYTES = 1 << 20

PATTERN_SET: dict[str, Drawer] = {name: partial(draw_pattern, pattern) for name, pattern in PATTERNS.items()}


def _combine_figures(*, is_diagonal: bool) -> dict[str, Drawer]:
    """Combines shapes and surfaces: those on a diagonal of their table, or all others."""
    return {
        f"{surface} {shape}": partial(draw_figure, SHAPES[shape], SURFACES[surface])
        for row, shape in enumerate(SHAPES)
        for column, surface in enumerate(SURFACES)
        if (row % len(SURFACES) == column) == is_diagonal
    }


# A set's position seeds its random numbers: append new sets at the end.
SETS = {"patterns": PATTERN_SET, "figures": _combine_figures(is_diagonal=False), "other-figures": _combine_figures(is_diagonal=True)}


def draw_images(
    classes: int, count: int, seed: int, split: int, *, draw: str = "patterns", photographs: bool = False
) -> Iterator[tuple[bytes, int]]:
    """Draws `count` encoded images of the first `classes` of a set, with their labels.

    The classes alternate, so any range of images is balanced. Splits, 0 for train and 1 for val, share no image.
    """
    drawers = list(SETS[draw].values())[:classes]
    stream = 2 * list(SETS).index(draw) + split
    for number in range(count):
        random = np.random.default_rng(int(hash64(seed, Draw.SYNTHESIZE, stream, number)))
        label = number % classes
        encoded = io.BytesIO()
        if photographs:
            draw_photograph(drawers[label], random).save(encoded, "JPEG", quality=95)  # about 110 kB
        else:
            drawers[label](random).save(encoded, "JPEG", quality=int(random.integers(60, 96)))
        yield encoded.getvalue(), label


def synthesize(
    out: Path,
    *,
    draw: str = "patterns",
    classes: int | None = None,
    train: int = 1800,
    val: int = 300,
    seed: int = 0,
    photographs: bool = False,
) -> tuple[Index, Index]:
    """Writes OUT/train and OUT/val, with `train` and `val` images of the first `classes` of a set (by default of all).

    Raises ValueError for more classes than the set has, and for an OUT that is not empty.
    """
    names = list(SETS[draw])
    if classes is not None and not 2 <= classes <= len(names):
        raise ValueError(f"classes must be from 2 to {len(names)}, not {classes}")
    names = names[:classes]
    create_empty_folder(out)
    indexes = []
    for split, (name, count) in enumerate((("train", train), ("val", val))):
        (out / name).mkdir()
        encoded_images = draw_images(len(names), count, seed, split, draw=draw, photographs=photographs)
        drawn = report_progress(encoded_images, count, f"drawing {name}")
        samples = (Sample(f"{number:09d}", encoded, label) for number, (encoded, label) in enumerate(drawn))
        shard_bytes = SHARD_BYTES * (16 if photographs else 1)
        indexes.append(write_dataset(out / name, samples, names, shard_bytes=shard_bytes, name=name))
    return indexes[0], indexes[1]
