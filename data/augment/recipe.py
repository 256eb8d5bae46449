"""Draws all augmentation parameters of a job's samples, for the loader, `data order` and `data preview`.

    recipe = Recipe(seed, settings)
    drawn = recipe.draw(epoch, ids, copies, index.samples[ids])
    mix = recipe.mix(epoch, ids, copies)         # of pairs of neighbours; None where nothing is mixed

Pure functions of (seed, epoch, sample id, copy). Copies are those of repeated augmentation, 0 where a sample isn't repeated; each is
drawn for on its own, the first one like a sample without repeats.
"""

from dataclasses import dataclass

import numpy as np

from data.augment.randaugment import JITTER_LAYERS, Layer, draw_color_jitter, draw_rand_augment
from data.augment.sampling import Mix, draw_bilinear, draw_crops, draw_erased_boxes, draw_flips, draw_mix, draw_noise_starts
from data.settings import DataConfig, parse_policy

_COPY_BITS = 48  # above those of sample ids


@dataclass(frozen=True, eq=False)
class Erased:
    """Boxes of n samples, int32 (n, count, 4): y, x, height, width, those of no height being none; and where the noise of each begins in
    the bank (erasing.py), int64 (n, count)."""

    boxes: np.ndarray
    starts: np.ndarray


@dataclass(frozen=True, eq=False)
class Drawn:
    """What is done to n samples, in this order.

    crops int32 (n, 4): y, x, height, width in pixels of the image as stored; bilinear bool (n,): how they are resized; mirrored bool
    (n,); layers, each with whether its geometry is bilinear, bool (n,); what is erased, None where nothing ever is.
    """

    crops: np.ndarray
    bilinear: np.ndarray
    mirrored: np.ndarray
    layers: list[tuple[Layer, np.ndarray]]
    erased: Erased | None


class Recipe:
    """Raises ValueError for an auto_augment that can't be read."""

    def __init__(self, seed: int, settings: DataConfig) -> None:
        self.seed, self.settings = seed, settings
        self._policy = parse_policy(settings.auto_augment) if settings.auto_augment else None

    @property
    def layers(self) -> int:
        """How many layers of operators there are. As in timm, colour jitter is off while there is RandAugment."""
        return self._policy.layers if self._policy else JITTER_LAYERS if self.settings.color_jitter else 0

    def draw(self, epoch: int, ids: np.ndarray, copies: np.ndarray, rows: np.ndarray) -> Drawn:
        """For samples with these ids and copies, int64 (n,), and rows of the index."""
        settings, keys = self.settings, (self.seed, epoch, _draw_ids(ids, copies))
        layers: list[Layer] = []
        if self._policy:
            layers = draw_rand_augment(*keys, self._policy)
        elif settings.color_jitter:
            layers = draw_color_jitter(*keys, settings.color_jitter)
        erased = None
        if settings.random_erasing:
            probability, count = settings.random_erasing, settings.erasing_count
            boxes = draw_erased_boxes(*keys, image_size=settings.image_size, probability=probability, count=count)
            erased = Erased(boxes, draw_noise_starts(*keys, count))
        return Drawn(
            crops=draw_crops(*keys, rows["width"], rows["height"], scale=settings.crop_area, ratio=settings.crop_ratio),
            bilinear=draw_bilinear(*keys, settings.interpolation, 0),
            mirrored=draw_flips(*keys, settings.flip),
            layers=[(layer, draw_bilinear(*keys, settings.interpolation, number)) for number, layer in enumerate(layers, 1)],
            erased=erased,
        )

    def mix(self, epoch: int, ids: np.ndarray, copies: np.ndarray) -> Mix | None:
        """How pairs of neighbours are mixed; `ids` and `copies` are those of slots from an even one on."""
        settings = self.settings
        if not (settings.mixup or settings.cutmix):
            return None
        return draw_mix(
            self.seed,
            epoch,
            _draw_ids(ids, copies)[::2],
            image_size=settings.image_size,
            mixup=settings.mixup,
            cutmix=settings.cutmix,
            switch=settings.mix_switch,
        )


def _draw_ids(ids: np.ndarray, copies: np.ndarray) -> np.ndarray:
    return ids + (copies << _COPY_BITS)
