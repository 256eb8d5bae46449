"""The check of headers before DALI: it rejects images that DALI could decode in some epochs only."""

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data.common.placement import Placement
from data.dataset.headers import BadImage, check_header, import_nvimgcodec
from data.dataset.index import Index
from data.loader.loaders import TrainLoader
from data.loader.order import SampleOrder
from data.loader.pipeline import SingleImageDecoder
from data.loader.store import ShardStore
from data.settings import DataConfig
from tests.support.damage import KINDS
from tests.support.image_corpus import damage_files, load_corpus

pytestmark = pytest.mark.slow

SAMPLE = 2


@pytest.fixture
def loader(dataset: Index) -> Iterator[TrainLoader]:
    order = SampleOrder(dataset.shard_start, seed=3, global_batch=16)
    settings = DataConfig(image_size=16, decode_threads=1, crop_area=(0.05, 0.1))
    with TrainLoader(dataset, order, settings, Placement(torch.device("cpu"), micro_batch=16), end=1) as loader:
        yield loader


@pytest.fixture
def jpeg(dataset: Index) -> bytes:
    with ShardStore(dataset) as store:
        return store.read(SAMPLE).tobytes()


@pytest.fixture
def size(dataset: Index) -> tuple[int, int]:
    return int(dataset.samples["width"][SAMPLE]), int(dataset.samples["height"][SAMPLE])


@pytest.mark.parametrize("case", load_corpus(), ids=lambda case: case.name)
def test_kept_images_pass_and_cut_images_fail(case: Any) -> None:
    encoded = np.frombuffer(case.encoded, np.uint8)
    if case.bad is None and case.is_kept:
        with Image.open(io.BytesIO(case.encoded)) as image:
            check_header(encoded, *image.size)
            with pytest.raises(BadImage, match="its header has"):
                check_header(encoded, image.width + 1, image.height)
    elif case.name.startswith(("cut", "no end", "zeros.", "zeros at", "empty", "text")) and not case.name.endswith(".webp"):
        with pytest.raises(BadImage):
            check_header(encoded, 56, 40)


def test_cut_jpeg_would_decode_in_some_epochs_only(loader: TrainLoader, jpeg: bytes, size: tuple[int, int]) -> None:
    cut = np.frombuffer(KINDS["cut"](jpeg), np.uint8)
    decoder = SingleImageDecoder(loader)
    assert {decoder.can_decode(epoch, SAMPLE, 0, cut) for epoch in range(30)} == {True, False}
    with pytest.raises(BadImage, match="truncated"):
        check_header(cut, *size)


def test_accepted_header_means_the_same_for_every_crop(loader: TrainLoader) -> None:
    """Tests files with a dozen kinds of damage, none of which ends the process."""
    outcomes = []
    for encoded in damage_files(150, seed=11):
        image = np.frombuffer(encoded, np.uint8)
        try:
            stream = import_nvimgcodec().CodeStream(image)
            width, height = stream.width, stream.height
            check_header(image, width, height)
        except (BadImage, RuntimeError):
            continue
        corners = [(0, 0), (height // 2, width // 2), (0, width // 2), (height - 1, 0)]
        crops = [(0, 0, 1, 1), *((y, x, height - y, width - x) for y, x in corners)]
        outcomes.append({can_decode_crop(loader, image, *crop) for crop in crops})
    assert all(len(outcome) == 1 for outcome in outcomes)
    assert min(outcomes.count({True}), outcomes.count({False})) > 8


def can_decode_crop(loader: TrainLoader, encoded: np.ndarray, y: int, x: int, height: int, width: int) -> bool:
    compute_parameters = TrainLoader._compute_parameters

    def with_crop(epoch: int, ids: np.ndarray, copies: np.ndarray) -> Any:
        (_, _, *others), erased = compute_parameters(loader, epoch, ids, copies)
        return (np.array([[y, x]], np.int32), np.array([[height, width]], np.int32), *others), erased

    loader._compute_parameters = with_crop  # type: ignore[method-assign]
    return SingleImageDecoder(loader).can_decode(0, 0, 0, encoded)


def test_end_of_a_thumbnail_is_not_the_end_of_the_image(jpeg: bytes, size: tuple[int, int]) -> None:
    with_thumbnail = jpeg[:2] + b"\xff\xe1\x00\x0aExif\0\0\xff\xd9" + jpeg[2:]
    for complete in (with_thumbnail, with_thumbnail + b"after the image"):
        check_header(np.frombuffer(complete, np.uint8), *size)
    with pytest.raises(BadImage, match="truncated"):
        check_header(np.frombuffer(with_thumbnail[:-200], np.uint8), *size)
