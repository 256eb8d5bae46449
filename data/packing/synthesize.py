"""A small dataset drawn by a program, for tests, demos and continuous integration: OUT/train and OUT/val, packed.

    python -m data synthesize OUT --classes 10 --train 1800 --val 300 --seed 0 [--photographs]

A class is a shape or a texture. Colours, place, scale, angle, shading and noise are random in every image, so the mean colour
says nothing about the class, and a small network has to look at form. All classes survive mirroring and moderate crops. Sizes
run from 72 to 220 pixels a side, JPEG quality varies, some images are grey.

With --photographs the drawings are blended into parts of a real one, of the pixels and bytes of ImageNet's: for measurements.
"""

import io
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from data.draws import Draw, hash64
from data.index import Index
from data.packing.pack import make_empty
from data.progress import progress
from data.shards import Sample, write_dataset

SHARD_BYTES = 1 << 20
PHOTOGRAPH = (500, 375)  # width and height
GREY_SHARE = 0.06

# A pattern is a function of coordinates (u, v), turned and scaled so that the image's shorter side spans about [-1, 1], to a
# signed distance: positive inside. Shapes repeat on a coarse grid, so a crop holds at least one.
Pattern = Callable[[np.ndarray, np.ndarray], np.ndarray]


def _cell(u: np.ndarray, v: np.ndarray, period: float) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates within the cells of a grid, in [-period/2, period/2)."""
    return (u + period / 2) % period - period / 2, (v + period / 2) % period - period / 2


def _stripes(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return 0.25 * np.sin(2 * np.pi * u / 0.8) / np.pi * 2


def _checks(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return 0.2 * np.sin(np.pi * u / 0.5) * np.sin(np.pi * v / 0.5)


def _discs(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    u, v = _cell(u, v, 1.0)
    return 0.33 - np.hypot(u, v)


def _rings(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    u, v = _cell(u, v, 1.2)
    return 0.13 - np.abs(np.hypot(u, v) - 0.4)


def _triangles(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    u, v = _cell(u, v, 1.1)
    return np.minimum(v + 0.24, 0.24 - 0.5 * v - 0.866 * np.abs(u))


def _crosses(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    u, v = np.abs(_cell(u, v, 1.2))
    return np.maximum(np.minimum(0.13 - u, 0.5 - v), np.minimum(0.13 - v, 0.5 - u))


def _stars(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    u, v = _cell(u, v, 1.2)
    return 0.34 + 0.17 * np.cos(5 * np.arctan2(v, u)) - np.hypot(u, v)


def _zigzags(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    bend = np.abs((v + 0.35) % 0.7 - 0.35)
    return 0.25 * np.sin(2 * np.pi * (u + 1.3 * bend) / 0.7) / np.pi * 2


def _dots(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    u, v = _cell(u, v, 0.36)
    return 0.1 - np.hypot(u, v)


def _target(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return 0.25 * np.sin(2 * np.pi * np.hypot(u, v) / 0.55) / np.pi * 2


PATTERNS: dict[str, Pattern] = {
    "checks": _checks,
    "crosses": _crosses,
    "discs": _discs,
    "dots": _dots,
    "rings": _rings,
    "stars": _stars,
    "stripes": _stripes,
    "target": _target,
    "triangles": _triangles,
    "zigzags": _zigzags,
}


def draw_image(pattern: Pattern, random: np.random.Generator) -> Image.Image:
    """One image of a pattern; everything but the pattern is random."""
    width, height = random.integers(72, 221, 2)
    short = min(width, height)
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float32)
    angle, scale = random.uniform(0, 2 * np.pi), random.uniform(0.8, 1.25) * 2 / short
    centre_y, centre_x = random.uniform(0.3, 0.7, 2)
    y, x = (rows - centre_y * height) * scale, (columns - centre_x * width) * scale
    cosine, sine = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    inside = np.clip(0.5 + pattern(cosine * x - sine * y, sine * x + cosine * y) / scale, 0, 1)

    fore, back = random.uniform(10, 245, (2, 3))
    while np.abs(fore @ (0.299, 0.587, 0.114) - back @ (0.299, 0.587, 0.114)) < 60:  # visible in grey too
        fore, back = random.uniform(10, 245, (2, 3))
    shading = random.uniform(-25, 25, 2).astype(np.float32)
    image = back.astype(np.float32) + inside[..., None].astype(np.float32) * (fore - back).astype(np.float32)
    image += (shading[0] * rows / height + shading[1] * columns / width)[..., None]
    image += random.standard_normal((height, width), np.float32)[..., None] * np.float32(random.uniform(2, 12))
    picture = Image.fromarray(np.clip(image, 0, 255).astype(np.uint8))
    return picture.convert("L") if random.random() < GREY_SHARE else picture


def photograph(pattern: Pattern, random: np.random.Generator) -> Image.Image:
    """500 x 375 pixels: a part of the photograph that comes with matplotlib, a drawing in it, and a sensor's noise."""
    photo = _photo()
    width = int(photo.width * random.uniform(0.4, 0.8))
    height = width * 3 // 4
    x, y = int(random.integers(photo.width - width)), int(random.integers(photo.height - height))
    part = photo.resize(PHOTOGRAPH, Image.Resampling.BICUBIC, (x, y, x + width, y + height))
    drawing = draw_image(pattern, random).convert("RGB").resize(PHOTOGRAPH, Image.Resampling.BICUBIC)
    pixels = np.asarray(Image.blend(part, drawing, 0.4), np.float32)
    noise = random.standard_normal((*pixels.shape[:2], 1), np.float32) * np.float32(random.uniform(8, 12))
    return Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8))


@cache
def _photo() -> Image.Image:
    from matplotlib.cbook import get_sample_data

    return Image.open(get_sample_data("grace_hopper.jpg", asfileobj=False)).convert("RGB")


def images(classes: int, count: int, seed: int, split: int, *, photographs: bool = False) -> Iterator[tuple[bytes, int]]:
    """`count` encoded images with their labels; the classes take turns, so any part of the sequence is balanced."""
    patterns = list(PATTERNS.values())[:classes]
    for number in range(count):
        random = np.random.default_rng(int(hash64(seed, Draw.SYNTHESIZE, split, number)))
        label = number % classes
        encoded = io.BytesIO()
        if photographs:
            photograph(patterns[label], random).save(encoded, "JPEG", quality=95)  # and so about 110 kB
        else:
            draw_image(patterns[label], random).save(encoded, "JPEG", quality=int(random.integers(60, 96)))
        yield encoded.getvalue(), label


def synthesize(
    out: Path, *, classes: int = 10, train: int = 1800, val: int = 300, seed: int = 0, photographs: bool = False
) -> tuple[Index, Index]:
    """Writes OUT/train and OUT/val. Raises ValueError for more classes than there are patterns or an OUT that isn't empty."""
    if not 2 <= classes <= len(PATTERNS):
        raise ValueError(f"classes must be from 2 to {len(PATTERNS)}, not {classes}")
    make_empty(out)
    names = list(PATTERNS)[:classes]
    written = []
    for split, (name, count) in enumerate((("train", train), ("val", val))):
        (out / name).mkdir()
        drawn = progress(images(classes, count, seed, split, photographs=photographs), count, f"drawing {name}")
        samples = (Sample(f"{number:09d}", encoded, label) for number, (encoded, label) in enumerate(drawn))
        shard_bytes = SHARD_BYTES * (16 if photographs else 1)
        written.append(write_dataset(out / name, samples, names, shard_bytes=shard_bytes, name=name))
    return written[0], written[1]
