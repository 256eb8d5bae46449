"""Draws the images of synthetic datasets: ten patterns that fill an image, and sixty figures, each a shape with a surface.

Colors, position, scale, angle, shading and noise are random in every image. So the mean color does not reveal the class, and a
network has to recognize form. All classes survive mirroring and moderate crops. Some images are gray.
"""

from collections.abc import Callable
from functools import cache

import numpy as np
from PIL import Image

PHOTOGRAPH = (500, 375)  # width and height
GRAY_SHARE = 0.06
FIGURE_RADIUS = 0.8  # in units of about half of the image's shorter side
LUMA = (0.299, 0.587, 0.114)

# A pattern maps coordinates (u, v), rotated and scaled so that the image's shorter side spans about [-1, 1], to a signed distance,
# positive inside. Motifs repeat on a coarse grid, so a crop contains at least one.
Pattern = Callable[[np.ndarray, np.ndarray], np.ndarray]
Drawer = Callable[[np.random.Generator], Image.Image]


def _wrap(u: np.ndarray, v: np.ndarray, period: float) -> tuple[np.ndarray, np.ndarray]:
    """Wraps coordinates into the cells of a grid, to [-period/2, period/2)."""
    return (u + period / 2) % period - period / 2, (v + period / 2) % period - period / 2


def _tile(period: float, motif: Pattern) -> Pattern:
    """Returns a pattern that repeats a motif on a grid."""
    return lambda u, v: motif(*_wrap(u, v, period))


def _cross(u: np.ndarray, v: np.ndarray, width: float, length: float) -> np.ndarray:
    """Returns the distance to an upright cross, with half the width and half the length of its bars."""
    u, v = np.abs(u), np.abs(v)
    return np.maximum(np.minimum(width - u, length - v), np.minimum(width - v, length - u))


def _arrow(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    u = np.abs(u)
    shaft = np.minimum(np.minimum(0.2 - u, v + 0.85), 0.1 - v)
    return np.maximum(shaft, np.minimum(v, 0.53 - 0.585 * v - 0.81 * u))


def _drop(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    cone = np.minimum(0.395 - 0.416 * v - 0.909 * np.abs(u), v + 0.084)
    return np.maximum(0.52 - np.hypot(u, v + 0.3), cone)


PATTERNS: dict[str, Pattern] = {
    "checks": lambda u, v: 0.2 * np.sin(np.pi * u / 0.5) * np.sin(np.pi * v / 0.5),
    "crosses": _tile(1.2, lambda u, v: _cross(u, v, 0.13, 0.5)),
    "discs": _tile(1.0, lambda u, v: 0.33 - np.hypot(u, v)),
    "dots": _tile(0.36, lambda u, v: 0.1 - np.hypot(u, v)),
    "rings": _tile(1.2, lambda u, v: 0.13 - np.abs(np.hypot(u, v) - 0.4)),
    "stars": _tile(1.2, lambda u, v: 0.34 + 0.17 * np.cos(5 * np.arctan2(v, u)) - np.hypot(u, v)),
    "stripes": lambda u, v: 0.25 * np.sin(2 * np.pi * u / 0.8) / np.pi * 2,
    "target": lambda u, v: 0.25 * np.sin(2 * np.pi * np.hypot(u, v) / 0.55) / np.pi * 2,
    "triangles": _tile(1.1, lambda u, v: np.minimum(v + 0.24, 0.24 - 0.5 * v - 0.866 * np.abs(u))),
    "zigzags": lambda u, v: 0.25 * np.sin(2 * np.pi * (u + 1.3 * np.abs((v + 0.35) % 0.7 - 0.35)) / 0.7) / np.pi * 2,
}
# A shape lies within the unit circle and a surface covers the plane. Both are centered, as rings and rays must be.
SHAPES: dict[str, Pattern] = {
    "arrow": _arrow,
    "clover": lambda u, v: 0.58 + 0.3 * np.cos(3 * np.arctan2(v, u)) - np.hypot(u, v),
    "crescent": lambda u, v: np.minimum(0.85 - np.hypot(u, v), np.hypot(u - 0.45, v) - 0.62),
    "cross": lambda u, v: _cross(u, v, 0.27, 0.85),
    "disc": lambda u, v: 0.78 - np.hypot(u, v),
    "drop": _drop,
    "heart": lambda u, v: 0.66 - np.hypot(u, v + 0.2 - 0.62 * np.sqrt(np.abs(u))),
    "square": lambda u, v: 0.68 - np.maximum(np.abs(u), np.abs(v)),
    "star": lambda u, v: 0.6 + 0.32 * np.cos(5 * np.arctan2(v, u)) - np.hypot(u, v),
    "triangle": lambda u, v: np.minimum(v + 0.48, 0.48 - 0.5 * v - 0.866 * np.abs(u)),
}
SURFACES: dict[str, Pattern] = {
    "checked": lambda u, v: 0.1 * np.sin(np.pi * u / 0.36) * np.sin(np.pi * v / 0.36),
    "dotted": _tile(0.5, lambda u, v: 0.16 - np.hypot(u, v)),
    "rayed": lambda u, v: 0.2 * np.hypot(u, v) * np.sin(5 * np.arctan2(v, u)),
    "ringed": lambda u, v: 0.08 * np.sin(2 * np.pi * np.hypot(u, v) / 0.5),
    "solid": lambda u, v: np.ones_like(u),
    "striped": lambda u, v: 0.08 * np.sin(2 * np.pi * u / 0.5),
}


def draw_pattern(pattern: Pattern, random: np.random.Generator) -> Image.Image:
    """Draws an image of a pattern, 72 to 220 pixels a side; all other properties are random."""
    x, y, angle, scale = _draw_view(220, 0.8, 1.25, random)
    inside = _cover(pattern(*_rotate(x, y, angle)), scale)
    foreground, background = _draw_colors(2, 60, random)
    return _light(_blend(background, foreground, inside), random)


def draw_figure(shape: Pattern, surface: Pattern, random: np.random.Generator) -> Image.Image:
    """Draws a shape with a surface, repeated on plain ground, 72 to 128 pixels a side; all else is random."""
    x, y, angle, scale = _draw_view(128, 0.85, 1.15, random)
    u, v = (cell / FIGURE_RADIUS for cell in _wrap(*_rotate(x, y, angle), 2 * FIGURE_RADIUS))
    inside, marked = (_cover(pattern(u, v), scale / FIGURE_RADIUS) for pattern in (shape, surface))
    ground, plain, marks = _draw_colors(3, 65, random)
    return _light(_blend(ground, _blend(plain, marks, marked), inside), random)


def _draw_view(
    max_side: int, min_scale: float, max_scale: float, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, float, float]:
    """Draws size, angle, scale and center of a view.

    Returns coordinates x and y, float32 (H, W), the angle, and the size of a pixel.
    """
    width, height = random.integers(72, max_side + 1, 2)
    angle, scale = random.uniform(0, 2 * np.pi), random.uniform(min_scale, max_scale) * 2 / min(width, height)
    center_y, center_x = random.uniform(0.3, 0.7, 2)
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float32)
    return (columns - center_x * width) * scale, (rows - center_y * height) * scale, angle, scale


def _rotate(x: np.ndarray, y: np.ndarray, angle: float) -> tuple[np.ndarray, np.ndarray]:
    cosine, sine = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return cosine * x - sine * y, sine * x + cosine * y


def _cover(distance: np.ndarray, scale: float) -> np.ndarray:
    """Returns the covered fraction of each pixel, float32 (H, W), from signed distances in units of 1 / scale pixels."""
    return np.clip(0.5 + distance / scale, 0, 1).astype(np.float32)


def _draw_colors(count: int, gap: float, random: np.random.Generator) -> np.ndarray:
    """Draws colors (count, 3) whose luminances, 0 to 255, differ by at least `gap`, so they differ in gray too."""
    while True:
        colors = random.uniform(10, 245, (count, 3))
        if np.diff(np.sort(colors @ LUMA)).min() >= gap:
            return colors


def _blend(under: np.ndarray, over: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Blends colors (3,) or images (H, W, 3), with `share` (H, W) of `over`; returns float32 (H, W, 3)."""
    return under.astype(np.float32) + share[..., None] * (over - under).astype(np.float32)


def _light(image: np.ndarray, random: np.random.Generator) -> Image.Image:
    """Adds uneven light and sensor noise to an image (H, W, 3), and makes some images gray."""
    height, width = image.shape[:2]
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float32)
    shading = random.uniform(-25, 25, 2).astype(np.float32)
    image += (shading[0] * rows / np.float64(height) + shading[1] * columns / np.float64(width))[..., None]
    image += random.standard_normal((height, width), np.float32)[..., None] * np.float32(random.uniform(2, 12))
    picture = Image.fromarray(np.clip(image, 0, 255).astype(np.uint8))
    return picture.convert("L") if random.random() < GRAY_SHARE else picture


def draw_photograph(draw: Drawer, random: np.random.Generator) -> Image.Image:
    """Draws 500 x 375 pixels: a crop of matplotlib's sample photograph, blended with a drawing, with sensor noise."""
    photo = _load_photo()
    width = int(photo.width * random.uniform(0.4, 0.8))
    height = width * 3 // 4
    x, y = int(random.integers(photo.width - width)), int(random.integers(photo.height - height))
    crop = photo.resize(PHOTOGRAPH, Image.Resampling.BICUBIC, (x, y, x + width, y + height))
    drawing = draw(random).convert("RGB").resize(PHOTOGRAPH, Image.Resampling.BICUBIC)
    pixels = np.asarray(Image.blend(crop, drawing, 0.4), np.float32)
    noise = random.standard_normal((*pixels.shape[:2], 1), np.float32) * np.float32(random.uniform(8, 12))
    return Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8))


@cache
def _load_photo() -> Image.Image:
    from matplotlib.cbook import get_sample_data

    return Image.open(get_sample_data("grace_hopper.jpg", asfileobj=False)).convert("RGB")
