"""From an index and an order to batches on the device: DALI's graph, what feeds it, and the two iterators over it.

    settings = DataConfig(image_size=224)
    with TrainLoader(index, order, settings, micro_batch=64, rank=rank, ranks=ranks, device=device, start=step, end=total) as loader:
        for batch in loader:                       # global_batch / ranks / micro_batch of these make one step
            images, targets, weight = mix_pairs(batch.images, batch.labels, batch.mix)

    with EvalLoader(index, settings, micro_batch=64, rank=rank, ranks=ranks, device=device) as loader:
        for batch in loader: …                     # every sample once over all ranks; the last batch may be smaller

One pipeline serves a whole training; epochs end without a rebuild. Threads read encoded images ahead and compute what is done
to them (reader.py); DALI decodes, crops and resizes; labels and ids travel beside DALI, never through it. The graph is the
same on a CPU and on a GPU, where JPEG bytes cross to the device and pixels never cross back.
"""

import io
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def
from nvidia.dali.pipeline import Pipeline
from nvidia.dali.types import DALIDataType, DALIImageType
from PIL import Image

from data.augment import Mix, bilinear, erased_boxes, flip, mix_parameters, random_resized_crop
from data.erasing import NoiseBank, noise_starts
from data.index import Index, key
from data.operators import CpuResizer, apply_layer, operator_inputs, resize
from data.order import (
    SampleOrder,
    bytes_at_once,
    evaluation_bytes_at_once,
    evaluation_ids,
    evaluation_uses,
    rank_slice,
    shard_uses,
)
from data.randaugment import color_jitter, parse_policy, rand_augment
from data.reader import ReadAhead
from data.settings import DataConfig
from data.store import FetchedShards, ShardStore


@dataclass(frozen=True, eq=False)
class Batch:
    """A micro-batch of B samples on the device.

    images (B, 3, H, W) float32, normalised, channels-last in memory; labels (B,) int64; ids int64 (B,), on the host; mix: how
    to mix neighbouring samples, None where nothing is mixed; epoch, and step counted from 0 at the start of training.
    """

    images: torch.Tensor
    labels: torch.Tensor
    ids: np.ndarray
    mix: Mix | None
    epoch: int
    step: int


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """What is to be done for a batch; `parameters` are the inputs of the graph beside the encoded images, one row a sample.
    Once it is read, so is all that steps before `done` take."""

    ids: np.ndarray
    parameters: tuple[np.ndarray, ...]
    mix: Mix | None = None
    epoch: int = 0
    step: int = 0
    done: int = 0


# A graph takes the node of encoded images and one for each of MicroBatch.parameters, and gives uint8 images and the mirror
# flags.
Graph = Callable[..., tuple[Any, Any]]


class _Loader:
    """Runs a graph over micro-batches of at most `max_batch` samples, in order."""

    def __init__(
        self,
        store: ShardStore,
        work: Iterator[MicroBatch],
        graph: Graph,
        dtypes: Sequence[Any],
        settings: DataConfig,
        *,
        max_batch: int,
        device: torch.device,
    ) -> None:
        self.index, self.settings, self.device = store.index, settings, device
        self._store = store
        self._resizer = CpuResizer(settings.decode_threads)
        self._inside: deque[tuple[MicroBatch, list[np.ndarray]]] = deque()  # given to DALI, not yet come out

        # With the dynamic executor every output owns its memory (the others reuse theirs), so batches need no copy.
        @pipeline_def(  # type: ignore[call-overload]  # its stub lacks exec_dynamic
            batch_size=max_batch,
            num_threads=settings.decode_threads,
            device_id=self.device.index if self.device.type == "cuda" else None,
            prefetch_queue_depth=2,
            exec_dynamic=True,
            enable_conditionals=True,
        )
        def pipeline() -> Any:
            inputs = fn.external_source(self._feed, num_outputs=1 + len(dtypes), batch=True, dtype=[DALIDataType.UINT8, *dtypes])
            images, mirror = graph(*inputs)
            return fn.crop_mirror_normalize(
                images,
                mirror=mirror,
                mean=[255 * value for value in settings.mean],
                std=[255 * value for value in settings.std],
                dtype=DALIDataType.FLOAT,
                output_layout="HWC",
            )

        self._pipeline: Pipeline | None = pipeline()
        self._pipeline.build()
        self._reader = ReadAhead(self._store, work, threads=settings.read_threads, depth=settings.read_threads + 2)

    def _feed(self) -> list[Any]:
        item, images = next(self._reader)
        self._store.advance(item.done)
        self._inside.append((item, images))
        return [images, *item.parameters]

    def __iter__(self) -> Iterator[Batch]:
        """The batches, once. Raises ValueError, naming the samples, for images that can't be read or decoded."""
        try:
            while self._pipeline is not None:
                # Bound to the stream of the consumer, outputs are ready and are freed in that stream's order: nobody waits.
                stream = (torch.cuda.current_stream(self.device),) if self.device.type == "cuda" else ()
                try:
                    (output,) = self._pipeline.run(*stream)
                except StopIteration:
                    return
                except RuntimeError as error:
                    raise ValueError(self._explain(*self._inside[0], error)) from error
                item, _ = self._inside.popleft()
                labels = torch.from_numpy(self.index.samples["label"][item.ids].astype(np.int64))
                if self.device.type == "cuda":
                    labels = labels.pin_memory().to(self.device, non_blocking=True)
                images = torch.from_dlpack(output.as_tensor()).permute(0, 3, 1, 2)
                self._finish(images, item)
                yield Batch(images, labels, item.ids, item.mix, item.epoch, item.step)
        finally:
            self.close()

    def _finish(self, images: torch.Tensor, item: MicroBatch) -> None:
        """What is done to normalised images on the device, in place."""

    def _explain(self, item: MicroBatch, images: list[np.ndarray], error: RuntimeError) -> str:
        """Which of a batch's images made DALI fail, found by decoding each with Pillow."""
        faults = []
        for sample_id, encoded in zip(item.ids.tolist(), images, strict=True):
            try:
                with Image.open(io.BytesIO(encoded.tobytes())) as image:
                    image.load()
            except Exception as fault:  # Pillow's decoders raise whatever the damage leads them to
                shard = self.index.shards[self.index.shard_of(sample_id)].name
                faults.append(f"sample {sample_id} (key {key(self.index, sample_id)} in {shard}: {fault})")
        if faults:
            return f"{self.index.place}: can't decode {'; '.join(faults)}. Find all of them with `python -m data verify`"
        return (
            f"{self.index.place}: DALI failed on the batch of samples {item.ids.min()} to {item.ids.max()}, "
            f"all of which Pillow can decode: {error}"
        )

    @property
    def waited_for_shards_s(self) -> float:
        """Seconds that reading threads, all of them together, have waited for shards to be fetched."""
        return self._store.waited_s

    def close(self) -> None:
        """Ends all threads. Batches given out stay valid."""
        self._store.close()  # first, as the reader's threads may be waiting for it
        self._reader.close()
        self._pipeline = None
        self._resizer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class TrainLoader(_Loader):
    """One rank's micro-batches of the steps `start` to `end` - 1, in slot order.

    With mixup and cutmix both off, batches come with mix None. Ranks and micro-batch must divide the global batch. The cache of a
    dataset at a URL is shared by `ranks_on_node` ranks.
    """

    def __init__(
        self,
        index: Index,
        order: SampleOrder,
        settings: DataConfig,
        *,
        micro_batch: int,
        rank: int,
        ranks: int,
        device: torch.device,
        start: int = 0,
        end: int,
        ranks_on_node: int = 1,
    ) -> None:
        self.order, self.micro_batch = order, micro_batch
        self.slots = rank_slice(order.global_batch, rank, ranks)
        store = ShardStore(index)
        if index.remote:
            at_once = bytes_at_once(order, index.shard_bytes, ranks, start, end)
            uses = shard_uses(order, self.slots, start, end)
            store = FetchedShards(index, uses, at_once=at_once, cache_gb=settings.cache_gb, ranks_on_node=ranks_on_node)
        self._policy = parse_policy(settings.auto_augment) if settings.auto_augment else None
        layers = self._policy.layers if self._policy else 3 if settings.color_jitter else 0
        crop_start = crop_shape = size = linear = mirror = group = DALIDataType.INT32
        matrix = value = DALIDataType.FLOAT
        inputs = (crop_start, crop_shape, size, linear, mirror, *(group, matrix, value) * layers)
        self._noise = NoiseBank(settings.image_size, device) if settings.random_erasing else None
        super().__init__(store, self._work(start, end), self._graph, inputs, settings, max_batch=micro_batch, device=device)

    def _work(self, start: int, end: int) -> Iterator[MicroBatch]:
        seed, settings = self.order.seed, self.settings
        for step in range(start, end):
            epoch, step_in_epoch = self.order.locate(step)
            own = self.order.batch(epoch, step_in_epoch)[self.slots]
            batches = own.reshape(-1, self.micro_batch)
            for number, ids in enumerate(batches, 1):
                mix = None
                if settings.mixup or settings.cutmix:
                    mix = mix_parameters(
                        seed,
                        epoch,
                        ids[::2],
                        image_size=settings.image_size,
                        mixup=settings.mixup,
                        cutmix=settings.cutmix,
                        switch=settings.mix_switch,
                    )
                yield MicroBatch(ids, self._parameters(epoch, ids), mix, epoch, step, done=step + (number == len(batches)))

    def _parameters(self, epoch: int, ids: np.ndarray) -> tuple[np.ndarray, ...]:
        """What the graph is fed beside the images: crops, mirroring, interpolation, and what each layer of operators takes."""
        seed, settings = self.order.seed, self.settings
        samples = self.index.samples[ids]
        crops = random_resized_crop(
            seed, epoch, ids, samples["width"], samples["height"], scale=settings.crop_area, ratio=settings.crop_ratio
        )
        mirrored = flip(seed, epoch, ids, settings.flip)
        linear = bilinear(seed, epoch, ids, settings.interpolation, 0)
        size = np.full((len(ids), 2), settings.image_size, np.int32)
        parameters = [np.ascontiguousarray(crops[:, :2]), np.ascontiguousarray(crops[:, 2:]), size]
        parameters += [linear.astype(np.int32), mirrored.astype(np.int32)]
        layers = []
        if self._policy:
            layers = rand_augment(seed, epoch, ids, self._policy)
        elif settings.color_jitter:
            layers = color_jitter(seed, epoch, ids, settings.color_jitter)
        for number, layer in enumerate(layers, 1):
            warped_linear = bilinear(seed, epoch, ids, settings.interpolation, number)
            parameters += operator_inputs(layer, mirrored, warped_linear, settings.image_size)
        return tuple(parameters)

    def _finish(self, images: torch.Tensor, item: MicroBatch) -> None:
        if self._noise is not None:
            seed, count = self.order.seed, self.settings.erasing_count
            boxes = erased_boxes(
                seed, item.epoch, item.ids, image_size=self.settings.image_size, probability=self.settings.random_erasing, count=count
            )
            self._noise.erase(images, boxes, noise_starts(seed, item.epoch, item.ids, count))

    def _graph(self, encoded: Any, start: Any, shape: Any, size: Any, linear: Any, mirror: Any, *operators: Any) -> tuple[Any, Any]:
        crops = fn.decoders.image_slice(
            encoded,
            start=start,
            shape=shape,
            axis_names="HW",
            device="mixed" if self.device.type == "cuda" else "cpu",
            output_type=DALIImageType.RGB,
            adjust_orientation=False,  # the index, and so the crop, speaks of the image as it is stored
            hw_decoder_load=self.settings.hw_decoder_load,
        )
        images = resize(crops, size, linear, self._resizer)
        for layer in range(0, len(operators), 3):
            group, matrix, value = operators[layer : layer + 3]
            images = apply_layer(images, group, matrix, value, [round(255 * mean) for mean in self.settings.mean])
        return images, mirror


class EvalLoader(_Loader):
    """One rank's samples, each once, in micro-batches of which the last may be smaller; steps count from 0.

    The images are those of timm's evaluation transform: bicubic with antialiasing, the shorter side to image_size / eval_crop,
    then the central square of image_size; with eval_resize "squash" straight to image_size x image_size. A rank without samples
    yields nothing.
    """

    def __init__(
        self,
        index: Index,
        settings: DataConfig,
        *,
        micro_batch: int,
        rank: int,
        ranks: int,
        device: torch.device,
        ranks_on_node: int = 1,
    ) -> None:
        self.micro_batch = micro_batch
        own = evaluation_ids(len(index), rank, ranks)
        store = ShardStore(index)
        if index.remote:
            uses = evaluation_uses(index.shard_start, micro_batch, ranks)
            at_once = evaluation_bytes_at_once(uses, index.shard_bytes)
            store = FetchedShards(index, uses, at_once=at_once, cache_gb=settings.cache_gb, ranks_on_node=ranks_on_node)
        size = linear = corner = DALIDataType.INT32
        inputs = (size, linear, corner)
        super().__init__(store, self._work(own), self._graph, inputs, settings, max_batch=micro_batch, device=device)

    def _work(self, own: np.ndarray) -> Iterator[MicroBatch]:
        for step, start in enumerate(range(0, len(own), self.micro_batch)):
            ids = own[start : start + self.micro_batch]
            samples = self.index.samples[ids]
            size = resized_shape(samples["width"], samples["height"], self.settings)
            corner = np.rint((size - self.settings.image_size) / 2).astype(np.int32)  # torchvision's CenterCrop rounds halves to even
            yield MicroBatch(ids, (size.astype(np.int32), np.zeros(len(ids), np.int32), corner), step=step, done=step + 1)

    def _graph(self, encoded: Any, size: Any, linear: Any, corner: Any) -> tuple[Any, Any]:
        images = fn.decoders.image(
            encoded,
            device="mixed" if self.device.type == "cuda" else "cpu",
            output_type=DALIImageType.RGB,
            adjust_orientation=False,
            hw_decoder_load=self.settings.hw_decoder_load,
            jpeg_fancy_upsampling=True,  # on a GPU: upsample chroma as libjpeg does, which Pillow and the CPU graph use
        )
        resized = resize(images, size, linear, self._resizer)
        return fn.slice(resized, start=corner, shape=[self.settings.image_size] * 2, axis_names="HW"), 0


def resized_shape(widths: np.ndarray, heights: np.ndarray, settings: DataConfig) -> np.ndarray:
    """(height, width) after the resize of evaluation, int64 (n, 2).

    As in timm: the shorter side becomes floor(image_size / eval_crop), 256 for 224 and 0.875, and the longer one, as in
    torchvision's Resize, int(shorter * long / short).
    """
    sides = np.stack([heights, widths], axis=1).astype(np.int64)
    if settings.eval_resize == "squash":
        return np.full_like(sides, settings.image_size)
    return math.floor(settings.image_size / settings.eval_crop) * sides // sides.min(axis=1, keepdims=True)
