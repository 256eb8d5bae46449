import io
import os
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.dataset.index import Index, write_index
from data.packing.adopt import index_shards
from data.packing.verify import verify
from tests.support.foreign_shards import JPEGS, write_tar
from tests.support.image_corpus import corpus


def faults(folder: Path, deep: bool = False) -> list[str]:
    """What verify says but for its last line."""
    lines: list[str] = []
    count = verify(folder, deep=deep, log=lines.append)
    last = lines.pop()
    assert count == len(lines)
    assert last.startswith(f"{folder}: {count} fault")
    return lines


@pytest.fixture
def copy(dataset: Index, tmp_path: Path) -> Path:
    return Path(shutil.copytree(dataset.folder, tmp_path / "copy"))


def flip(path: Path, place: int, bit: int = 0) -> None:
    with open(path, "r+b") as file:
        file.seek(place)
        (byte,) = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ 1 << bit]))


def test_a_sound_dataset_has_no_fault(dataset: Index) -> None:
    for deep in (False, True):
        lines: list[str] = []
        assert verify(dataset.folder, deep=deep, processes=2, log=lines.append) == 0
        (summary,) = lines
        assert "0 faults in 150 samples" in summary
        assert ("every image decoded" in summary) == deep


def test_a_flipped_bit_of_an_image(copy: Path, dataset: Index) -> None:
    """Where the image decodes as well as before, only the checksum tells."""
    row = dataset.samples[3]
    density = int(row["offset"]) + 14  # of the JFIF header
    flip(copy / "train-000000.tar", density)
    assert faults(copy) == []
    assert [fault.partition(" (")[0] for fault in faults(copy, deep=True)] == ["train-000000.tar: its bytes have changed"]
    flip(copy / "train-000000.tar", density)
    assert faults(copy, deep=True) == []
    flip(copy / "train-000000.tar", int(row["offset"]) + int(row["size"]) // 2)
    assert faults(copy) == []
    image, changed = faults(copy, deep=True)
    assert image.startswith("train-000000.tar: sample 000000003: its image can't be used: ")
    assert "bytes have changed" in changed


def test_a_flipped_bit_of_a_label(copy: Path) -> None:
    flip(copy / "train-000000.tar", 512)  # the first member's data: 0 becomes 1
    assert faults(copy) == []
    changed, label = faults(copy, deep=True)
    assert "bytes have changed" in changed
    assert label.startswith("train-000000.tar: sample 000000000: offset, size, label, width, height are (1536, ")


def test_a_flipped_bit_between_members(copy: Path) -> None:
    with tarfile.open(copy / "train-000000.tar") as tar:
        flip(copy / "train-000000.tar", tar.getmembers()[0].offset_data + 200)
    assert faults(copy) == []
    assert len(faults(copy, deep=True)) == 1


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("place", [0, 100, 124, 148, 156, 257])  # name, mode, size, checksum, type, magic
def test_a_flipped_bit_of_a_header(copy: Path, place: int, deep: bool) -> None:
    with tarfile.open(copy / "train-000001.tar") as tar:
        flip(copy / "train-000001.tar", tar.getmembers()[7].offset + place)
    (fault,) = faults(copy, deep)
    assert "train-000001.tar: not a whole tar file (bad checksum, after sample 0000000" in fault


def test_pixels_that_can_not_be_decoded(copy: Path, dataset: Index) -> None:
    row = dataset.samples[3]
    with open(copy / dataset.shards[0].name, "r+b") as file:
        file.seek(int(row["offset"] + row["size"] - 200))
        file.write(b"\xff" * 200)  # padding instead of the last rows; the header is whole
    assert faults(copy) == []
    image, changed = faults(copy, deep=True)
    assert "train-000000.tar: sample 000000003: its image can't be used" in image
    assert "bytes have changed" in changed


def test_an_image_that_never_could_be_decoded(tmp_path: Path) -> None:
    """Its header can be read, so it is indexed; no checksum tells of it."""
    write_tar(tmp_path / "a.tar", [("1.cls", b"0"), ("1.jpg", JPEGS[0]), ("2.cls", b"0"), ("2.jpg", JPEGS[1][: len(JPEGS[1]) // 2])])
    index_shards(tmp_path)
    assert faults(tmp_path) == []
    (fault,) = faults(tmp_path, deep=True)
    assert "a.tar: sample 2: its image can't be used" in fault


def test_an_image_that_dali_does_not_read(tmp_path: Path) -> None:
    lossless = next(case.encoded for case in corpus() if case.name == "lossless.jpg")
    write_tar(tmp_path / "a.tar", [("1.cls", b"0"), ("1.jpg", lossless)])
    index_shards(tmp_path)
    assert faults(tmp_path, deep=True) == ["a.tar: sample 1: its image can't be used: DALI can't read it as stored (lossless)"]


def test_images_that_are_no_photographs_of_imagenet(tmp_path: Path) -> None:
    """What DALI decodes is no fault, however odd."""
    picture = Image.open(io.BytesIO(JPEGS[0]))
    odd = [
        (picture.convert(mode), kind) for mode, kind in (("CMYK", "JPEG"), ("L", "JPEG"), ("RGBA", "PNG"), ("P", "PNG"), ("RGB", "WEBP"))
    ]
    members = []
    for number, (image, kind) in enumerate(odd):
        out = io.BytesIO()
        image.save(out, kind, progressive=True)
        members += [(f"{number}.cls", b"0"), (f"{number}.{kind}", out.getvalue())]
    write_tar(tmp_path / "a.tar", members)
    index_shards(tmp_path)
    assert faults(tmp_path, deep=True) == []


def test_labels_of_json_members(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_tar(tmp_path / f"{name}.tar", [("1.json", b'{"kind": "of %s"}' % name.encode()), ("1.jpg", JPEGS[0])])
    index = index_shards(tmp_path, field="kind")
    assert faults(tmp_path, deep=True) == []
    write_index(tmp_path, index.shards, [index.samples[1:], index.samples[:1]], index.classes, made={"label_field": "kind"})
    assert [fault.partition(": offset")[0] for fault in faults(tmp_path, deep=True)] == ["a.tar: sample 1", "b.tar: sample 1"]


@pytest.mark.parametrize("name", ["dataset.json", "classes.json", "index.npy", "train-000000.idx"])
def test_a_flipped_bit_anywhere_in_the_other_files(copy: Path, name: str) -> None:
    """But for those in which index.npy's header says the same in another way: `<u4` is `=u4` here, and blanks are filling."""
    whole = (copy / name).read_bytes()
    start = whole.index(b"\n") + 1 if name == "index.npy" else 0
    for place in np.linspace(start, len(whole) - 1, 40).astype(int).tolist():
        (copy / name).write_bytes(whole)
        flip(copy / name, place, bit=place % 8)
        assert faults(copy), f"{name}: bit {place % 8} of byte {place}"


def test_an_index_of_other_samples(copy: Path, dataset: Index) -> None:
    rows = np.array(dataset.samples)
    rows["label"][5] = 10
    rows["offset"][7:9] += 512
    np.save(copy / "index.npy", rows)
    fingerprint, label, offset = faults(copy)
    assert "differs from the packed dataset" in fingerprint
    assert "labels up to 10, and there are 10 classes" in label
    assert "train-000000.tar: sample 000000007: " in offset
    assert "and 1 more samples" in offset


def test_idx_files(copy: Path) -> None:
    (copy / "train-000000.idx").unlink()
    idx = copy / "train-000001.idx"
    idx.write_text(idx.read_text().replace("jpg", "png", 1))
    assert faults(copy) == ["train-000000.idx is missing", "train-000001.idx does not describe train-000001.tar"]


def grow(copy: Path) -> None:
    with open(copy / "train-000002.tar", "ab") as file:
        file.write(bytes(512))


def swap(copy: Path) -> None:
    for suffix in (".tar", ".idx"):
        first, second = (copy / f"train-{number:06d}{suffix}" for number in (0, 1))
        first.rename(copy / "between")
        second.rename(first)
        (copy / "between").rename(second)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda copy: (copy / "train-000002.tar").unlink(), ["train-000002.tar is missing"]),
        (lambda copy: os.truncate(copy / "train-000002.tar", 512), ["train-000002.tar has 512 bytes instead of"]),
        (grow, ["train-000002.tar has "]),
        (lambda copy: shutil.copy(copy / "train-000000.tar", copy / "more.tar"), ["more.tar is not in dataset.json"]),
        (lambda copy: (copy / "train-000001.tar").rename(copy / "x.tar"), ["x.tar is not in dataset.json", "train-000001.tar is missing"]),
        (lambda copy: (copy / "train-000099.idx").touch(), ["train-000099.idx belongs to no shard"]),
        (lambda copy: (copy / "train-000009.tar.tmp").touch(), ["train-000009.tar.tmp is left over from"]),
        (lambda copy: (copy / ".index").mkdir(), [".index is left over from"]),
        (lambda copy: (copy / "index.npy").unlink(), ["is not a whole dataset: it has no index.npy"]),
    ],
)
def test_files(copy: Path, damage: Callable[[Path], object], expected: list[str]) -> None:
    damage(copy)
    for deep in (False, True):
        found = faults(copy, deep)
        assert len(found) == len(expected), found
        for fault, part in zip(found, expected, strict=True):
            assert part in fault


def test_swapped_shards(copy: Path) -> None:
    swap(copy)
    assert {fault.partition(":")[0].partition(" ")[0] for fault in faults(copy)} == {"train-000000.tar", "train-000001.tar"}


def test_swapped_shards_of_one_size(tmp_path: Path) -> None:
    """Neither sizes nor places tell: the .idx, and where that was swapped too, the checksum."""
    for name in "ab":
        write_tar(tmp_path / f"{name}.tar", [(f"{name}.cls", b"0"), (f"{name}.jpg", JPEGS[0])])
    index = index_shards(tmp_path)
    assert index.shards[0].xxh3_128 != index.shards[1].xxh3_128
    write_index(tmp_path, [replace(index.shards[0], name="b.tar"), replace(index.shards[1], name="a.tar")], [index.samples], index.classes)
    assert faults(tmp_path) == []
    assert ["its bytes have changed" in fault for fault in faults(tmp_path, deep=True)] == [True, True]
    (tmp_path / "a.tar").rename(tmp_path / "c")
    (tmp_path / "b.tar").rename(tmp_path / "a.tar")
    (tmp_path / "c").rename(tmp_path / "b.tar")
    assert faults(tmp_path) == ["b.idx does not describe b.tar", "a.idx does not describe a.tar"]
