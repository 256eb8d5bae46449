import io
import itertools
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.index import Index
from data.packing.synthesize import PATTERNS, images, synthesize
from data.store import ShardStore


def test_synthesize(tmp_path: Path) -> None:
    train, val = synthesize(tmp_path / "out", classes=4, train=60, val=20, seed=1)
    assert (len(train), len(val)) == (60, 20)
    assert train.classes == val.classes == tuple(PATTERNS)[:4]
    assert (train.folder.name, val.folder.name) == ("train", "val")
    assert np.bincount(train.samples["label"]).tolist() == [15] * 4
    again, _ = synthesize(tmp_path / "again", classes=4, train=60, val=20, seed=1)
    assert train.fingerprint == again.fingerprint
    assert all((train.folder / shard.name).read_bytes() == (again.folder / shard.name).read_bytes() for shard in train.shards)
    other, _ = synthesize(tmp_path / "other", classes=4, train=60, val=20, seed=2)
    assert train.fingerprint != other.fingerprint
    with pytest.raises(ValueError, match="is not empty"):
        synthesize(tmp_path / "out")
    with pytest.raises(ValueError, match="classes must be from 2 to 10"):
        synthesize(tmp_path / "more", classes=11)


def test_images_are_varied(dataset: Index) -> None:
    width, height = dataset.samples["width"], dataset.samples["height"]
    assert min(width.min(), height.min()) >= 72
    assert max(width.max(), height.max()) <= 220
    assert (width / height).min() < 0.6
    assert (width / height).max() > 1.6
    with ShardStore(dataset) as store:
        modes = [Image.open(io.BytesIO(store.read(number).tobytes())).mode for number in range(len(dataset))]
    assert 1 <= modes.count("L") < 30
    assert modes.count("L") + modes.count("RGB") == 150


def test_the_mean_colour_does_not_give_the_class_away() -> None:
    """A nearest-centroid classifier on mean colours, of which chance would get 10 % right."""
    features, labels = [], []
    for encoded, label in itertools.chain(images(10, 600, 0, 0), images(10, 300, 0, 1)):
        pixels = np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"), np.float32).reshape(-1, 3)
        features.append(pixels.mean(axis=0))
        labels.append(label)
    colour, classes = np.array(features), np.array(labels)
    centroids = np.array([colour[:600][classes[:600] == number].mean(axis=0) for number in range(10)])
    nearest = np.linalg.norm(colour[600:, None] - centroids, axis=2).argmin(axis=1)
    assert (nearest == classes[600:]).mean() < 0.25


def test_photographs_are_like_imagenet_s(tmp_path: Path) -> None:
    train, _ = synthesize(tmp_path / "a", classes=4, train=12, val=2, photographs=True)
    again, _ = synthesize(tmp_path / "b", classes=4, train=12, val=2, photographs=True)
    assert train.fingerprint == again.fingerprint
    assert set(train.samples["width"].tolist()) == {500}
    assert set(train.samples["height"].tolist()) == {375}
    assert 95_000 < train.samples["size"].mean() < 125_000
    assert train.samples["label"].tolist() == [0, 1, 2, 3] * 3
    with ShardStore(train) as store:
        assert len({store.read(number).tobytes() for number in range(12)}) == 12
