"""From an index and an order to batches on the device: DALI's graph, what feeds it, and the two iterators over it.

    with TrainLoader(index, order, image_size=224, micro_batch=64, rank=rank, ranks=ranks, seed=0, device="cuda:0", threads=8,
                     mean=IMAGENET_MEAN, std=IMAGENET_STD, start_step=step, steps=total_steps) as loader:
        for batch in loader:                       # global_batch / ranks / micro_batch of these make one step
            images, targets, weight = mix_pairs(batch.images, batch.labels, batch.mix)

    with EvalLoader(index, image_size=224, resize=256, …) as loader:
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
from typing import Any, Literal, Self

import numpy as np
import torch
from nvidia.dali import fn
from nvidia.dali.pipeline import Pipeline
from nvidia.dali.types import DALIDataType, DALIImageType, DALIInterpType
from PIL import Image

from data.augment import Mix, flip, mix_parameters, random_resized_crop
from data.index import Index, key
from data.order import SampleOrder, evaluation_ids, rank_slice
from data.reader import ReadAhead
from data.store import ShardStore

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

READ_THREADS = 4


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
    """What is to be done for a batch; `parameters` are the inputs of the graph beside the encoded images, one row a sample."""

    ids: np.ndarray
    parameters: tuple[np.ndarray, ...]
    mix: Mix | None = None
    epoch: int = 0
    step: int = 0


# A graph takes the node of encoded images and one for each of MicroBatch.parameters, and gives uint8 images and the mirror
# flags.
Graph = Callable[..., tuple[Any, Any]]


class _Loader:
    """Runs a graph over micro-batches of at most `max_batch` samples, in order."""

    def __init__(
        self,
        index: Index,
        work: Iterator[MicroBatch],
        graph: Graph,
        dtypes: Sequence[Any],
        *,
        max_batch: int,
        device: str,
        threads: int,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        self.index = index
        self.device = torch.device(device)
        self._store = ShardStore(index)
        self._inside: deque[MicroBatch] = deque()  # given to DALI, not yet come out
        # With the dynamic executor every output owns its memory (the others reuse theirs), so batches need no copy.
        self._pipeline: Pipeline | None = Pipeline(
            batch_size=max_batch,
            num_threads=threads,
            device_id=self.device.index if self.device.type == "cuda" else None,
            prefetch_queue_depth=2,
            exec_dynamic=True,
        )
        with self._pipeline:
            inputs = fn.external_source(
                self._feed, num_outputs=1 + len(dtypes), batch=True, dtype=[DALIDataType.UINT8, *dtypes]
            )
            images, mirror = graph(*inputs)
            normalised = fn.crop_mirror_normalize(
                images,
                mirror=mirror,
                mean=[255 * value for value in mean],
                std=[255 * value for value in std],
                dtype=DALIDataType.FLOAT,
                output_layout="HWC",
            )
            self._pipeline.set_outputs(normalised)
        self._pipeline.build()
        self._reader = ReadAhead(self._store, work, threads=READ_THREADS, depth=READ_THREADS + 2)

    def _feed(self) -> list[Any]:
        item, images = next(self._reader)
        self._inside.append(item)
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
                    raise ValueError(self._explain(self._inside[0], error)) from error
                item = self._inside.popleft()
                labels = torch.from_numpy(self.index.samples["label"][item.ids].astype(np.int64))
                if self.device.type == "cuda":
                    labels = labels.pin_memory().to(self.device, non_blocking=True)
                images = torch.from_dlpack(output.as_tensor()).permute(0, 3, 1, 2)
                yield Batch(images, labels, item.ids, item.mix, item.epoch, item.step)
        finally:
            self.close()

    def _explain(self, item: MicroBatch, error: RuntimeError) -> str:
        """Which of a batch's images made DALI fail, found by decoding each with Pillow."""
        faults = []
        for sample_id in item.ids.tolist():
            try:
                with Image.open(io.BytesIO(self._store.read(sample_id).tobytes())) as image:
                    image.load()
            except Exception as fault:  # Pillow's decoders raise whatever the damage leads them to
                shard = self.index.shards[self.index.shard_of(sample_id)]
                faults.append(f"sample {sample_id} (key {key(self.index, sample_id)} in {shard}: {fault})")
        if faults:
            return f"{self.index.folder}: can't decode {'; '.join(faults)}. Find all of them with `python -m data verify`"
        return (
            f"{self.index.folder}: DALI failed on the batch of samples {item.ids.min()} to {item.ids.max()}, "
            f"all of which Pillow can decode: {error}"
        )

    def close(self) -> None:
        """Ends all threads. Batches given out stay valid."""
        self._reader.close()
        self._pipeline = None
        self._store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class TrainLoader(_Loader):
    """One rank's micro-batches of the steps start_step to steps - 1, in slot order.

    `mixup` and `cutmix` are the alphas of their Beta distributions; with both 0, batches come with mix None. `mean` and `std`
    are in units of full intensity, as timm's. `threads` is the number of DALI's CPU threads.

    Raises ValueError when ranks and micro_batch do not divide the global batch, or when pairs would be torn apart.
    """

    def __init__(
        self,
        index: Index,
        order: SampleOrder,
        *,
        image_size: int,
        micro_batch: int,
        rank: int,
        ranks: int,
        seed: int,
        device: str,
        threads: int,
        mean: Sequence[float],
        std: Sequence[float],
        crop_scale: tuple[float, float] = (0.08, 1.0),
        crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: float = 0.5,
        mixup: float = 0.8,
        cutmix: float = 1.0,
        mix_switch: float = 0.5,
        start_step: int = 0,
        steps: int,
    ) -> None:
        self.order = order
        self.image_size = image_size
        self.micro_batch = micro_batch
        self.seed = seed
        self.slots = rank_slice(order.global_batch, rank, ranks)
        self.crop_scale, self.crop_ratio, self.flip = crop_scale, crop_ratio, flip
        self.mixup, self.cutmix, self.mix_switch = mixup, cutmix, mix_switch
        self.mixes = mixup > 0 or cutmix > 0
        self.accumulation = accumulation(order.global_batch, ranks, micro_batch, pairs=self.mixes)
        super().__init__(
            index,
            self._work(start_step, steps),
            self._graph,
            (DALIDataType.INT32, DALIDataType.INT32, DALIDataType.INT32),
            max_batch=micro_batch,
            device=device,
            threads=threads,
            mean=mean,
            std=std,
        )

    def _work(self, start_step: int, steps: int) -> Iterator[MicroBatch]:
        for step in range(start_step, steps):
            epoch, step_in_epoch = self.order.locate(step)
            own = self.order.batch(epoch, step_in_epoch)[self.slots]
            for ids in own.reshape(self.accumulation, self.micro_batch):
                samples = self.index.samples[ids]
                crops = random_resized_crop(
                    self.seed, epoch, ids, samples["width"], samples["height"], scale=self.crop_scale, ratio=self.crop_ratio
                )
                mirror = flip(self.seed, epoch, ids, self.flip).astype(np.int32)
                mix = None
                if self.mixes:
                    mix = mix_parameters(
                        self.seed,
                        epoch,
                        ids[::2],
                        image_size=self.image_size,
                        mixup=self.mixup,
                        cutmix=self.cutmix,
                        switch=self.mix_switch,
                    )
                parameters = (np.ascontiguousarray(crops[:, :2]), np.ascontiguousarray(crops[:, 2:]), mirror)
                yield MicroBatch(ids, parameters, mix, epoch, step)

    def _graph(self, encoded: Any, start: Any, shape: Any, mirror: Any) -> tuple[Any, Any]:
        crops = fn.decoders.image_slice(
            encoded,
            start=start,
            shape=shape,
            axis_names="HW",
            device="mixed" if self.device.type == "cuda" else "cpu",
            output_type=DALIImageType.RGB,
            adjust_orientation=False,  # the index, and so the crop, speaks of the image as it is stored
        )
        size = [self.image_size, self.image_size]
        return fn.resize(crops, size=size, interp_type=DALIInterpType.INTERP_CUBIC, antialias=True), mirror


class EvalLoader(_Loader):
    """One rank's samples, each once, in micro-batches of which the last may be smaller; steps count from 0.

    The images are those of timm's evaluation transform: bicubic with antialiasing, the shorter side to `resize` pixels, then
    the central square of `image_size`; with resize="squash" straight to image_size x image_size. A rank without samples
    yields nothing.

    Raises ValueError when the square does not fit into the resized image.
    """

    def __init__(
        self,
        index: Index,
        *,
        image_size: int,
        resize: int | Literal["squash"] = 256,
        micro_batch: int,
        rank: int,
        ranks: int,
        device: str,
        threads: int,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        if resize != "squash" and resize < image_size:
            raise ValueError(f"resize {resize} is smaller than the image size {image_size} that is to be cut from it")
        self.image_size = image_size
        self.resize = resize
        self.micro_batch = micro_batch
        super().__init__(
            index,
            self._work(evaluation_ids(len(index), rank, ranks)),
            self._graph,
            (DALIDataType.FLOAT, DALIDataType.INT32),
            max_batch=micro_batch,
            device=device,
            threads=threads,
            mean=mean,
            std=std,
        )

    def _work(self, own: np.ndarray) -> Iterator[MicroBatch]:
        for step, start in enumerate(range(0, len(own), self.micro_batch)):
            ids = own[start : start + self.micro_batch]
            samples = self.index.samples[ids]
            size = resized_shape(samples["width"], samples["height"], self.image_size, self.resize)
            corner = np.rint((size - self.image_size) / 2).astype(np.int32)  # torchvision's CenterCrop rounds halves to even
            yield MicroBatch(ids, (size.astype(np.float32), corner), step=step)

    def _graph(self, encoded: Any, size: Any, corner: Any) -> tuple[Any, Any]:
        images = fn.decoders.image(
            encoded,
            device="mixed" if self.device.type == "cuda" else "cpu",
            output_type=DALIImageType.RGB,
            adjust_orientation=False,
            jpeg_fancy_upsampling=True,  # on a GPU: upsample chroma as libjpeg does, which Pillow and the CPU graph use
        )
        resized: Any = fn.resize(images, size=size, interp_type=DALIInterpType.INTERP_CUBIC, antialias=True)
        return fn.slice(resized, start=corner, shape=[self.image_size, self.image_size], axis_names="HW"), 0


def accumulation(global_batch: int, ranks: int, micro_batch: int, *, pairs: bool) -> int:
    """How many micro-batches each rank runs in a step. With `pairs`, micro-batches hold whole pairs of slots.

    Raises ValueError, naming values that work, when the global batch can't be cut that way.
    """
    slots = rank_slice(global_batch, 0, ranks)
    share = slots.stop - slots.start
    unit = 2 if pairs else 1
    if share % micro_batch or micro_batch % unit:
        fit = [size for size in range(unit, share + 1, unit) if share % size == 0]
        near = sorted(sorted(fit, key=lambda size: abs(math.log(size / micro_batch)))[:6])
        raise ValueError(
            f"a micro-batch of {micro_batch} does not fit: each of {ranks} ranks has {share} samples of a global batch of "
            f"{global_batch}{', to be mixed in pairs' if pairs else ''}; "
            + (f"micro-batches that work: {', '.join(map(str, near))}" if near else "use fewer ranks or a larger global batch")
        )
    return share // micro_batch


def resized_shape(widths: np.ndarray, heights: np.ndarray, image_size: int, resize: int | Literal["squash"]) -> np.ndarray:
    """(height, width) after the resize of evaluation, int64 (n, 2).

    As in torchvision's Resize, which timm uses: the shorter side becomes `resize`, the longer one int(resize * long / short).
    """
    sides = np.stack([heights, widths], axis=1).astype(np.int64)
    if resize == "squash":
        return np.full_like(sides, image_size)
    return resize * sides // sides.min(axis=1, keepdims=True)


def shorter_side(image_size: int, crop_pct: float) -> int:
    """The `resize` that belongs to timm's crop_pct: 256 for 224 and 0.875."""
    return math.floor(image_size / crop_pct)
