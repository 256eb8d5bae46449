"""Draws augmentation parameters: pure functions of (seed, epoch, sample id), as arrays over a batch.

    crops = draw_crops(seed, epoch, ids, widths, heights)
    mirror = draw_flips(seed, epoch, ids)
    boxes = draw_erased_boxes(seed, epoch, ids, image_size=224, probability=0.25)
    mix = draw_mix(seed, epoch, ids[::2], image_size=224, mixup=0.8, cutmix=1.0)

Epochs count from 0, `ids` are (n,), and sizes are in pixels. RandAugment and color jitter are in randaugment.py; recipe.py draws all
parameters that a job's settings require. Parameters do not depend on micro-batches, ranks or restarts. A mix belongs to a pair of
neighboring slots (2i, 2i + 1) of the global batch and is a function of the even slot's sample.
"""

from dataclasses import dataclass

import numpy as np

from data.common.counter_rng import Draw, hash64, uniform

_TRIES = 10
_ERASED_AREA = (0.02, 1 / 3)  # fraction of the image's area, as in timm's RandomErasing
_ERASED_RATIO = (0.3, 1 / 0.3)  # height to width
NOISE_STARTS = 1 << 20  # positions in the bank of numbers (erasing.py) at which the noise of a box can begin
_BETA_TRIES = 16


def draw_crops(
    seed: int,
    epoch: int,
    ids: np.ndarray,
    widths: np.ndarray,
    heights: np.ndarray,
    *,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> np.ndarray:
    """Draws random resized crops, with the algorithm of torchvision's RandomResizedCrop.get_params, which timm shares.

    Up to ten tries draw a fraction of the image's area, uniform in `scale`, and a ratio of width to height, log-uniform in `ratio`. The
    first window that fits gets a uniform position. If no window fits, the result is the central window with the nearest allowed ratio.
    Returns int32 (n, 4): y, x, height, width.
    """
    ids, widths, heights = ids[:, None], widths[:, None].astype(np.int64), heights[:, None].astype(np.int64)
    tries = np.arange(_TRIES)
    area = widths * heights * (scale[0] + (scale[1] - scale[0]) * uniform(seed, Draw.CROP_AREA, epoch, ids, tries))
    low, high = np.log(ratio)
    aspect = np.exp(low + (high - low) * uniform(seed, Draw.CROP_RATIO, epoch, ids, tries))
    w = np.rint(np.sqrt(area * aspect)).astype(np.int64)  # rint rounds halves to even, as round() in Python
    h = np.rint(np.sqrt(area / aspect)).astype(np.int64)
    fits = (w > 0) & (w <= widths) & (h > 0) & (h <= heights)
    first = fits.argmax(axis=1)[:, None]
    w, h = np.take_along_axis(w, first, 1), np.take_along_axis(h, first, 1)
    y = np.floor(uniform(seed, Draw.CROP_Y, epoch, ids) * (heights - h + 1)).astype(np.int64)
    x = np.floor(uniform(seed, Draw.CROP_X, epoch, ids) * (widths - w + 1)).astype(np.int64)

    whole_ratio = widths / heights
    central_w = np.where(whole_ratio > ratio[1], np.rint(heights * ratio[1]), widths).astype(np.int64)
    central_h = np.where(whole_ratio < ratio[0], np.rint(widths / ratio[0]), heights).astype(np.int64)
    central = np.hstack([(heights - central_h) // 2, (widths - central_w) // 2, central_h, central_w])
    return np.where(fits.any(axis=1)[:, None], np.hstack([y, x, h, w]), central).astype(np.int32)


def draw_flips(seed: int, epoch: int, ids: np.ndarray, probability: float = 0.5) -> np.ndarray:
    """Draws which samples are mirrored left to right: bool (n,)."""
    return uniform(seed, Draw.FLIP, epoch, ids) < probability


def draw_bilinear(seed: int, epoch: int, ids: np.ndarray, interpolation: str, use: int) -> np.ndarray:
    """Draws which samples are interpolated bilinearly rather than bicubically: bool (n,).

    `interpolation` is bilinear, bicubic or random; `use` is 0 for the resize and counts the layers of operators from 1.
    """
    if interpolation == "random":
        return uniform(seed, Draw.INTERPOLATION, epoch, ids, use) < 0.5
    return np.full(len(ids), interpolation == "bilinear")


def draw_erased_boxes(seed: int, epoch: int, ids: np.ndarray, *, image_size: int, probability: float, count: int = 1) -> np.ndarray:
    """Draws the boxes of random erasing, with the algorithm of timm's RandomErasing (arXiv 1708.04896).

    With `probability` an image has one to `count` boxes. For each, up to ten tries draw an area, uniform between 2 % and a third of the
    image's and divided by the number of boxes, and a log-uniform ratio of height to width. The first box that is smaller than the image
    gets a uniform position. Returns int32 (n, count, 4): y, x, height, width; all 0 without a box.
    """
    ids = ids[:, None, None]
    boxes, tries = np.arange(count)[:, None], np.arange(_TRIES)
    number = 1 + hash64(seed, Draw.ERASED_COUNT, epoch, ids) % np.uint64(count)
    low, high = _ERASED_AREA
    area = image_size**2 * (low + (high - low) * uniform(seed, Draw.ERASED_AREA, epoch, ids, boxes, tries)) / number
    low, high = np.log(_ERASED_RATIO)
    ratio = np.exp(low + (high - low) * uniform(seed, Draw.ERASED_RATIO, epoch, ids, boxes, tries))
    h, w = np.rint(np.sqrt(area * ratio)).astype(np.int64), np.rint(np.sqrt(area / ratio)).astype(np.int64)
    fits = (h < image_size) & (w < image_size)
    first = fits.argmax(axis=2)[..., None]
    h, w = np.take_along_axis(h, first, 2), np.take_along_axis(w, first, 2)
    y = np.floor(uniform(seed, Draw.ERASED_Y, epoch, ids, boxes) * (image_size - h + 1)).astype(np.int64)
    x = np.floor(uniform(seed, Draw.ERASED_X, epoch, ids, boxes) * (image_size - w + 1)).astype(np.int64)
    is_erased = uniform(seed, Draw.ERASED, epoch, ids) < probability
    has_box = is_erased & (boxes < number) & fits.any(axis=2)[..., None]
    return np.where(has_box, np.concatenate([y, x, h, w], axis=2), 0).astype(np.int32)


def draw_noise_starts(seed: int, epoch: int, ids: np.ndarray, count: int) -> np.ndarray:
    """Draws where the noise of each of a sample's `count` boxes begins in the bank of numbers: int64 (n, count)."""
    return (hash64(seed, Draw.ERASED_NOISE, epoch, ids[:, None], np.arange(count)) % np.uint64(NOISE_STARTS)).astype(np.int64)


@dataclass(frozen=True, eq=False)
class Mix:
    """How the two samples of each pair are mixed.

    Attributes:
        box: int32 (pairs, 4), y0, y1, x0, x1 in pixels: the part that is swapped (cutmix). An empty box means a weighted mean of the
            whole images (mixup).
        lam: float32 (pairs,): the weight of a sample's label, and in mixup of its pixels; 1 - lam is its partner's.
    """

    box: np.ndarray
    lam: np.ndarray


def draw_mix(seed: int, epoch: int, even_ids: np.ndarray, *, image_size: int, mixup: float, cutmix: float, switch: float = 0.5) -> Mix:
    """Draws the mix of each pair from the ids of the samples in even slots, (pairs,).

    `mixup` and `cutmix` are the alphas of Beta(alpha, alpha), 0 for off; `switch` is the probability of cutmix if both are on. The box is
    that of timm's rand_bbox: sides of sqrt(1 - lam) times the image's, a uniform center, clipped at the borders. Then lam is corrected to
    the fraction of the sample's pixels that remain.
    """
    share_cut = switch if mixup > 0 and cutmix > 0 else float(cutmix > 0)
    cut = uniform(seed, Draw.MIX_KIND, epoch, even_ids) < share_cut
    lam = np.ones(len(even_ids))
    if mixup > 0:
        lam[~cut] = draw_symmetric_beta(mixup, seed, Draw.MIXUP_LAM, epoch, even_ids[~cut])
    if cutmix > 0:
        lam[cut] = draw_symmetric_beta(cutmix, seed, Draw.CUTMIX_LAM, epoch, even_ids[cut])

    side = np.where(cut, image_size * np.sqrt(1 - lam), 0).astype(np.int64)
    bounds = []
    for draw in (Draw.CUTMIX_Y, Draw.CUTMIX_X):
        center = np.floor(uniform(seed, draw, epoch, even_ids) * image_size).astype(np.int64)
        bounds += [np.clip(center - side // 2, 0, image_size), np.clip(center + (side + 1) // 2, 0, image_size)]
    box = np.where(cut[:, None], np.stack(bounds, axis=1), 0).astype(np.int32)
    remaining = 1 - (box[:, 1] - box[:, 0]) * (box[:, 3] - box[:, 2]) / image_size**2
    return Mix(box=box, lam=np.where(cut, remaining, lam).astype(np.float32))


def draw_symmetric_beta(alpha: float, seed: int, draw: Draw, epoch: int, ids: np.ndarray) -> np.ndarray:
    """Draws a number for each sample from Beta(alpha, alpha), for small alphas: float64 (n,).

    Jöhnk's algorithm (Jöhnk 1964; Devroye, "Non-Uniform Random Variate Generation", 1986, IX.3.2): draw uniform u and v until x + y <= 1
    for x = u^(1/alpha) and y = v^(1/alpha); the number is x / (x + y). Logarithms avoid the underflow of the powers. Tries are drawn in
    blocks, and each sample takes its first success. `draw` is the purpose of the numbers.
    """
    result = np.empty(len(ids))
    pending = np.arange(len(ids))
    first = 0
    while len(pending):
        keys = (seed, draw, epoch, ids[pending, None], np.arange(first, first + _BETA_TRIES))
        log_x, log_y = (np.log1p(-uniform(*keys, part)) / alpha for part in (0, 1))  # 1 - u is in (0, 1]: no log of 0
        accepted = np.logaddexp(log_x, log_y) <= 0
        done = accepted.any(axis=1)
        column = accepted.argmax(axis=1)[done, None]
        x, y = (np.take_along_axis(part[done], column, 1)[:, 0] for part in (log_x, log_y))
        result[pending[done]] = np.exp(x - np.logaddexp(x, y))
        pending = pending[~done]
        first += _BETA_TRIES
    return result
