"""Runs a DALI graph over micro-batches that are read ahead: the base class of the data loaders.

A loader (loaders.py has two) lists the samples of its micro-batches (`_list_slots`), computes the parameters of each
(`_compute_parameters`) and defines the graph (`_define_graph`). Threads read encoded images ahead and compute the parameters
(read_ahead.py); labels and ids bypass DALI. One pipeline serves all epochs.

A bad image goes into quarantine (quarantine.py) and is replaced, or skipped in evaluation. The reading threads find images that can't be
read or have a wrong header. If DALI fails on any other image, each image in flight is decoded alone, and a new pipeline gets the good ones.
"""

from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def
from nvidia.dali.pipeline import Pipeline
from nvidia.dali.types import DALIDataType

from data.augment.erasing import NoiseBank
from data.augment.operators import CpuResizer
from data.augment.recipe import ErasedBoxes
from data.augment.sampling import Mix
from data.common.placement import Placement
from data.dataset.headers import BadImage, check_header
from data.dataset.index import Index
from data.loader.order import ShardUse
from data.loader.quarantine import Quarantine
from data.loader.read_ahead import ReadAhead
from data.loader.store import FetchedShards, ShardStore
from data.settings import DataConfig


@dataclass(frozen=True, eq=False)
class Batch:
    """A micro-batch of B samples on the device.

    Attributes:
        images: float32 (B, 3, H, W), normalized, channels-last in memory.
        labels: int64 (B,).
        ids: int64 (B,), on the host: the samples that are used, replacements included.
        mix: how to mix neighboring samples; None without mixup and cutmix.
        epoch: counted from 0.
        step: counted from 0 at the start of training.
    """

    images: torch.Tensor
    labels: torch.Tensor
    ids: np.ndarray
    mix: Mix | None
    epoch: int
    step: int


@dataclass(frozen=True, eq=False)
class Slots:
    """The slots of a micro-batch in the sample order.

    `ids` and `copies`, int64 (B,), are the samples before replacements, and which copy of its sample each slot holds. Once this
    micro-batch is read, all steps before `done` are read.
    """

    ids: np.ndarray
    copies: np.ndarray
    epoch: int
    step: int
    done: int


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """The input of the graph for a micro-batch of B samples.

    `ids` are the samples that are used, `encoded` their images, uint8 (bytes,), and `parameters` the graph's other inputs, (B, …) each.
    """

    slots: Slots
    ids: np.ndarray
    encoded: list[np.ndarray]
    parameters: tuple[np.ndarray, ...]
    erased: ErasedBoxes | None
    mix: Mix | None


# From (epoch, sample, copy, encoded image) to whether DALI can decode the image.
CanDecode = Callable[[int, int, int, np.ndarray], bool]


class Loader(AbstractContextManager):
    """Runs a graph over a rank's micro-batches, in order. Subclasses implement the abstract methods.

    `dtypes` are DALI's types of the graph's parameters; `noise` fills the boxes that the parameters erase.
    """

    @abstractmethod
    def _plan_uses(self) -> tuple[Iterable[ShardUse], int]:
        """Plans the uses of shards of one pass over the slots; also returns the most bytes in use at once."""

    @abstractmethod
    def _list_slots(self) -> Iterator[Slots]:
        """Yields the slots of all micro-batches, in order."""

    @abstractmethod
    def _compute_parameters(self, epoch: int, ids: np.ndarray, copies: np.ndarray) -> tuple[tuple[np.ndarray, ...], ErasedBoxes | None]:
        """Computes the graph's parameters, a row for each sample that is used, and the boxes to erase."""

    @abstractmethod
    def _draw_mix(self, slots: Slots) -> Mix | None:
        """Draws how the samples of neighboring slots are mixed; None without mixup and cutmix."""

    @abstractmethod
    def _define_graph(self, encoded: Any, *parameters: Any) -> tuple[Any, Any]:
        """Defines the graph: from nodes of encoded images and parameters to nodes of uint8 images and mirror flags."""

    def __init__(
        self,
        index: Index,
        settings: DataConfig,
        quarantine: Quarantine,
        dtypes: Sequence[Any],
        placement: Placement,
        noise: NoiseBank | None = None,
    ) -> None:
        self.index, self.settings, self.quarantine, self.placement = index, settings, quarantine, placement
        self.device, self._dtypes, self._noise = placement.device, dtypes, noise
        self._store: ShardStore | None = None
        self._reader: ReadAhead[Slots, MicroBatch] | None = None
        self._in_flight: deque[MicroBatch] = deque()  # inside DALI
        self._retried: deque[MicroBatch] = deque()  # to be passed to DALI before those of the reader
        self._pipeline: Pipeline | None = None
        self._resizer = CpuResizer(settings.decode_threads)
        self._closed = False

    def _start(self) -> None:
        if self.index.remote:
            (uses, peak_bytes), ranks = self._plan_uses(), self.placement.ranks_on_node
            self._store = FetchedShards(self.index, uses, peak_bytes=peak_bytes, cache_gb=self.settings.cache_gb, ranks_on_node=ranks)
        else:
            self._store = ShardStore(self.index)
        threads = self.settings.read_threads
        self._reader = ReadAhead(self._list_slots(), self._read, threads=threads, depth=threads + 2)

    def _stop(self) -> None:
        if self._reader is not None:
            assert self._store is not None
            self._store.close()  # first, because the reader's threads may wait for it
            self._reader.close()
            self._reader = None

    def _build_pipeline(self, max_batch: int, feed: Callable[[], list[Any]], prefetch: int) -> Pipeline:
        # Outputs of the dynamic executor own their memory, which the other executors reuse, so batches need no copy.
        @pipeline_def(  # type: ignore[call-overload]  # its stub lacks exec_dynamic
            batch_size=max_batch,
            num_threads=self.settings.decode_threads,
            device_id=self.device.index if self.device.type == "cuda" else None,
            prefetch_queue_depth=prefetch,
            exec_dynamic=True,
            enable_conditionals=True,
        )
        def graph() -> Any:
            dtypes = [DALIDataType.UINT8, *self._dtypes]
            images, mirror = self._define_graph(*fn.external_source(feed, num_outputs=len(dtypes), batch=True, dtype=dtypes))
            return fn.crop_mirror_normalize(
                images,
                mirror=mirror,
                mean=[255 * value for value in self.settings.mean],
                std=[255 * value for value in self.settings.std],
                dtype=DALIDataType.FLOAT,
                output_layout="HWC",
            )

        pipeline = graph()
        pipeline.build()
        return pipeline

    def _read(self, slots: Slots, can_decode: CanDecode | None = None) -> MicroBatch:
        """Reads the images of slots, or of their replacements, and computes the parameters. Runs in the reading threads.

        `can_decode` rejects images that DALI can't decode. It is given for a second read, when shards may no longer be booked.
        """
        epoch = slots.epoch
        images = [self._read_image(*slot, epoch, can_decode) for slot in zip(slots.ids.tolist(), slots.copies.tolist(), strict=True)]
        used = [image for image in images if image is not None]
        ids = np.array([sample for sample, _ in used], np.int64)
        copies = slots.copies[[image is not None for image in images]]
        return MicroBatch(
            slots, ids, [encoded for _, encoded in used], *self._compute_parameters(epoch, ids, copies), self._draw_mix(slots)
        )

    def _read_image(self, slot: int, copy: int, epoch: int, can_decode: CanDecode | None) -> tuple[int, np.ndarray] | None:
        """Reads the first good image among a slot's sample and its replacements; bad ones go into quarantine."""
        assert self._store is not None
        while (sample := self.quarantine.find_replacement(slot)) is not None:
            row = self.index.samples[sample]
            try:
                encoded = self._store.read(sample, planned=sample == slot and can_decode is None)
                check_header(encoded, int(row["width"]), int(row["height"]))
                if can_decode is None or can_decode(epoch, sample, copy, encoded):
                    return sample, encoded
                self.quarantine.add(sample, "DALI can't decode it")
            except (OSError, BadImage) as error:
                self.quarantine.add(sample, str(error))
        return None

    def _feed(self) -> list[Any]:
        """Returns the next input of the graph. A micro-batch without a good sample is skipped."""
        assert self._store is not None
        assert self._reader is not None
        while True:
            batch = self._retried.popleft() if self._retried else next(self._reader)
            self._store.advance(batch.slots.done)
            if len(batch.ids):
                self._in_flight.append(batch)
                return [batch.encoded, *batch.parameters]

    def __iter__(self) -> Iterator[Batch]:
        """Yields the batches.

        Raises:
            ValueError: more than data.max_bad of the images are bad, a shard can't be fetched, or DALI fails without a bad image.
        """
        if self._reader is None and not self._closed:
            self._start()
        try:
            while not self._closed:
                if self._pipeline is None:
                    self._pipeline = self._build_pipeline(self.placement.micro_batch, self._feed, prefetch=2)
                # Outputs become ready and are freed in the order of the consumer's stream, without synchronization.
                stream = (torch.cuda.current_stream(self.device),) if self.device.type == "cuda" else ()
                try:
                    (output,) = self._pipeline.run(*stream)
                except StopIteration:
                    self._pipeline.reset()
                    return
                except RuntimeError as error:
                    self._remove_bad(error)
                    continue
                batch = self._in_flight.popleft()
                labels = torch.from_numpy(self.index.samples["label"][batch.ids].astype(np.int64))
                if self.device.type == "cuda":
                    labels = labels.pin_memory().to(self.device, non_blocking=True)
                images = torch.from_dlpack(output.as_tensor()).permute(0, 3, 1, 2)
                if batch.erased is not None:
                    assert self._noise is not None
                    self._noise.erase(images, batch.erased)
                yield Batch(images, labels, batch.ids, batch.mix, batch.slots.epoch, batch.slots.step)
        finally:
            self._stop()
            if self._in_flight:  # the consumer stopped early: this pipeline still holds batches of this pass
                self._drop_pipeline()

    def _drop_pipeline(self) -> None:
        self._pipeline = None
        self._in_flight.clear()
        self._retried.clear()

    def _remove_bad(self, error: RuntimeError) -> None:
        """Replaces the images that DALI can't decode in the micro-batches in flight.

        The repaired micro-batches go to a new pipeline, as the old one is broken. Raises ValueError if DALI can decode every image alone.
        """
        failed = list(self._in_flight)
        decoder = SingleImageDecoder(self)
        repaired = [self._read(batch.slots, decoder.can_decode) for batch in failed]
        if all(np.array_equal(new.ids, old.ids) for new, old in zip(repaired, failed, strict=True)):
            ids = np.concatenate([batch.ids for batch in failed])
            raise ValueError(
                f"{self.index.place}: DALI failed on samples {ids.min()} to {ids.max()}, each of which it can decode alone: {error}"
            ) from error
        self._pipeline = None
        self._in_flight.clear()
        self._retried.extendleft(reversed(repaired))

    def close(self) -> None:
        """Ends all threads. Batches that were returned stay valid."""
        self._closed = True
        self._stop()
        self._drop_pipeline()
        self._resizer.close()

    def __exit__(self, *error: object) -> None:
        self.close()


class SingleImageDecoder:
    """Decodes images one at a time, with the graph of a loader."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader
        self._pipeline: Pipeline | None = None
        self._inputs: list[Any] = []

    def can_decode(self, epoch: int, sample: int, copy: int, encoded: np.ndarray) -> bool:
        """Returns whether DALI can decode an encoded image, uint8 (bytes,), with its crop in this epoch: a CanDecode."""
        parameters, _ = self._loader._compute_parameters(epoch, np.array([sample]), np.array([copy]))
        self._inputs[:] = [[encoded], *parameters]
        if self._pipeline is None:
            inputs = self._inputs  # a reference to self would be a cycle, which keeps the pipeline's threads until a garbage collection
            self._pipeline = self._loader._build_pipeline(1, lambda: inputs, prefetch=1)
        try:
            self._pipeline.run()
        except RuntimeError:
            self._pipeline = None
            return False
        return True
