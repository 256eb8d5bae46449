"""Verification finds every change of a dataset's files, and images that can't be decoded."""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data.dataset.index import Index, write_index
from data.packing.adopt import index_shards
from data.packing.verify import verify
from tests.support.foreign_shards import JPEGS, write_tar
from tests.support.image_corpus import load_corpus


def find_faults(folder: Path, deep: bool = False) -> list[str]:
    """Returns the lines that verify logs before the summary."""
    lines: list[str] = []
    count = verify(folder, deep=deep, log=lines.append)
    summary = lines.pop()
    assert count == len(lines)
    assert summary.startswith(f"{folder}: {count} fault")
    return lines


@pytest.fixture
def copy(dataset: Index, tmp_path: Path) -> Path:
    return Path(shutil.copytree(dataset.folder, tmp_path / "copy"))


def flip_bit(path: Path, position: int, bit: int = 0) -> None:
    with open(path, "r+b") as file:
        file.seek(position)
        (byte,) = file.read(1)
        file.seek(position)
        file.write(bytes([byte ^ 1 << bit]))


def test_unchanged_dataset_has_no_faults(dataset: Index) -> None:
    for deep in (False, True):
        lines: list[str] = []
        assert verify(dataset.folder, deep=deep, processes=2, log=lines.append) == 0
        (summary,) = lines
        assert "0 faults in 150 samples" in summary
        assert ("every image decoded" in summary) == deep


CHANGED = "train-000000.tar: its bytes have changed"
UNDECODABLE = "train-000000.tar: sample 000000003: its image can't be used: "


@pytest.mark.parametrize(
    ("find_position", "expected"),
    [
        (lambda row: int(row["offset"]) + 14, [CHANGED]),  # the density in the JFIF header: the image still decodes
        (lambda row: int(row["offset"]) + int(row["size"]) // 2, [UNDECODABLE, CHANGED]),
        (lambda row: 512, [CHANGED, "train-000000.tar: sample 000000000: offset, size, label, width, height are (1536, "]),  # label 0
        (lambda row: 512 + 200, [CHANGED]),  # padding between members
    ],
    ids=["metadata", "pixels", "label", "padding"],
)
def test_flipped_bit_of_a_shard_is_found(copy: Path, dataset: Index, find_position: Callable[[np.void], int], expected: list[str]) -> None:
    flip_bit(copy / "train-000000.tar", find_position(dataset.samples[3]))
    assert find_faults(copy) == [], "only a deep check reads these bytes"
    faults = find_faults(copy, deep=True)
    assert len(faults) == len(expected)
    assert all(fault.startswith(start) for fault, start in zip(faults, expected, strict=True)), faults


@pytest.mark.parametrize("name", ["dataset.json", "classes.json", "index.npy", "train-000000.idx"])
def test_flipped_bit_of_any_other_file_is_found(copy: Path, name: str) -> None:
    """Except in index.npy's header, where other bytes can have the same meaning: `<u4` is `=u4` here, and blanks are padding."""
    whole = (copy / name).read_bytes()
    start = whole.index(b"\n") + 1 if name == "index.npy" else 0
    for position in np.linspace(start, len(whole) - 1, 40).astype(int).tolist():
        (copy / name).write_bytes(whole)
        flip_bit(copy / name, position, bit=position % 8)
        assert find_faults(copy), f"{name}: bit {position % 8} of byte {position}"


def test_image_that_never_decoded_is_found(tmp_path: Path) -> None:
    """The headers are readable, so the shards can be indexed, and no checksum reveals the fault."""
    lossless = next(case.encoded for case in load_corpus() if case.name == "lossless.jpg")
    members = [("1.cls", b"0"), ("1.jpg", JPEGS[0]), ("2.cls", b"0"), ("2.jpg", JPEGS[1][: len(JPEGS[1]) // 2])]
    write_tar(tmp_path / "a.tar", [*members, ("3.cls", b"0"), ("3.jpg", lossless)])
    index_shards(tmp_path)
    assert find_faults(tmp_path) == []
    cut, unreadable = find_faults(tmp_path, deep=True)
    assert "a.tar: sample 2: its image can't be used" in cut
    assert unreadable == "a.tar: sample 3: its image can't be used: DALI can't read it as stored (lossless)"


def test_labels_in_json_members_are_compared(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_tar(tmp_path / f"{name}.tar", [("1.json", b'{"kind": "of %s"}' % name.encode()), ("1.jpg", JPEGS[0])])
    index = index_shards(tmp_path, field="kind")
    assert find_faults(tmp_path, deep=True) == []
    write_index(tmp_path, index.shards, [index.samples[1:], index.samples[:1]], index.classes, made={"label_field": "kind"})
    assert [fault.partition(": offset")[0] for fault in find_faults(tmp_path, deep=True)] == ["a.tar: sample 1", "b.tar: sample 1"]


def test_index_of_other_samples_is_found(copy: Path, dataset: Index) -> None:
    rows = np.array(dataset.samples)
    rows["label"][5] = 10
    rows["offset"][7:9] += 512
    np.save(copy / "index.npy", rows)
    fingerprint, label, offset = find_faults(copy)
    assert "differs from the packed dataset" in fingerprint
    assert "labels up to 10, but there are only 10 classes" in label
    assert "train-000000.tar: sample 000000007: " in offset
    assert "and 1 more samples" in offset


def test_missing_and_wrong_idx_files_are_found(copy: Path) -> None:
    (copy / "train-000000.idx").unlink()
    idx = copy / "train-000001.idx"
    idx.write_text(idx.read_text().replace("jpg", "png", 1))
    assert find_faults(copy) == ["train-000000.idx is missing", "train-000001.idx does not describe train-000001.tar"]


def append_block(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(bytes(512))


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda copy: (copy / "train-000002.tar").unlink(), ["train-000002.tar is missing"]),
        (lambda copy: os.truncate(copy / "train-000002.tar", 512), ["train-000002.tar has 512 bytes instead of"]),
        (lambda copy: append_block(copy / "train-000002.tar"), ["train-000002.tar has "]),
        (lambda copy: shutil.copy(copy / "train-000000.tar", copy / "more.tar"), ["more.tar is not in dataset.json"]),
        (lambda copy: (copy / "train-000001.tar").rename(copy / "x.tar"), ["x.tar is not in dataset.json", "train-000001.tar is missing"]),
        (lambda copy: (copy / "train-000099.idx").touch(), ["train-000099.idx belongs to no shard"]),
        (lambda copy: (copy / "train-000009.tar.tmp").touch(), ["train-000009.tar.tmp is left over from"]),
        (lambda copy: (copy / ".index").mkdir(), [".index is left over from"]),
        (lambda copy: (copy / "index.npy").unlink(), ["is not a whole dataset: it has no index.npy"]),
    ],
)
def test_missing_extra_and_resized_files_are_found(copy: Path, damage: Callable[[Path], object], expected: list[str]) -> None:
    damage(copy)
    for deep in (False, True):
        faults = find_faults(copy, deep)
        assert len(faults) == len(expected), faults
        for fault, part in zip(faults, expected, strict=True):
            assert part in fault


def test_swapped_shards_of_equal_size_are_found(tmp_path: Path) -> None:
    """Sizes and offsets are equal: the .idx reveals the swap, and if it is swapped too, the checksum does."""
    for name in "ab":
        write_tar(tmp_path / f"{name}.tar", [(f"{name}.cls", b"0"), (f"{name}.jpg", JPEGS[0])])
    index = index_shards(tmp_path)
    assert index.shards[0].xxh3_128 != index.shards[1].xxh3_128
    write_index(tmp_path, [replace(index.shards[0], name="b.tar"), replace(index.shards[1], name="a.tar")], [index.samples], index.classes)
    assert find_faults(tmp_path) == []
    assert ["its bytes have changed" in fault for fault in find_faults(tmp_path, deep=True)] == [True, True]
    (tmp_path / "a.tar").rename(tmp_path / "c")
    (tmp_path / "b.tar").rename(tmp_path / "a.tar")
    (tmp_path / "c").rename(tmp_path / "b.tar")
    assert find_faults(tmp_path) == ["b.idx does not describe b.tar", "a.idx does not describe a.tar"]
