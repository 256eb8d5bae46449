"""Shards are reproducible, and read as webdataset and DALI read them."""

import tarfile
from pathlib import Path
from typing import Any

import pytest
import webdataset
from nvidia.dali import fn
from nvidia.dali.pipeline import Pipeline

from data.dataset.headers import read_image_size
from data.dataset.shards import Sample, read_shard, write_idx, write_shard
from tests.support.foreign_shards import JPEGS, reencode, write_tar

# Names that tars may have; an .idx, whose fields end at blanks, needs them encoded.
ODD_KEYS = [
    "plain",
    "in/a folder.of/many",
    "./dot",
    "with blank",
    "tab\tand\nnewline",
    "per%20cent",
    "é ü 漢字 \xa0",
    "not UTF-8: \udcff\udce9",
    "x" * 150,
    "y" * 120 + "/" + "z" * 80,
]

PIXEL = bytes.fromhex(  # a PNG of one black pixel
    "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b550000000a49444154789c636000000002000148afa4710000000049454e44ae426082"
)


def test_bytes_of_a_shard_never_change(tmp_path: Path) -> None:
    """The checksum is that of plain tar headers without times, also for a key that is not ASCII."""
    keys_and_labels = {"000000000": 7, "n01/1%20_~": 21840, "é": 0}
    shard, _ = write_shard(tmp_path / "x.tar", [Sample(key, PIXEL, label, "png") for key, label in keys_and_labels.items()])
    assert (shard.bytes, shard.xxh3_128) == (10240, "9aa652a265f7c6ab2982a1f1a8daa89e")


def dali_reads(paths: list[Path], batch: int) -> list[tuple[bytes, bytes]]:
    """Reads image and label of the first `batch` samples by DALI's reader and the .idx files."""
    pipeline = Pipeline(batch_size=batch, num_threads=1, device_id=None)
    with pipeline:
        outputs: Any = fn.readers.webdataset(
            paths=[str(path) for path in paths],
            index_paths=[str(path.with_suffix(".idx")) for path in paths],
            ext=["jpg;jpeg;png;webp", "cls"],
            missing_component_behavior="error",
        )
        pipeline.set_outputs(*outputs)
    run: Any = pipeline.run()
    encoded, labels = run
    return [(bytes(encoded.at(place)), bytes(labels.at(place))) for place in range(batch)]


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_webdataset_and_dali_read_the_same_samples(tmp_path: Path, format: int) -> None:
    path = tmp_path / "odd.tar"
    members = [("__meta__", b"x"), ("no extension", b"x"), (".hidden.jpg", b"x")]
    for number, key in enumerate(ODD_KEYS):
        members += [(f"{key}.JPG", JPEGS[number]), (f"{key}.cls", b"%d\n" % number), (f"{key}.Seg.png", b"mask")]
    members += [(".hidden.cls", b"1"), ("late.cls", b"99"), ("late.txt", b"a caption"), ("late.webp", reencode(JPEGS[0], "WEBP"))]
    write_tar(path, members, format=format, folders=["in", "in/a folder.of"])
    contents = read_shard(path)
    assert not contents.faults
    expected = list(webdataset.WebDataset([str(path)], shardshuffle=False))
    assert contents.keys == [sample["__key__"] for sample in expected] == [*ODD_KEYS, "late"]
    assert contents.rows["label"].tolist() == [int(sample["cls"]) for sample in expected]
    data = path.read_bytes()
    stored = [data[row["offset"] : row["offset"] + row["size"]] for row in contents.rows]
    assert stored == [sample.get("jpg", sample.get("webp")) for sample in expected]
    assert [read_image_size(encoded) for encoded in stored] == list(zip(contents.rows["width"], contents.rows["height"], strict=True))

    write_idx(path.with_suffix(".idx"), contents.idx)
    assert dali_reads([path], len(expected)) == [(encoded, sample["cls"]) for encoded, sample in zip(stored, expected, strict=True)]
    headers = read_shard(path, None)
    assert headers.keys == contents.keys
    assert headers.idx == contents.idx
    assert (headers.rows[["offset", "size"]] == contents.rows[["offset", "size"]]).all()
    assert headers.shard.samples == contents.shard.samples


def test_hidden_files_in_folders_are_skipped(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", [("a/1.cls", b"5"), ("a/._1.jpg", b"of macOS"), ("a/1.jpg", JPEGS[0])])
    contents = read_shard(tmp_path / "x.tar")
    assert contents.keys == ["a/1"]
    assert not contents.faults


def test_incomplete_tar_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "cut.tar"
    write_tar(path, [part for number in range(4) for part in ((f"{number}.cls", b"1"), (f"{number}.jpg", JPEGS[number]))])
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        *_, last = tar
    boundary = last.offset_data + -(-last.size // 512) * 512  # all members are there, without the end of the archive
    for size in (0, 100, 512, 700, 1024, len(whole) // 2, last.offset_data, boundary - 1, boundary, boundary + 100):
        path.write_bytes(whole[:size])
        for describe in ({}, {"describe": None}):
            with pytest.raises(ValueError, match=r"cut\.tar: not a whole tar"):
                read_shard(path, **describe)
    path.write_bytes(whole[: boundary + 512])
    assert read_shard(path).shard.samples == 4
    path.write_bytes(b"no tar at all" * 100)
    with pytest.raises(ValueError, match=r"cut\.tar: not a whole tar"):
        read_shard(path)
    path.unlink()
    with pytest.raises(ValueError, match=r"cut\.tar: No such file"):
        read_shard(path)


def test_damaged_header_is_not_taken_for_the_end(tmp_path: Path) -> None:
    path = tmp_path / "flipped.tar"
    write_tar(path, [part for number in range(4) for part in ((f"{number}.cls", b"1"), (f"{number}.jpg", JPEGS[number]))])
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        headers = [entry.offset for entry in tar]
    for header in headers:
        for place in (0, 100, 124, 136, 148, 156, 257, 345):
            flipped = bytearray(whole)
            flipped[header + place] ^= 1
            path.write_bytes(flipped)
            for describe in ({}, {"describe": None}):
                with pytest.raises(ValueError, match=r"not a whole tar"):
                    read_shard(path, **describe)


@pytest.mark.parametrize(
    ("members", "fault"),
    [
        ({"jpg": JPEGS[0]}, "it has jpg, and no cls"),
        ({"cls": b"1", "b.jpg": JPEGS[0]}, "it has cls, b.jpg, and no jpg or jpeg or png or webp"),
        ({"cls": b"cat", "jpg": JPEGS[0]}, "its .cls holds b'cat' instead of a number"),
        ({"cls": b"1", "jpg": reencode(JPEGS[0], "GIF")}, "its image is not a JPEG, PNG or WebP"),
        ({"cls": b"1", "jpg": b""}, "its image is not a JPEG, PNG or WebP"),
        ({"cls": b"1", "jpg": JPEGS[0], "JPG": JPEGS[1]}, "it has several members of one extension: cls, jpg, jpg"),
    ],
)
def test_unusable_sample_is_a_fault(tmp_path: Path, members: dict[str, bytes], fault: str) -> None:
    path = tmp_path / "x.tar"
    good = [("0.cls", b"7"), ("0.jpg", JPEGS[0])]
    write_tar(path, [*good, *((f"1.{extension}", data) for extension, data in members.items()), ("2.cls", b"8"), ("2.png", JPEGS[1])])
    contents = read_shard(path)
    assert contents.keys == ["0", "1", "2"]
    assert list(contents.faults) == [1]
    assert fault in contents.faults[1]
    assert contents.rows["label"].tolist() == [7, 0, 8]
