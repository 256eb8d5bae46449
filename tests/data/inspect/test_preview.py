"""The preview shows the loader's images, each with its class and its augmentation parameters."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.__main__ import main
from data.augment.recipe import Recipe
from data.dataset.index import Index, open_index
from data.inspect.parameters import list_parameters
from data.inspect.preview import Picture, load_evaluation_view, load_step
from data.loader.order import SampleOrder
from data.settings import DataConfig

pytestmark = pytest.mark.slow

PLAIN = DataConfig(image_size=48, mixup=0, cutmix=0, mean=(0, 0, 0), std=(1, 1, 1), lanes=5)


def load_pictures(index: Index, settings: DataConfig, images: int = 10) -> list[Picture]:
    order = SampleOrder(index.shard_start, seed=1, global_batch=20, lanes=settings.lanes, window=settings.window)
    return load_step(index, order, settings, epoch=1, step=2, images=images)


def test_preview_undoes_the_normalization(dataset: Index) -> None:
    normalized = DataConfig(image_size=48, mixup=0, cutmix=0, lanes=5)
    for plain, restored in zip(load_pictures(dataset, PLAIN), load_pictures(dataset, normalized), strict=True):
        assert np.abs(plain.pixels - restored.pixels).max() < 1e-5
        assert plain.title == restored.title
        assert plain.title in dataset.classes


def test_titles_state_the_shares_of_mixed_images(dataset: Index) -> None:
    unmixed = load_pictures(dataset, PLAIN)
    mixed = load_pictures(dataset, replace(PLAIN, mixup=0.8))
    for slot, picture in enumerate(mixed):
        first, partner = unmixed[slot], unmixed[slot ^ 1]
        share = float(re.search(r"mix mixup (\S+)", picture.lines[-1]).group(1))  # type: ignore[union-attr]
        assert np.abs(picture.pixels - share * first.pixels - (1 - share) * partner.pixels).max() < 0.006  # shares have two digits
        if first.title == partner.title:
            assert picture.title == first.title
        else:
            first_line, second_line = picture.title.split("\n")
            assert first_line.startswith(f"{first.title} ")
            assert float(first_line.split()[1].rstrip("%")) == pytest.approx(100 * share, abs=1)
            assert second_line.startswith(f"{partner.title} ")
    assert len({picture.title for picture in mixed}) > 5


def test_lines_list_the_parameters_of_the_sample(dataset: Index) -> None:
    settings = replace(PLAIN, mixup=0.8, cutmix=1.0)
    ids = SampleOrder(dataset.shard_start, seed=1, global_batch=20, lanes=5).batch(1, 2)
    parameters = list_parameters(Recipe(1, settings), 1, ids, np.zeros_like(ids), dataset)
    for picture, texts in zip(load_pictures(dataset, settings, images=20), parameters, strict=True):
        assert picture.lines == [f"{name} {value}" for name, value in texts.items()]


def test_evaluation_view_has_evenly_spaced_samples(dataset: Index) -> None:
    pictures = load_evaluation_view(dataset, PLAIN, 10)
    assert [picture.title for picture in pictures] == [dataset.classes[label] for label in dataset.samples["label"][:150:15]]
    width, height = (int(dataset.samples[name][15]) for name in ("width", "height"))
    assert pictures[1].lines[0].startswith(f"{width} x {height} → ")
    assert "54" in pictures[1].lines[0].split()  # floor(48 / 0.875), the shorter side


def test_preview_writes_a_png(drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job, out = tmp_path / "job.yaml", tmp_path / "grid.png"
    job.write_text(f"global_batch: 8\ndata: {{train: {drawn}/train, image_size: 32}}\n")
    assert main(["preview", str(job), "--out", str(out), "--steps", "1:3", "--images", "4"]) == 0
    train = Image.open(out).size
    assert main(["preview", str(job), "--out", str(out), "--steps", "1:3", "--images", "4", f"data.val={drawn}/val"]) == 0
    with Image.open(out) as image:
        assert image.width == train[0] > 1500
        assert image.height > 1.3 * train[1], "the val set has its own section"
        pixels = np.asarray(image.convert("RGB"))
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 2000, "it contains images as well as text"
    assert len(open_index(drawn / "train")) == 120  # 15 steps
    for arguments, message in (
        (["--out", str(tmp_path / "grid.pdf")], "grid.pdf: a preview is a .png"),
        (["--out", str(out), "--steps", "14:16"], "step 15 is outside of an epoch of 15 steps"),
    ):
        assert main(["preview", str(job), *arguments]) == 2
        assert message in capsys.readouterr().err
