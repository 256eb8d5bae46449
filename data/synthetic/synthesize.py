"""A small dataset drawn by a program, for tests, demos and continuous integration: OUT/train and OUT/val, packed.

    python -m data synthesize OUT --draw patterns --train 1800 --val 300 --seed 0 [--photographs]

`--draw figures` is the harder set: 50 classes, a shape with a surface each. `--draw other-figures` has the same shapes and surfaces in ten
other combinations, one of each shape: what was learnt from the first helps with the second, and no class is in both. JPEG quality varies.

With --photographs the drawings are blended into parts of a real one, of the pixels and bytes of ImageNet's: for measurements.
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
from data.packing.pack import make_empty
from data.synthetic.drawings import PATTERNS, SHAPES, SURFACES, Drawer, draw_figure, draw_image, photograph

SHARD_BYTES = 1 << 20

PATTERN_SET: dict[str, Drawer] = {name: partial(draw_image, pattern) for name, pattern in PATTERNS.items()}


def _figures(others: bool) -> dict[str, Drawer]:
    """A diagonal of the table of shapes and surfaces, or all else."""
    return {
        f"{surface} {shape}": partial(draw_figure, SHAPES[shape], SURFACES[surface])
        for row, shape in enumerate(SHAPES)
        for column, surface in enumerate(SURFACES)
        if (row % len(SURFACES) == column) == others
    }


# The place of a set in here decides its random numbers: new ones go to the end.
SETS = {"patterns": PATTERN_SET, "figures": _figures(others=False), "other-figures": _figures(others=True)}


def images(
    classes: int, count: int, seed: int, split: int, *, draw: str = "patterns", photographs: bool = False
) -> Iterator[tuple[bytes, int]]:
    """`count` encoded images of the first classes of a set, with their labels; the classes take turns, so any part is balanced."""
    drawers = list(SETS[draw].values())[:classes]
    stream = 2 * list(SETS).index(draw) + split
    for number in range(count):
        random = np.random.default_rng(int(hash64(seed, Draw.SYNTHESIZE, stream, number)))
        label = number % classes
        encoded = io.BytesIO()
        if photographs:
            photograph(drawers[label], random).save(encoded, "JPEG", quality=95)  # and so about 110 kB
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
    """Writes OUT/train and OUT/val, of all classes of a set or the first so many.

    Raises ValueError for more classes than the set has and for an OUT that isn't empty.
    """
    names = list(SETS[draw])
    if classes is not None and not 2 <= classes <= len(names):
        raise ValueError(f"classes must be from 2 to {len(names)}, not {classes}")
    names = names[:classes]
    make_empty(out)
    written = []
    for split, (name, count) in enumerate((("train", train), ("val", val))):
        (out / name).mkdir()
        drawn = report_progress(images(len(names), count, seed, split, draw=draw, photographs=photographs), count, f"drawing {name}")
        samples = (Sample(f"{number:09d}", encoded, label) for number, (encoded, label) in enumerate(drawn))
        shard_bytes = SHARD_BYTES * (16 if photographs else 1)
        written.append(write_dataset(out / name, samples, names, shard_bytes=shard_bytes, name=name))
    return written[0], written[1]
