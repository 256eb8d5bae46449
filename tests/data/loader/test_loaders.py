"""The loaders: batches, evaluation, threads, and batches from S3."""

import gc
import io
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from data.augment.sampling import draw_crops, draw_flips
from data.common.placement import Placement
from data.dataset.index import Index, open_index
from data.dataset.shards import Sample, write_dataset
from data.loader.loaders import EvalLoader, TrainLoader, compute_resized_shape
from data.loader.order import SampleOrder, compute_peak_bytes, plan_shard_uses, select_rank_slots
from data.loader.pipeline import Batch
from data.loader.store import ShardStore
from data.settings import IMAGENET_MEAN, IMAGENET_STD, DataConfig
from data.synthetic.drawings import PATTERNS
from data.synthetic.synthesize import draw_images
from tests.support.servers import Proxy

pytestmark = pytest.mark.slow

MEAN, STD = torch.tensor(IMAGENET_MEAN).view(3, 1, 1), torch.tensor(IMAGENET_STD).view(3, 1, 1)
GLOBAL_BATCH = 16


@pytest.fixture(scope="module")
def order(dataset: Index) -> SampleOrder:
    return SampleOrder(dataset.shard_start, seed=3, global_batch=GLOBAL_BATCH, lanes=8, window=8)


CPU = torch.device("cpu")
PLACEMENT = {field.name for field in fields(Placement)}


def split_options(options: dict[str, Any], **defaults: Any) -> tuple[DataConfig, Placement]:
    """Returns the options of a test as data settings and as a placement."""
    settings = {"decode_threads": 1} | {key: value for key, value in options.items() if key not in PLACEMENT}
    return DataConfig(**settings), Placement(**defaults | {key: value for key, value in options.items() if key in PLACEMENT})


def train(dataset: Index, order: SampleOrder, *, end: int, start: int = 0, **options: Any) -> Iterator[Batch]:
    settings, placement = split_options({"image_size": 32} | options, device=CPU, micro_batch=4)
    with TrainLoader(dataset, order, settings, placement, start=start, end=end) as loader:
        yield from loader


def evaluation(dataset: Index, **options: Any) -> Iterator[Batch]:
    settings, placement = split_options(options, device=CPU, micro_batch=8)
    with EvalLoader(dataset, settings, placement) as loader:
        yield from loader


def pixels(images: torch.Tensor) -> torch.Tensor:
    """Undoes the normalization: 0 to 255."""
    return (images * STD + MEAN) * 255


def read_picture(dataset: Index, sample_id: int) -> Image.Image:
    with ShardStore(dataset) as store:
        return Image.open(io.BytesIO(store.read(sample_id).tobytes())).convert("RGB")


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


def has_at_most_threads(count: int) -> bool:
    """Returns whether no more than `count` threads are left, after a short wait: the kernel lists joined threads for a moment."""
    gc.collect()  # an exception's traceback holds DALI's frames
    deadline = time.monotonic() + 5
    while threads() > count and time.monotonic() < deadline:
        time.sleep(0.01)
    return threads() <= count


def group_by_step(batches: Iterator[Batch]) -> dict[int, list[Batch]]:
    steps: dict[int, list[Batch]] = {}
    for batch in batches:
        steps.setdefault(batch.step, []).append(batch)
    return steps


def concatenate(batches: list[Batch]) -> tuple[torch.Tensor, ...]:
    """Concatenates images, labels, ids, boxes and lam of batches."""
    mixes = [batch.mix for batch in batches if batch.mix is not None]
    return (
        torch.cat([batch.images for batch in batches]),
        torch.cat([batch.labels for batch in batches]),
        torch.from_numpy(np.concatenate([batch.ids for batch in batches])),
        torch.from_numpy(np.concatenate([mix.box for mix in mixes])),
        torch.from_numpy(np.concatenate([mix.lam for mix in mixes])),
    )


def test_batch_has_the_samples_of_the_order_in_channels_last(dataset: Index, order: SampleOrder) -> None:
    for number, batch in enumerate(train(dataset, order, end=2)):
        assert batch.ids.tolist() == order.batch(0, number // 4)[number % 4 * 4 :][:4].tolist()
        assert batch.images.shape == (4, 3, 32, 32)
        assert batch.images.dtype == torch.float32
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert batch.labels.dtype == torch.int64
        assert batch.labels.tolist() == dataset.samples["label"][batch.ids].tolist()
        assert batch.ids.dtype == np.int64
        assert batch.mix is not None
        assert batch.mix.lam.shape == (2,)
    assert all(batch.mix is None for batch in train(dataset, order, end=1, mixup=0.0, cutmix=0.0))


def test_kept_batches_are_not_overwritten(dataset: Index, order: SampleOrder) -> None:
    kept = [(batch.images, batch.images.clone()) for batch in train(dataset, order, end=20)]
    gc.collect()
    assert len({images.data_ptr() for images, _ in kept}) == len(kept)
    assert all(torch.equal(images, copy) for images, copy in kept)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_graph_gives_the_images_of_the_cpu_graph(dataset: Index, order: SampleOrder) -> None:
    """The decoders differ a little in chroma. Kept batches do not change."""
    kept = []
    for host, device in zip(train(dataset, order, end=12), train(dataset, order, end=12, device=torch.device("cuda:0")), strict=True):
        assert device.images.device == device.labels.device == torch.device("cuda:0")
        assert device.images.is_contiguous(memory_format=torch.channels_last)
        assert (device.ids == host.ids).all()
        assert device.labels.tolist() == host.labels.tolist()
        assert (pixels(device.images.cpu()) - pixels(host.images)).abs().mean() < 4
        kept.append((device.images, device.images.clone()))
    assert all(torch.equal(images, copy) for images, copy in kept)
    for host, device in zip(
        evaluation(dataset, image_size=64), evaluation(dataset, image_size=64, device=torch.device("cuda:0")), strict=True
    ):
        assert (pixels(device.images.cpu()) - pixels(host.images)).abs().mean() < 1.5


def test_crops_are_exact_to_the_pixel(dataset: Index) -> None:
    """Where the result has the size of the crop nothing is resampled, so the pixels are those of the decoder's crop."""
    whole = SampleOrder(dataset.shard_start, seed=7, global_batch=150)
    (batch,) = train(dataset, whole, micro_batch=150, end=1, crop_area=(0.1, 0.5), crop_ratio=(1.0, 1.0), image_size=60)
    samples = dataset.samples[batch.ids]
    boxes = draw_crops(7, 0, batch.ids, samples["width"], samples["height"], scale=(0.1, 0.5), ratio=(1.0, 1.0))
    mirrored = draw_flips(7, 0, batch.ids)
    exact = np.flatnonzero((boxes[:, 2] == 60) & (boxes[:, 3] == 60))
    assert len(exact) >= 1
    for place in exact:
        y, x, h, w = boxes[place]
        crop = np.array(read_picture(dataset, int(batch.ids[place])))[y : y + h, x : x + w]
        if mirrored[place]:
            crop = crop[:, ::-1]
        found = pixels(batch.images[place]).permute(1, 2, 0).round().to(torch.uint8).numpy()
        assert (found == crop).all()


@pytest.mark.parametrize(("image_size", "crop_pct"), [(96, 0.875), (64, 1.0)])
def test_evaluation_gives_timms_images(dataset: Index, image_size: int, crop_pct: float) -> None:
    transform = create_transform(
        image_size, is_training=False, interpolation="bicubic", crop_pct=crop_pct, mean=IMAGENET_MEAN, std=IMAGENET_STD
    )
    batch = next(evaluation(dataset, image_size=image_size, eval_crop=crop_pct, micro_batch=40))
    for place, sample_id in enumerate(batch.ids.tolist()):
        expected = transform(read_picture(dataset, sample_id))
        assert (pixels(batch.images[place]) - pixels(expected)).abs().mean() <= 1


def test_evaluation_of_photographs_gives_timms_images(tmp_path: Path) -> None:
    """The images have 500 x 375 pixels, as most of ImageNet's."""
    samples = (Sample(str(number), encoded, label) for number, (encoded, label) in enumerate(draw_images(10, 8, 0, 0, photographs=True)))
    index = write_dataset(tmp_path, samples, list(PATTERNS), shard_bytes=1 << 30, name="val")
    for size, resize, mode in ((224, "crop", "center"), (384, "squash", "squash")):
        crop_pct = 1.0 if resize == "squash" else 0.875
        transform = create_transform(
            size, is_training=False, interpolation="bicubic", crop_pct=crop_pct, crop_mode=mode, mean=IMAGENET_MEAN, std=IMAGENET_STD
        )
        (batch,) = evaluation(index, image_size=size, eval_resize=resize)
        for place, sample_id in enumerate(batch.ids.tolist()):
            expected = transform(read_picture(index, sample_id))
            assert (pixels(batch.images[place]) - pixels(expected)).abs().mean() <= 1


def test_exif_orientation_is_applied_nowhere(tmp_path: Path) -> None:
    """The index describes images as stored, so pixels must be those of the stored image, as in Pillow and timm."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 60, 3), np.uint8)).resize((120, 40))
    exif = image.getexif()
    exif[0x0112] = 6  # "rotate by 90 degrees to display"
    encoded = io.BytesIO()
    image.save(encoded, "JPEG", exif=exif)
    index = write_dataset(tmp_path, [Sample("0", encoded.getvalue(), 0)], ["has_at_most_threads"], shard_bytes=1, name="train")
    assert (index.samples["width"][0], index.samples["height"][0]) == (120, 40)
    (batch,) = evaluation(index, image_size=40, eval_crop=1.0)
    expected = torch.from_numpy(np.array(read_picture(index, 0))[:, 40:80]).permute(2, 0, 1).float()
    assert (pixels(batch.images[0]) - expected).abs().max() < 0.01
    order = SampleOrder(index.shard_start, seed=0, global_batch=1)
    (batch,) = train(index, order, end=1, micro_batch=1, mixup=0.0, cutmix=0.0, image_size=40)
    assert batch.images.shape == (1, 3, 40, 40)


def test_ranks_evaluate_every_sample_once(dataset: Index) -> None:
    ids = []
    for rank in range(3):
        batches = list(evaluation(dataset, image_size=8, rank=rank, ranks=3))
        assert all(len(batch.ids) == 8 for batch in batches[:-1])
        assert all(len(batch.ids) == len(batch.images) == len(batch.labels) for batch in batches)
        assert all(batch.mix is None for batch in batches)
        ids.append(np.concatenate([batch.ids for batch in batches]))
    assert sorted(np.concatenate(ids).tolist()) == list(range(150))


def test_resized_shape_follows_timm() -> None:
    width, height = np.array([500, 375, 256, 72], np.uint16), np.array([375, 500, 256, 219], np.uint16)
    assert compute_resized_shape(width, height, DataConfig()).tolist() == [[256, 341], [341, 256], [256, 256], [778, 256]]
    assert compute_resized_shape(width, height, DataConfig(image_size=384, eval_resize="squash")).tolist() == [[384, 384]] * 4


def test_closing_ends_all_threads(dataset: Index, order: SampleOrder) -> None:
    before = threads()
    assert len(list(train(dataset, order, end=3, decode_threads=2))) == 12
    assert has_at_most_threads(before)
    settings = DataConfig(image_size=8, decode_threads=2)
    loader = TrainLoader(dataset, order, settings, Placement(CPU, micro_batch=4), end=1000)
    iterator = iter(loader)
    kept = next(iterator)
    assert threads() > before
    loader.close()
    assert has_at_most_threads(before)
    assert next(iterator, None) is None
    assert kept.images.isfinite().all()


def test_evaluation_can_be_repeated_with_one_pipeline(dataset: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after an incomplete pass. Between passes no thread reads."""
    built = []
    build = EvalLoader._build_pipeline
    monkeypatch.setattr(EvalLoader, "_build_pipeline", lambda self, *args, **options: built.append(1) or build(self, *args, **options))
    expected = list(evaluation(dataset, image_size=32))
    built.clear()
    before = threads()
    settings = DataConfig(image_size=32, decode_threads=1)
    with EvalLoader(dataset, settings, Placement(CPU, micro_batch=8)) as loader:
        for _ in range(3):
            for one, other in zip(expected, loader, strict=True):
                assert torch.equal(one.images, other.images)
                assert (one.ids == other.ids).all()
            assert threads_named("read-ahead") == []
        assert len(built) == 1
        for batch, _ in zip(loader, range(2), strict=False):
            assert batch.images.isfinite().all()
        for one, other in zip(expected, loader, strict=True):
            assert torch.equal(one.images, other.images)
    assert has_at_most_threads(before)


@pytest.mark.parametrize(("ranks", "start"), [(1, 0), (2, 30)])
def test_batches_from_s3_equal_those_from_a_folder(s3: Proxy, many_shards: Index, tmp_path: Path, ranks: int, start: int) -> None:
    """Bit for bit, over the end of an epoch, through the smallest cache that works, also from a step at which a run resumes."""
    order = SampleOrder(many_shards.shard_start, seed=3, global_batch=4, lanes=2, window=6)
    at_once = compute_peak_bytes(order, many_shards.shard_bytes, ranks, start, 60)
    assert at_once * ranks < many_shards.shard_bytes.sum() / 2
    index = open_index("s3://bucket/train", str(tmp_path))
    expected = group_by_step(train(many_shards, order, start=start, end=60, micro_batch=2))
    s3.fail(many_shards.shards[7].name, "corrupt", "500", "reset")
    s3.fail(many_shards.shards[11].name, "short")
    place = {"start": start, "end": 60, "ranks": ranks, "ranks_on_node": ranks, "micro_batch": 2}
    loaders = [train(index, order, **place, rank=rank, cache_gb=at_once * ranks / 1e9) for rank in range(ranks)]
    soon = {index.shards[use.shard].name for use in plan_shard_uses(order, select_rank_slots(4, 0, 1), start, start + 12)}
    assert len(soon) < len(index.shards)
    for step in range(start, 60):
        parts = [next(loader) for _ in range(2 // ranks) for loader in loaders]
        for one, other in zip(concatenate(expected[step]), concatenate(parts), strict=True):
            assert torch.equal(one, other)
        if step == start:
            assert s3.shards().keys() <= soon
    assert all(next(loader, None) is None for loader in loaders)
    assert threads_named("fetch") == []


def test_evaluation_from_s3_equals_that_from_a_folder(s3: Proxy, many_shards: Index, tmp_path: Path) -> None:
    """A second pass fetches no shard again."""
    index = open_index("s3://bucket/train", str(tmp_path))
    settings = DataConfig(decode_threads=1, cache_gb=0.002)
    for rank in range(3):
        with EvalLoader(index, settings, Placement(CPU, 8, rank, ranks=3)) as loader:
            for _ in range(2):
                for one, other in zip(evaluation(many_shards, rank=rank, ranks=3), loader, strict=True):
                    assert torch.equal(one.images, other.images)
                    assert (one.ids == other.ids).all()
    assert s3.shards() == {shard.name: 1 for shard in index.shards}


def test_step_is_done_with_its_last_micro_batch(dataset: Index, order: SampleOrder) -> None:
    settings = DataConfig(image_size=8, decode_threads=1)
    with TrainLoader(dataset, order, settings, Placement(CPU, micro_batch=8), start=7, end=9) as loader:
        assert [(slots.step, slots.done) for slots in loader._list_slots()] == [(7, 7), (7, 8), (8, 8), (8, 9)]
    with EvalLoader(dataset, settings, Placement(CPU, micro_batch=50)) as evaluating:
        assert [(slots.step, slots.done) for slots in evaluating._list_slots()] == [(0, 1), (1, 2), (2, 3)]


def threads_named(name: str) -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(name)]
