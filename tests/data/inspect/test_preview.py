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


def pictures(index: Index, settings: DataConfig, images: int = 10) -> list[Picture]:
    order = SampleOrder(index.shard_start, seed=1, global_batch=20, lanes=settings.lanes, window=settings.window)
    return load_step(index, order, settings, epoch=1, step=2, images=images)


def test_normalisation_is_undone(dataset: Index) -> None:
    usual = DataConfig(image_size=48, mixup=0, cutmix=0, lanes=5)
    for plain, undone in zip(pictures(dataset, PLAIN), pictures(dataset, usual), strict=True):
        assert np.abs(plain.pixels - undone.pixels).max() < 1e-5
        assert plain.title == undone.title
        assert plain.title in dataset.classes


def test_shares_in_the_titles_are_those_of_the_pixels(dataset: Index) -> None:
    alone = pictures(dataset, PLAIN)
    mixed = pictures(dataset, replace(PLAIN, mixup=0.8))
    for slot, picture in enumerate(mixed):
        own, partner = alone[slot], alone[slot ^ 1]
        share = float(re.search(r"mix mixup (\S+)", picture.about[-1]).group(1))  # type: ignore[union-attr]
        assert np.abs(picture.pixels - share * own.pixels - (1 - share) * partner.pixels).max() < 0.006  # shares are told to two digits
        if own.title == partner.title:
            assert picture.title == own.title
        else:
            assert picture.title.split("\n")[0].startswith(f"{own.title} ")
            assert float(picture.title.split("\n")[0].split()[1].rstrip("%")) == pytest.approx(100 * share, abs=1)
            assert picture.title.split("\n")[1].startswith(f"{partner.title} ")
    assert len({picture.title for picture in mixed}) > 5


def test_what_stands_under_a_picture_was_drawn_for_it(dataset: Index) -> None:
    settings = replace(PLAIN, mixup=0.8, cutmix=1.0)
    ids = SampleOrder(dataset.shard_start, seed=1, global_batch=20, lanes=5).batch(1, 2)
    drawn = list_parameters(Recipe(1, settings), 1, ids, np.zeros_like(ids), dataset)
    for picture, own in zip(pictures(dataset, settings, images=20), drawn, strict=True):
        assert picture.about == [f"{name} {value}" for name, value in own.items()]


@pytest.mark.parametrize(("images", "shown"), [(20, 20), (19, 10), (8, 4), (3, 2)])
def test_whole_pairs_that_divide_the_batch_are_shown(dataset: Index, images: int, shown: int) -> None:
    assert len(pictures(dataset, replace(PLAIN, mixup=0.8), images=images)) == shown


def test_evaluation_view(dataset: Index) -> None:
    seen = load_evaluation_view(dataset, PLAIN, 10)
    assert [picture.title for picture in seen] == [dataset.classes[label] for label in dataset.samples["label"][:150:15]]
    width, height = (int(dataset.samples[name][15]) for name in ("width", "height"))
    assert seen[1].about[0].startswith(f"{width} x {height} → ")
    assert "54" in seen[1].about[0].split()  # floor(48 / 0.875), of the shorter side


def test_a_preview_is_a_picture(drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job, out = tmp_path / "job.yaml", tmp_path / "grid.png"
    job.write_text(f"global_batch: 8\ndata: {{train: {drawn}/train, image_size: 32}}\n")
    assert main(["preview", str(job), "--out", str(out), "--steps", "1:3", "--images", "4"]) == 0
    train = Image.open(out).size
    assert main(["preview", str(job), "--out", str(out), "--steps", "1:3", "--images", "4", f"data.val={drawn}/val"]) == 0
    with Image.open(out) as image:
        assert image.width == train[0] > 1500
        assert image.height > 1.3 * train[1], "the val set comes on top"
        pixels = np.asarray(image.convert("RGB"))
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 2000, "photographs, not only letters"
    assert len(open_index(drawn / "train")) == 120  # and so 15 steps
    for arguments, message in (
        (["--out", str(tmp_path / "grid.pdf")], "grid.pdf: a preview is a .png"),
        (["--out", str(out), "--steps", "14:16"], "step 15 is outside of an epoch of 15 steps"),
    ):
        assert main(["preview", str(job), *arguments]) == 2
        assert message in capsys.readouterr().err
