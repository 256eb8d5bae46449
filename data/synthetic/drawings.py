"""What drawn datasets show: ten patterns that fill an image, and sixty figures, each of ten shapes with each of six surfaces.

Colours, place, scale, angle, shading and noise are random in every image, so the mean colour says nothing about the class, and a
network has to look at form. All classes survive mirroring and moderate crops. Some images are grey.
"""

from collections.abc import Callable
from functools import cache

import numpy as np
from PIL import Image

PHOTOGRAPH = (500, 375)  # width and height
GREY_SHARE = 0.06
FIGURE = 0.8  # radius of a figure, where the shorter side of an image is about 2
LUMA = (0.299, 0.587, 0.114)

# A pattern is a function of coordinates (u, v), turned and scaled so that the image's shorter side spans about [-1, 1], to a
# signed distance: positive inside. Shapes repeat on a coarse grid, so a crop holds at least one.
Pattern = Callable[[np.ndarray, np.ndarray], np.ndarray]
Drawer = Callable[[np.random.Generator], Image.Image]


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


# A shape lies within a unit circle, a surface covers the plane; both are centred, as rings and rays have to be.


def _arrow(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    u = np.abs(u)
    shaft = np.minimum(np.minimum(0.2 - u, v + 0.85), 0.1 - v)
    return np.maximum(shaft, np.minimum(v, 0.53 - 0.585 * v - 0.81 * u))


def _clover(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return 0.58 + 0.3 * np.cos(3 * np.arctan2(v, u)) - np.hypot(u, v)


def _crescent(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.minimum(0.85 - np.hypot(u, v), np.hypot(u - 0.45, v) - 0.62)


def _cross(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    u, v = np.abs(u), np.abs(v)
    return np.maximum(np.minimum(0.27 - u, 0.85 - v), np.minimum(0.27 - v, 0.85 - u))


def _disc(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return 0.78 - np.hypot(u, v)


def _drop(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    cone = np.minimum(0.395 - 0.416 * v - 0.909 * np.abs(u), v + 0.084)
    return np.maximum(0.52 - np.hypot(u, v + 0.3), cone)


def _heart(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return 0.66 - np.hypot(u, v + 0.2 - 0.62 * np.sqrt(np.abs(u)))


def _square(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return 0.68 - np.maximum(np.abs(u), np.abs(v))


def _star(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return 0.6 + 0.32 * np.cos(5 * np.arctan2(v, u)) - np.hypot(u, v)


def _triangle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.minimum(v + 0.48, 0.48 - 0.5 * v - 0.866 * np.abs(u))


def _solid(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.ones_like(u)


def _striped(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return 0.08 * np.sin(2 * np.pi * u / 0.5)


def _checked(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return 0.1 * np.sin(np.pi * u / 0.36) * np.sin(np.pi * v / 0.36)


def _dotted(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    u, v = _cell(u, v, 0.5)
    return 0.16 - np.hypot(u, v)


def _ringed(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return 0.08 * np.sin(2 * np.pi * np.hypot(u, v) / 0.5)


def _rayed(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return 0.2 * np.hypot(u, v) * np.sin(5 * np.arctan2(v, u))


SHAPES: dict[str, Pattern] = {
    "arrow": _arrow,
    "clover": _clover,
    "crescent": _crescent,
    "cross": _cross,
    "disc": _disc,
    "drop": _drop,
    "heart": _heart,
    "square": _square,
    "star": _star,
    "triangle": _triangle,
}
SURFACES: dict[str, Pattern] = {
    "checked": _checked,
    "dotted": _dotted,
    "rayed": _rayed,
    "ringed": _ringed,
    "solid": _solid,
    "striped": _striped,
}


def draw_image(pattern: Pattern, random: np.random.Generator) -> Image.Image:
    """One image of a pattern, 72 to 220 pixels a side; everything but the pattern is random."""
    width, height = random.integers(72, 221, 2)
    angle, scale = random.uniform(0, 2 * np.pi), random.uniform(0.8, 1.25) * 2 / min(width, height)
    centre_y, centre_x = random.uniform(0.3, 0.7, 2)
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float32)
    y, x = (rows - centre_y * height) * scale, (columns - centre_x * width) * scale
    inside = _coverage(pattern(*_turned(x, y, angle)), scale)
    fore, back = _colours(2, 60, random)
    return _lit(_blended(back, fore, inside), random)


def draw_figure(shape: Pattern, surface: Pattern, random: np.random.Generator) -> Image.Image:
    """One image of a shape with a surface, repeated on plain ground, 72 to 128 pixels a side; all but shape and surface is random."""
    width, height = random.integers(72, 129, 2)
    angle, scale = random.uniform(0, 2 * np.pi), random.uniform(0.85, 1.15) * 2 / min(width, height)
    centre_y, centre_x = random.uniform(0.3, 0.7, 2)
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float32)
    y, x = (rows - centre_y * height) * scale, (columns - centre_x * width) * scale
    u, v = (cell / FIGURE for cell in _cell(*_turned(x, y, angle), 2 * FIGURE))
    inside, marked = (_coverage(pattern(u, v), scale / FIGURE) for pattern in (shape, surface))
    ground, plain, marks = _colours(3, 65, random)
    return _lit(_blended(ground, _blended(plain, marks, marked), inside), random)


def _turned(x: np.ndarray, y: np.ndarray, angle: float) -> tuple[np.ndarray, np.ndarray]:
    cosine, sine = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return cosine * x - sine * y, sine * x + cosine * y


def _coverage(distance: np.ndarray, scale: float) -> np.ndarray:
    """The share of each pixel that is inside, float32 (H, W), from signed distances in units of 1 / scale pixels."""
    return np.clip(0.5 + distance / scale, 0, 1).astype(np.float32)


def _colours(count: int, apart: float, random: np.random.Generator) -> np.ndarray:
    """Random colours (count, 3) whose luminances are `apart`, of 255, so that they differ in grey too."""
    while True:
        colours = random.uniform(10, 245, (count, 3))
        if np.diff(np.sort(colours @ LUMA)).min() >= apart:
            return colours


def _blended(under: np.ndarray, over: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Colours (3,) or an image (H, W, 3), with as much of `over` as `share` (H, W) says; float32 (H, W, 3)."""
    return under.astype(np.float32) + share[..., None] * (over - under).astype(np.float32)


def _lit(image: np.ndarray, random: np.random.Generator) -> Image.Image:
    """The image (H, W, 3) in uneven light, with a sensor's noise, and now and then in grey."""
    height, width = image.shape[:2]
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float32)
    shading = random.uniform(-25, 25, 2).astype(np.float32)
    image += (shading[0] * rows / np.float64(height) + shading[1] * columns / np.float64(width))[..., None]
    image += random.standard_normal((height, width), np.float32)[..., None] * np.float32(random.uniform(2, 12))
    picture = Image.fromarray(np.clip(image, 0, 255).astype(np.uint8))
    return picture.convert("L") if random.random() < GREY_SHARE else picture


def photograph(draw: Drawer, random: np.random.Generator) -> Image.Image:
    """500 x 375 pixels: a part of the photograph that comes with matplotlib, a drawing in it, and a sensor's noise."""
    photo = _photo()
    width = int(photo.width * random.uniform(0.4, 0.8))
    height = width * 3 // 4
    x, y = int(random.integers(photo.width - width)), int(random.integers(photo.height - height))
    part = photo.resize(PHOTOGRAPH, Image.Resampling.BICUBIC, (x, y, x + width, y + height))
    drawing = draw(random).convert("RGB").resize(PHOTOGRAPH, Image.Resampling.BICUBIC)
    pixels = np.asarray(Image.blend(part, drawing, 0.4), np.float32)
    noise = random.standard_normal((*pixels.shape[:2], 1), np.float32) * np.float32(random.uniform(8, 12))
    return Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8))


@cache
def _photo() -> Image.Image:
    from matplotlib.cbook import get_sample_data

    return Image.open(get_sample_data("grace_hopper.jpg", asfileobj=False)).convert("RGB")
