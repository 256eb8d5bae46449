"""Dataset statistics as text, and reports as a .png or .html."""

import base64
import io
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.dataset.index import DTYPE, Index, open_index, read_key
from data.dataset.shards import Sample, write_dataset
from data.inspect.report import format_stats, load_thumbnails, write_report
from tests.support.foreign_shards import JPEGS

pytestmark = pytest.mark.slow


def test_stats_of_few_classes(dataset: Index) -> None:
    text = format_stats(dataset)
    assert dataset.fingerprint in text
    assert "samples      150\n" in text
    assert "classes      10, samples per class 15 to 15, median 15" in text
    assert re.search(r"^ +stripes █{36} +15 +10.00%$", text, re.MULTILINE)
    shorter = np.minimum(dataset.samples["width"], dataset.samples["height"])
    count = int(((shorter >= 96) & (shorter < 128)).sum())
    assert re.search(rf"^ +96 to 127 [█▏▎▍▌▋▊▉]+ +{count} +{count / 150:.2%}$", text, re.MULTILINE)
    assert max(map(len, text.splitlines()[1:])) <= 80


def test_stats_of_many_classes(tmp_path: Path) -> None:
    rows = np.zeros(1000, DTYPE)
    rows["label"] = np.sqrt(np.arange(1000) * 0.9).astype(int)  # label n has about 2n + 1 samples, the last fewer
    rows["width"], rows["height"] = 300, 200
    text = format_stats(Index(tmp_path, (), np.array([0, 1000]), rows, tuple(f"n{number:08}" for number in range(40)), "abc"))
    assert "fewest: n00000030 (0), n00000031 (0), n00000032 (0)" in text
    counts = np.bincount(rows["label"], minlength=40)
    assert f"most: n{counts.argmax():08} ({counts.max()})" in text
    assert re.search(r"^ +0 █+.? +10 +25.00%$", text, re.MULTILINE)
    assert re.search(rf"^ +20 to 49 █+ +{((counts >= 20) & (counts < 50)).sum()} ", text, re.MULTILINE)
    assert max(map(len, text.splitlines()[1:])) <= 80


def test_thumbnails_come_from_all_shards_and_are_labeled(dataset: Index) -> None:
    thumbnails = load_thumbnails(dataset, len(dataset.shards), seed=3)
    numbers = [int(thumbnail.key) for thumbnail in thumbnails]
    assert sorted(dataset.shard_of(number) for number in numbers) == list(range(len(dataset.shards))), "one per shard"
    for number, sample in zip(numbers, thumbnails, strict=True):
        row = dataset.samples[number]
        assert sample.class_name == dataset.classes[row["label"]]
        assert sample.size == f"{row['width']} x {row['height']}"
        assert sample.picture is not None
        assert max(sample.picture.size) == min(180, max(row["width"], row["height"]))
    assert [sample.key for sample in load_thumbnails(dataset, 9, seed=3)] == [sample.key for sample in load_thumbnails(dataset, 9, seed=3)]
    assert [sample.key for sample in load_thumbnails(dataset, 9, seed=3)] != [sample.key for sample in load_thumbnails(dataset, 9, seed=4)]
    everything = load_thumbnails(dataset, 10_000, seed=0)
    assert sorted(sample.key for sample in everything) == [read_key(dataset, number) for number in range(150)]


class Page(HTMLParser):
    """The URLs and the text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.urls: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.urls += [value for name, value in attrs if name in ("src", "href", "srcset", "action", "data") and value]

    def handle_data(self, data: str) -> None:
        self.text += data + "\n"


def test_html_report_is_self_contained_and_escaped(tmp_path: Path) -> None:
    odd = ["<script>alert(1)</script>", "a & b", "$x_1$", "漢字 " * 20]
    samples = [Sample(f"{number:03}", JPEGS[number % 20], number % 4) for number in range(30)]
    index = write_dataset(tmp_path, samples, odd, shard_bytes=50_000, name="x")
    out = tmp_path / "report.html"
    write_report(index, out)
    text = out.read_text()
    page = Page(text)
    assert len(page.urls) == 31, "the plots and 30 samples"
    for url in page.urls:
        kind, _, data = url.partition(";base64,")
        with Image.open(io.BytesIO(base64.b64decode(data))) as image:
            image.load()
            assert kind == f"data:image/{image.format.lower()}"  # type: ignore[union-attr]
    assert not re.search(r"//|url\(|@import", re.sub(r"base64,[^']*", "", text)), "nothing is loaded from a network"
    assert "<script" not in text
    for name in odd:
        assert name in page.text


def test_png_report_marks_undecodable_images(tmp_path: Path, dataset: Index) -> None:
    copy = Path(shutil.copytree(dataset.folder, tmp_path / "copy"))
    with open(copy / "train-000000.tar", "r+b") as file:
        for row in dataset.samples[: dataset.shard_start[1]]:
            file.seek(int(row["offset"]))
            file.write(bytes(100))
    write_report(open_index(copy), tmp_path / "a.png", seed=1)
    with Image.open(tmp_path / "a.png") as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    assert pixels.shape[0] > 1000
    assert pixels.shape[1] > 1000
    red = (pixels[..., 0] > 200) & (pixels[..., 1:].max(axis=-1) < 60)
    assert red.any()
    assert len(np.unique(pixels.reshape(-1, 3)[::7], axis=0)) > 2000, "it contains images as well as lines"
    with pytest.raises(ValueError, match=r"a\.pdf: a report is a \.png or a \.html"):
        write_report(dataset, tmp_path / "a.pdf")
