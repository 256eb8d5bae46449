"""Drawn datasets: repeatable, varied, and unchanged from version to version."""

import io
import itertools
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.loader.store import ShardStore
from data.synthetic.drawings import PATTERNS, SHAPES, SURFACES
from data.synthetic.synthesize import SETS, draw_images, synthesize

pytestmark = pytest.mark.slow


def test_synthesize_repeats_with_the_seed(tmp_path: Path) -> None:
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


@pytest.mark.parametrize(("draw", "classes"), [("patterns", 10), ("figures", 50)])
def test_mean_color_does_not_reveal_the_class(draw: str, classes: int) -> None:
    """A nearest-centroid classifier on mean colors stays near chance, which is 10 % or 2 %."""
    features, labels = [], []
    for encoded, label in itertools.chain(draw_images(classes, 600, 0, 0, draw=draw), draw_images(classes, 300, 0, 1, draw=draw)):
        pixels = np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"), np.float32).reshape(-1, 3)
        features.append(pixels.mean(axis=0))
        labels.append(label)
    colors, truth = np.array(features), np.array(labels)
    centroids = np.array([colors[:600][truth[:600] == number].mean(axis=0) for number in range(classes)])
    nearest = np.linalg.norm(colors[600:, None] - centroids, axis=2).argmin(axis=1)
    assert (nearest == truth[600:]).mean() < 2.5 / classes


# Width, height, and the gray mean of the image and of its upper left quarter. The results in the documentation depend on these images.
# Means, not bytes, because another machine's sine may differ in its last bit.
DRAWN = [
    (124, 181, 64.5, 74.5), (116, 135, 115.8, 111.4), (131, 220, 110.4, 117.7), (94, 170, 150.5, 144.7), (206, 136, 126.6, 128.2),
    (159, 97, 169.9, 163.1), (100, 149, 141.8, 137.2), (176, 170, 122.7, 135.5), (74, 166, 178.2, 174.8), (73, 191, 135.8, 132.2),
]  # fmt: skip


def test_patterns_do_not_change_between_versions() -> None:
    for (encoded, _), (width, height, mean, corner) in zip(draw_images(10, 10, 0, 0), DRAWN, strict=True):
        gray = np.asarray(Image.open(io.BytesIO(encoded)).convert("L"), np.float64)
        assert gray.shape == (height, width)
        assert [gray.mean(), gray[: height // 2, : width // 2].mean()] == pytest.approx([mean, corner], abs=0.1)


def test_figure_sets_split_all_combinations() -> None:
    figures, others = set(SETS["figures"]), set(SETS["other-figures"])
    assert (len(figures), len(others)) == (50, 10)
    assert not figures & others
    assert figures | others == {f"{surface} {shape}" for shape in SHAPES for surface in SURFACES}
    # Both sets have every shape and every surface, the ten each shape once.
    assert sorted(name.split()[1] for name in others) == sorted(SHAPES)
    assert {name.split()[0] for name in others} == {name.split()[0] for name in figures} == set(SURFACES)
    assert {name.split()[1] for name in figures} == set(SHAPES)


def test_photographs_have_the_size_of_imagenets(tmp_path: Path) -> None:
    train, _ = synthesize(tmp_path / "a", classes=4, train=12, val=2, photographs=True)
    again, _ = synthesize(tmp_path / "b", classes=4, train=12, val=2, photographs=True)
    assert train.fingerprint == again.fingerprint
    assert set(train.samples["width"].tolist()) == {500}
    assert set(train.samples["height"].tolist()) == {375}
    assert 95_000 < train.samples["size"].mean() < 125_000
    assert train.samples["label"].tolist() == [0, 1, 2, 3] * 3
    with ShardStore(train) as store:
        assert len({store.read(number).tobytes() for number in range(12)}) == 12
