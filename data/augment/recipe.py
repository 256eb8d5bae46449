"""Draws all augmentation parameters of a job's samples, for the loader, `data order` and `data preview`.

    recipe = Recipe(seed, settings)
    drawn = recipe.draw(epoch, ids, copies, index.samples[ids])
    mix = recipe.draw_mix(epoch, ids, copies)    # for pairs of neighbors; None without mixup and cutmix

The parameters are pure functions of (seed, epoch, sample id, copy). Repeated augmentation makes several copies of a sample; copy 0 has the
parameters of a sample that is not repeated.
"""

from dataclasses import dataclass

import numpy as np

from data.augment.randaugment import JITTER_LAYERS, Layer, draw_color_jitter, draw_rand_augment
from data.augment.sampling import Mix, draw_bilinear, draw_crops, draw_erased_boxes, draw_flips, draw_mix, draw_noise_starts
from data.settings import DataConfig, parse_policy

_COPY_SHIFT = 48  # the copy takes the bits above those of the sample id


@dataclass(frozen=True, eq=False)
class ErasedBoxes:
    """The boxes that are erased in n samples, int32 (n, count, 4): y, x, height, width.

    A height of 0 means no box. `starts`, int64 (n, count): where in the bank (erasing.py) the noise of each box begins.
    """

    boxes: np.ndarray
    starts: np.ndarray


@dataclass(frozen=True, eq=False)
class AugmentParameters:
    """The augmentation parameters of n samples, in the order of their application.

    Attributes:
        crops: int32 (n, 4), y, x, height, width in pixels of the image as stored.
        bilinear: bool (n,), whether crops are resized bilinearly.
        mirrored: bool (n,).
        layers: the operators, each with bool (n,): whether its geometry is bilinear.
        erased: the boxes; None without random erasing.
    """

    crops: np.ndarray
    bilinear: np.ndarray
    mirrored: np.ndarray
    layers: list[tuple[Layer, np.ndarray]]
    erased: ErasedBoxes | None


class Recipe:
    """Draws the parameters that a job's settings require. Raises ValueError for an invalid auto_augment."""

    def __init__(self, seed: int, settings: DataConfig) -> None:
        self.seed, self.settings = seed, settings
        self._policy = parse_policy(settings.auto_augment) if settings.auto_augment else None

    @property
    def layers(self) -> int:
        """The number of layers of operators. As in timm, RandAugment turns color jitter off."""
        if self._policy:
            return self._policy.layers
        return JITTER_LAYERS if self.settings.color_jitter else 0

    def draw(self, epoch: int, ids: np.ndarray, copies: np.ndarray, rows: np.ndarray) -> AugmentParameters:
        """Draws the parameters of samples with these ids and copies, int64 (n,), and rows of the index."""
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
            erased = ErasedBoxes(boxes, draw_noise_starts(*keys, count))
        return AugmentParameters(
            crops=draw_crops(*keys, rows["width"], rows["height"], scale=settings.crop_area, ratio=settings.crop_ratio),
            bilinear=draw_bilinear(*keys, settings.interpolation, 0),
            mirrored=draw_flips(*keys, settings.flip),
            layers=[(layer, draw_bilinear(*keys, settings.interpolation, number)) for number, layer in enumerate(layers, 1)],
            erased=erased,
        )

    def draw_mix(self, epoch: int, ids: np.ndarray, copies: np.ndarray) -> Mix | None:
        """Draws how pairs of neighbors are mixed; `ids` and `copies` start at an even slot."""
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
    return ids + (copies << _COPY_SHIFT)
