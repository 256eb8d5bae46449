"""Runs a DALI graph over micro-batches that are read ahead: what training and evaluation share (loader.py has the two).

A Loader says which samples its micro-batches have (`_work`), what is done to each (`_parameters`), and how (`_graph`). Threads read
encoded images ahead and compute what is done to them (reader.py); labels and ids travel beside DALI, never through it. One pipeline
serves all passes; epochs end without a rebuild.

A bad image is put into quarantine (quarantine.py) and another takes its place, or in evaluation none. It is found by the threads,
when it can't be read or its header is wrong, or by DALI: then each image that DALI holds is decoded alone, and a new pipeline is
given all of them again.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def
from nvidia.dali.pipeline import Pipeline
from nvidia.dali.types import DALIDataType

from data.augment.operators import CpuResizer
from data.augment.recipe import Erased
from data.augment.sampling import Mix
from data.dataset.headers import BadImage, check_header
from data.dataset.index import Index
from data.loader.quarantine import Quarantine
from data.loader.read_ahead import ReadAhead
from data.loader.store import ShardStore
from data.settings import DataConfig


@dataclass(frozen=True, eq=False)
class Batch:
    """A micro-batch of B samples on the device.

    images (B, 3, H, W) float32, normalised, channels-last in memory; labels (B,) int64; ids int64 (B,), on the host: the samples
    that are really used; mix: how to mix neighbouring samples, None where nothing is mixed; epoch, and step counted from 0 at the
    start of training.
    """

    images: torch.Tensor
    labels: torch.Tensor
    ids: np.ndarray
    mix: Mix | None
    epoch: int
    step: int


@dataclass(frozen=True, eq=False)
class Slots:
    """The samples that a micro-batch should have, and which copy of its sample each slot holds, int64 (B,). Once they are read, so is all
    that steps before `done` take."""

    ids: np.ndarray
    copies: np.ndarray
    epoch: int
    step: int
    done: int


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """What DALI is given: the samples that are really used, their encoded images and, in `parameters`, the graph's other inputs, one row
    a sample; and what is done to images that came out."""

    slots: Slots
    ids: np.ndarray
    encoded: list[np.ndarray]
    parameters: tuple[np.ndarray, ...]
    erased: Erased | None
    mix: Mix | None


# Whether DALI can decode an encoded image: of (epoch, sample, copy, encoded image).
Decodes = Callable[[int, int, int, np.ndarray], bool]


class Loader:
    """Runs a graph over micro-batches of at most `max_batch` samples, in order.

    What differs between training and evaluation are the methods of the first part. `dtypes` are those of the parameters.
    """

    def _open_store(self) -> ShardStore:
        """For one pass over the work."""
        raise NotImplementedError

    def _work(self) -> Iterator[Slots]:
        raise NotImplementedError

    def _parameters(self, epoch: int, ids: np.ndarray, copies: np.ndarray) -> tuple[tuple[np.ndarray, ...], Erased | None]:
        """What is done to samples, one row each, and what is erased: functions of the samples that are really used."""
        raise NotImplementedError

    def _erase(self, images: torch.Tensor, erased: Erased) -> None:
        """In place, on the device."""
        raise NotImplementedError

    def _mix(self, slots: Slots) -> Mix | None:
        return None

    def _graph(self, encoded: Any, *parameters: Any) -> tuple[Any, Any]:
        """From the nodes of encoded images and parameters to uint8 images and the mirror flags."""
        raise NotImplementedError

    # ---------------------------------------------------------------- what they share

    def __init__(
        self,
        index: Index,
        settings: DataConfig,
        quarantine: Quarantine,
        dtypes: Sequence[Any],
        *,
        max_batch: int,
        device: torch.device,
    ) -> None:
        self.index, self.settings, self.quarantine, self.device = index, settings, quarantine, device
        self._dtypes, self._max_batch = dtypes, max_batch
        self._store: ShardStore | None = None
        self._reader: ReadAhead[Slots, MicroBatch] | None = None
        self._inside: deque[MicroBatch] = deque()  # given to DALI, not yet come out
        self._again: deque[MicroBatch] = deque()  # to be given to DALI before what the reader has
        self._pipeline: Pipeline | None = None
        self._resizer = CpuResizer(settings.decode_threads)
        self._closed = False

    def _start(self) -> None:
        self._store = self._open_store()
        threads = self.settings.read_threads
        self._reader = ReadAhead(self._work(), self._read, threads=threads, depth=threads + 2)

    def _stop(self) -> None:
        if self._reader is not None:
            assert self._store is not None
            self._store.close()  # first, as the reader's threads may be waiting for it
            self._reader.close()
            self._reader = None

    def _build(self, max_batch: int, feed: Callable[[], list[Any]], prefetch: int) -> Pipeline:
        # With the dynamic executor every output owns its memory (the others reuse theirs), so batches need no copy.
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
            images, mirror = self._graph(*fn.external_source(feed, num_outputs=len(dtypes), batch=True, dtype=dtypes))
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

    def _read(self, slots: Slots, decodes: Decodes | None = None) -> MicroBatch:
        """What DALI is to be given for these slots. With `decodes` (see Alone) all images are tried, and shards may no longer be held.
        Runs in the reading threads."""
        epoch = slots.epoch
        found = [self._image(*slot, epoch, decodes) for slot in zip(slots.ids.tolist(), slots.copies.tolist(), strict=True)]
        used = [image for image in found if image is not None]
        ids = np.array([sample for sample, _ in used], np.int64)
        copies = slots.copies[[image is not None for image in found]]
        return MicroBatch(slots, ids, [encoded for _, encoded in used], *self._parameters(epoch, ids, copies), self._mix(slots))

    def _image(self, slot: int, copy: int, epoch: int, decodes: Decodes | None) -> tuple[int, np.ndarray] | None:
        """The first good one of a slot's sample and its stand-ins, encoded; those before it go into quarantine."""
        assert self._store is not None
        while (sample := self.quarantine.find_replacement(slot)) is not None:
            row = self.index.samples[sample]
            try:
                encoded = self._store.read(sample, planned=sample == slot and decodes is None)
                check_header(encoded, int(row["width"]), int(row["height"]))
                if decodes is None or decodes(epoch, sample, copy, encoded):
                    return sample, encoded
                self.quarantine.add(sample, "DALI can't decode it")
            except (OSError, BadImage) as error:
                self.quarantine.add(sample, str(error))
        return None

    def _feed(self) -> list[Any]:
        """What DALI is to be given next. A batch of which nothing is left is passed over."""
        assert self._store is not None
        assert self._reader is not None
        while True:
            batch = self._again.popleft() if self._again else next(self._reader)
            self._store.advance(batch.slots.done)
            if len(batch.ids):
                self._inside.append(batch)
                return [batch.encoded, *batch.parameters]

    def __iter__(self) -> Iterator[Batch]:
        """The batches. Raises ValueError where more than data.max_bad of the images are bad, where a shard can't be fetched, and where
        DALI fails for another reason than a bad image."""
        if self._reader is None and not self._closed:
            self._start()
        try:
            while not self._closed:
                if self._pipeline is None:
                    self._pipeline = self._build(self._max_batch, self._feed, prefetch=2)
                # Bound to the stream of the consumer, outputs are ready and are freed in that stream's order: nobody waits.
                stream = (torch.cuda.current_stream(self.device),) if self.device.type == "cuda" else ()
                try:
                    (output,) = self._pipeline.run(*stream)
                except StopIteration:
                    self._pipeline.reset()
                    return
                except RuntimeError as error:
                    self._take_out_bad(error)
                    continue
                batch = self._inside.popleft()
                labels = torch.from_numpy(self.index.samples["label"][batch.ids].astype(np.int64))
                if self.device.type == "cuda":
                    labels = labels.pin_memory().to(self.device, non_blocking=True)
                images = torch.from_dlpack(output.as_tensor()).permute(0, 3, 1, 2)
                if batch.erased is not None:
                    self._erase(images, batch.erased)
                yield Batch(images, labels, batch.ids, batch.mix, batch.slots.epoch, batch.slots.step)
        finally:
            self._stop()
            if self._inside:  # not all came out: what this pipeline holds is not of the next pass
                self._drop_pipeline()

    def _drop_pipeline(self) -> None:
        self._pipeline = None
        self._inside.clear()
        self._again.clear()

    def _take_out_bad(self, error: RuntimeError) -> None:
        """After DALI failed: takes what it can't decode out of all that it holds. A pipeline that raised can't be used again, so
        another is to be given the rest.

        Raises ValueError where DALI can decode everything.
        """
        held = list(self._inside)
        alone = SingleImageDecoder(self)
        mended = [self._read(batch.slots, alone.decodes) for batch in held]
        if all(np.array_equal(new.ids, old.ids) for new, old in zip(mended, held, strict=True)):
            ids = np.concatenate([batch.ids for batch in held])
            raise ValueError(
                f"{self.index.place}: DALI failed on samples {ids.min()} to {ids.max()}, each of which it can decode alone: {error}"
            ) from error
        self._pipeline = None
        self._inside.clear()
        self._again.extendleft(reversed(mended))

    @property
    def waited_for_shards_s(self) -> float:
        """Seconds that reading threads, all of them together, have waited for shards to be fetched."""
        assert self._store is not None
        return self._store.waited_s

    def close(self) -> None:
        """Ends all threads. Batches given out stay valid."""
        self._closed = True
        self._stop()
        self._drop_pipeline()
        self._resizer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class SingleImageDecoder:
    """Decodes images one at a time, as a loader does with its batches."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader
        self._pipeline: Pipeline | None = None
        self._inputs: list[Any] = []

    def decodes(self, epoch: int, sample: int, copy: int, encoded: np.ndarray) -> bool:
        parameters, _ = self._loader._parameters(epoch, np.array([sample]), np.array([copy]))
        self._inputs[:] = [[encoded], *parameters]
        if self._pipeline is None:
            inputs = self._inputs  # not self, or a cycle would keep the pipeline's threads until a collection
            self._pipeline = self._loader._build(1, lambda: inputs, prefetch=1)
        try:
            self._pipeline.run()
        except RuntimeError:
            self._pipeline = None
            return False
        return True
