"""Data loaders for training and evaluation: from an index and a sample order to batches on the device.

    settings = DataConfig(image_size=224)
    placement = Placement(device, micro_batch=64, rank=rank, ranks=ranks)
    with TrainLoader(index, order, settings, placement, start=step, end=total) as loader:
        for batch in loader:                       # global_batch / ranks / micro_batch of these make one step
            images, targets, weight = mix_pairs(batch.images, batch.labels, batch.mix)

    with EvalLoader(index, settings, placement) as loader:
        for batch in loader: …                     # every sample once over all ranks; the last batch may be smaller
        for batch in loader: …                     # all samples again, with the same pipeline

DALI decodes the crop, resizes, applies the operators of RandAugment or color jitter, and normalizes. The graph is the same on a CPU and
on a GPU. Only encoded bytes are copied to a GPU, and pixels are never copied back. pipeline.py runs the graph.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from nvidia.dali import fn
from nvidia.dali.types import DALIDataType, DALIImageType

from data.augment.erasing import NoiseBank
from data.augment.operators import apply_layer, compute_operator_inputs, resize
from data.augment.recipe import ErasedBoxes, Recipe
from data.augment.sampling import Mix
from data.common.placement import Placement
from data.dataset.index import Index
from data.loader.order import (
    SampleOrder,
    ShardUse,
    compute_evaluation_peak_bytes,
    compute_peak_bytes,
    plan_evaluation_uses,
    plan_shard_uses,
    select_rank_slots,
)
from data.loader.pipeline import Loader, Slots
from data.loader.quarantine import Quarantine
from data.settings import DataConfig


class TrainLoader(Loader):
    """Loads one rank's micro-batches of the steps from `start` up to `end`, in slot order.

    Steps count from the start of training. Ranks and micro-batch must divide the global batch of `order`. Steps for which `is_skipped`
    returns True have no batches. `quarantine` holds the known bad samples. The ranks of a node share the cache of a dataset at a URL.
    """

    def __init__(
        self,
        index: Index,
        order: SampleOrder,
        settings: DataConfig,
        placement: Placement,
        *,
        start: int = 0,
        end: int,
        is_skipped: Callable[[int], bool] = lambda step: False,
        quarantine: Quarantine | None = None,
    ) -> None:
        self.is_skipped, self.order = is_skipped, order
        self.slots = select_rank_slots(order.global_batch, placement.rank, placement.ranks)
        self.start, self.end = start, end
        self.recipe = Recipe(order.seed, settings)
        crop_start = crop_shape = size = linear = mirror = branch = DALIDataType.INT32
        matrix = value = DALIDataType.FLOAT
        dtypes = (crop_start, crop_shape, size, linear, mirror, *(branch, matrix, value) * self.recipe.layers)
        quarantine = Quarantine(index, settings.max_bad) if quarantine is None else quarantine
        noise = NoiseBank(settings.image_size, placement.device) if settings.random_erasing else None
        super().__init__(index, settings, quarantine, dtypes, placement, noise)
        self._start()

    def _plan_uses(self) -> tuple[Iterable[ShardUse], int]:
        uses = plan_shard_uses(self.order, self.slots, self.start, self.end)
        return uses, compute_peak_bytes(self.order, self.index.shard_bytes, self.placement.ranks, self.start, self.end)

    def _list_slots(self) -> Iterator[Slots]:
        copies = self.order.copies[self.slots].reshape(-1, self.placement.micro_batch)
        for step in itertools.filterfalse(self.is_skipped, range(self.start, self.end)):
            epoch, step_in_epoch = self.order.locate(step)
            micro_batches = self.order.batch(epoch, step_in_epoch)[self.slots].reshape(-1, self.placement.micro_batch)
            for number, ids in enumerate(micro_batches):
                is_last = number + 1 == len(micro_batches)
                yield Slots(ids, copies[number], epoch, step, done=step + is_last)

    def _compute_parameters(self, epoch: int, ids: np.ndarray, copies: np.ndarray) -> tuple[tuple[np.ndarray, ...], ErasedBoxes | None]:
        drawn, image_size = self.recipe.draw(epoch, ids, copies, self.index.samples[ids]), self.settings.image_size
        corner, shape = np.ascontiguousarray(drawn.crops[:, :2]), np.ascontiguousarray(drawn.crops[:, 2:])
        size = np.full((len(ids), 2), image_size, np.int32)
        layers = [part for layer, linear in drawn.layers for part in compute_operator_inputs(layer, drawn.mirrored, linear, image_size)]
        return (corner, shape, size, drawn.bilinear.astype(np.int32), drawn.mirrored.astype(np.int32), *layers), drawn.erased

    def _draw_mix(self, slots: Slots) -> Mix | None:
        """Draws the mix for the samples of the order, not for their replacements, so partners of bad samples keep their mix."""
        return self.recipe.draw_mix(slots.epoch, slots.ids, slots.copies)

    def _define_graph(self, encoded: Any, start: Any, shape: Any, size: Any, linear: Any, mirror: Any, *layers: Any) -> tuple[Any, Any]:
        crops = fn.decoders.image_slice(
            encoded,
            start=start,
            shape=shape,
            axis_names="HW",
            device="mixed" if self.device.type == "cuda" else "cpu",
            output_type=DALIImageType.RGB,
            adjust_orientation=False,  # the sizes in the index, and so the crops, are those before EXIF orientation
            hw_decoder_load=self.settings.hw_decoder_load,
        )
        images = resize(crops, size, linear, self._resizer)
        fill = [float(round(255 * mean)) for mean in self.settings.mean]  # timm's fill color
        for first in range(0, len(layers), 3):
            branch, matrix, value = layers[first : first + 3]
            images = apply_layer(images, branch, matrix, value, fill)
        return images, mirror


class EvalLoader(Loader):
    """Loads one rank's samples, each once per iteration. The last micro-batch may be smaller; steps count from 0.

    As in timm's evaluation transform, the shorter side is resized to image_size / eval_crop, bicubic with antialiasing, and the central
    square of image_size is cut out; with eval_resize "squash" images are resized to image_size x image_size. Bad samples are skipped, so
    `quarantine` must not replace them. `samples` are ascending ids, by default those of select_evaluated.
    """

    def __init__(
        self,
        index: Index,
        settings: DataConfig,
        placement: Placement,
        *,
        quarantine: Quarantine | None = None,
        samples: np.ndarray | None = None,
    ) -> None:
        self.samples = select_evaluated(index, settings) if samples is None else samples
        self.rank_samples = self.samples[placement.rank :: placement.ranks]
        size = linear = corner = DALIDataType.INT32
        quarantine = Quarantine(index, settings.max_bad, replaces=False) if quarantine is None else quarantine
        super().__init__(index, settings, quarantine, (size, linear, corner), placement)

    def _plan_uses(self) -> tuple[Iterable[ShardUse], int]:
        shard_start = np.searchsorted(self.samples, self.index.shard_start)
        uses = plan_evaluation_uses(shard_start, self.placement.micro_batch, self.placement.ranks)
        return uses, compute_evaluation_peak_bytes(uses, self.index.shard_bytes)

    def _list_slots(self) -> Iterator[Slots]:
        micro_batch = self.placement.micro_batch
        for step, start in enumerate(range(0, len(self.rank_samples), micro_batch)):
            ids = self.rank_samples[start : start + micro_batch]
            yield Slots(ids, np.zeros_like(ids), epoch=0, step=step, done=step + 1)

    def _compute_parameters(self, epoch: int, ids: np.ndarray, copies: np.ndarray) -> tuple[tuple[np.ndarray, ...], ErasedBoxes | None]:
        samples = self.index.samples[ids]
        size = compute_resized_shape(samples["width"], samples["height"], self.settings)
        corner = np.rint((size - self.settings.image_size) / 2).astype(np.int32)  # torchvision's CenterCrop rounds halves to even
        return (size.astype(np.int32), np.zeros(len(ids), np.int32), corner), None

    def _draw_mix(self, slots: Slots) -> Mix | None:
        return None

    def _define_graph(self, encoded: Any, size: Any, linear: Any, corner: Any) -> tuple[Any, Any]:
        images = fn.decoders.image(
            encoded,
            device="mixed" if self.device.type == "cuda" else "cpu",
            output_type=DALIImageType.RGB,
            adjust_orientation=False,
            hw_decoder_load=self.settings.hw_decoder_load,
            jpeg_fancy_upsampling=True,  # on a GPU, upsamples chroma as libjpeg does, which Pillow and the CPU graph use
        )
        resized = resize(images, size, linear, self._resizer)
        return fn.slice(resized, start=corner, shape=[self.settings.image_size] * 2, axis_names="HW"), 0


def select_evaluated(index: Index, settings: DataConfig) -> np.ndarray:
    """Returns the ids of the samples to evaluate, int64 and ascending: all except those of the classes in data.val_except.

    Raises ValueError for a name in data.val_except that is not a class.
    """
    unknown = [name for name in settings.val_except if name not in index.classes]
    if unknown:
        raise ValueError(f"data.val_except contains {', '.join(unknown)}, which is not a class of {index.place}; remove it")
    labels = [index.classes.index(name) for name in settings.val_except]
    return np.flatnonzero(~np.isin(index.samples["label"], labels))


def compute_resized_shape(widths: np.ndarray, heights: np.ndarray, settings: DataConfig) -> np.ndarray:
    """Computes (height, width) in pixels after the resize of evaluation, int64 (n, 2).

    The shorter side becomes floor(image_size / eval_crop), as in timm: 256 for 224 and 0.875. The longer side becomes int(shorter * long
    / short), as in torchvision's Resize.
    """
    sides = np.stack([heights, widths], axis=1).astype(np.int64)
    if settings.eval_resize == "squash":
        return np.full_like(sides, settings.image_size)
    return math.floor(settings.image_size / settings.eval_crop) * sides // sides.min(axis=1, keepdims=True)
