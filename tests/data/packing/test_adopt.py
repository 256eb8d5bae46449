"""Indexing makes shards of other tools a dataset in place, or writes nothing."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

import data.packing.adopt
from data.dataset.index import DTYPE, Index, open_index, read_key
from data.loader.store import ShardStore
from data.packing.adopt import index_shards
from tests.support.foreign_shards import JPEGS, reencode, write_tar
from tests.support.packs import encode


def read_folder(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Returns modification time and bytes of each file."""
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}


def write_img2dataset(folder: Path, *, shards: int = 3, samples: int = 4) -> None:
    """Writes shards as img2dataset does: KEY.jpg, KEY.txt and KEY.json, and a file of statistics per shard."""
    for shard in range(shards):
        members = []
        for number in range(samples):
            name, label = f"{shard:05d}{number:04d}", (shard + number) % 5
            about = {"url": "http://x", "caption": "é", "breed": f"dog {label}", "number": label, "nested": {}}
            members += [(f"{name}.jpg", JPEGS[number]), (f"{name}.txt", b"caption"), (f"{name}.json", json.dumps(about).encode())]
        write_tar(folder / f"{shard:05d}.tar", members)
        (folder / f"{shard:05d}_stats.json").write_text("{}")


def test_shards_of_webdatasets_writer_become_a_dataset(tmp_path: Path) -> None:
    encoded = {"jpg": JPEGS[0], "jpeg": JPEGS[1], "PNG": reencode(JPEGS[2], "PNG"), "WebP": reencode(JPEGS[3], "WEBP")}
    with webdataset.ShardWriter(str(tmp_path / "w-%06d.tar"), maxcount=3, encoder=False, verbose=0) as writer:
        for number in range(7):
            kind = list(encoded)[number % 4]
            writer.write({"__key__": f"sub/key {number}", kind: encoded[kind], "cls": str(number % 3).encode(), "txt": b"unused"})
    before = read_folder(tmp_path)
    index = index_shards(tmp_path)
    after = read_folder(tmp_path)
    assert {name: after[name] for name in before} == before, "no tar is changed"
    assert sorted(after.keys() - before.keys()) == ["classes.json", "dataset.json", "index.npy", *(f"w-00000{n}.idx" for n in range(3))]
    assert [shard.samples for shard in index.shards] == [3, 3, 1]
    assert index.classes == ("0", "1", "2")
    assert index.samples["label"].tolist() == [0, 1, 2, 0, 1, 2, 0]
    with ShardStore(index) as store:
        assert [store.read(number).tobytes() for number in range(7)] == [list(encoded.values())[number % 4] for number in range(7)]
    assert [read_key(index, number) for number in range(7)] == [f"sub/key {number}" for number in range(7)]


def test_labels_are_read_from_json_members(tmp_path: Path) -> None:
    write_img2dataset(tmp_path)
    index = index_shards(tmp_path, field="breed")
    assert index.classes == tuple(f"dog {number}" for number in range(5))
    expected = [(shard + number) % 5 for shard in range(3) for number in range(4)]
    assert index.samples["label"].tolist() == expected
    assert json.loads((tmp_path / "dataset.json").read_text())["made"]["label_field"] == "breed"

    index = index_shards(tmp_path, field="number", force=True)
    assert index.classes == tuple("01234")
    assert index.samples["label"].tolist() == expected

    classes = ["cat", *(f"dog {number}" for number in reversed(range(5)))]
    index = index_shards(tmp_path, field="breed", classes=classes, force=True)
    assert index.classes == tuple(classes)
    assert [index.classes[label] for label in index.samples["label"]] == [f"dog {label}" for label in expected]


def test_faults_are_listed_and_nothing_is_written(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("1.cls", b"0"), ("1.jpg", JPEGS[0]), ("2.cls", b"0"), ("2.jpg", b"no image"), ("3.jpg", JPEGS[1])])
    write_tar(tmp_path / "b.tar", [("4.cls", b"9000000000"), ("4.jpg", JPEGS[0]), ("5.cls", b"-1"), ("5.jpg", JPEGS[1])])
    write_tar(tmp_path / "c.tar", [("6.cls", b"1"), ("6.jpg", JPEGS[0])])
    os.truncate(tmp_path / "c.tar", 1000)
    write_tar(tmp_path / "d.tar", [])
    before = read_folder(tmp_path)
    with pytest.raises(ValueError, match="can't be indexed") as raised:
        index_shards(tmp_path)
    message = str(raised.value)
    for fault in (
        "a.tar: sample 2: its image is ",
        "a.tar: sample 3: it has jpg, and no cls",
        "b.tar: sample 4: its label is 9000000000; labels are from 0 to 1048575",
        "b.tar: sample 5: its label is -1",
        "c.tar: not a whole tar file",
        " and 1 more.",
        f"`python -m data pack {tmp_path} OUT`",
    ):
        assert fault in message
    assert read_folder(tmp_path) == before


@pytest.mark.parametrize(
    ("members", "arguments", "fault"),
    [
        ({"json": b"{"}, {"field": "x"}, "sample 1: its .json can't be read"),
        ({"json": b"[1]"}, {"field": "x"}, "sample 1: its .json has no field x"),
        ({"json": b'{"x": true}'}, {"field": "x"}, "sample 1: field x of its .json is True instead of a number or a class name"),
        ({"json": b'{"x": "c"}'}, {"field": "x", "classes": ("a", "b")}, "sample 1: its class 'c' is not among the 2 given classes"),
        ({"cls": b"2"}, {"classes": ("a", "b")}, "sample 1: its label is 2; labels are from 0 to 1"),
    ],
)
def test_invalid_label_is_an_error(tmp_path: Path, members: dict[str, bytes], arguments: dict, fault: str) -> None:
    write_tar(tmp_path / "a.tar", [*((f"1.{extension}", value) for extension, value in members.items()), ("1.jpg", JPEGS[0])])
    with pytest.raises(ValueError, match=f"a.tar: {fault}"):
        index_shards(tmp_path, **arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]


def test_numbers_and_names_need_a_list_of_classes(tmp_path: Path) -> None:
    for name, value in (("a", 1), ("b", "cat")):
        write_tar(tmp_path / f"{name}.tar", [("1.json", json.dumps({"x": value}).encode()), ("1.jpg", JPEGS[0])])
    with pytest.raises(ValueError, match="numbers in some samples and names in others"):
        index_shards(tmp_path, field="x")
    assert index_shards(tmp_path, field="x", classes=("cat", "dog")).samples["label"].tolist() == [1, 0]


def test_folder_or_tar_without_samples_is_an_error(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=r"no \.tar files"):
            index_shards(folder)
    assert not list(tmp_path.iterdir())
    write_tar(tmp_path / "a.tar", [("readme", b"no sample")])
    with pytest.raises(ValueError, match=r"a\.tar: no samples in it; remove it"):
        index_shards(tmp_path)


def test_image_too_large_for_the_index_is_an_error(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("1.cls", b"0"), ("1.png", encode(Image.new("L", (70_000, 1)), "PNG"))])
    with pytest.raises(ValueError, match="sample 1: its image has 70000 x 1 pixels"):
        index_shards(tmp_path)


def test_dataset_changes_only_by_force(dataset: Index, tmp_path: Path) -> None:
    """Indexing a dataset's shards again restores the .idx files and index.npy; any other result needs --force."""
    copy = Path(shutil.copytree(dataset.folder, tmp_path / "copy"))
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    (copy / "train-000000.idx").unlink()
    np.save(copy / "index.npy", np.zeros(1, DTYPE))
    again = index_shards(copy, classes=dataset.classes)
    assert again.fingerprint == dataset.fingerprint
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before

    with pytest.raises(ValueError, match="is already a dataset of other shards, labels or classes; --force"):
        index_shards(copy)  # without class names, the classes would be numbers
    (copy / "train-000001.tar").unlink()
    (copy / "train-000001.idx").unlink()
    with pytest.raises(ValueError, match="is already a dataset"):
        index_shards(copy, classes=dataset.classes)
    assert (copy / "dataset.json").read_bytes() == before["dataset.json"]
    assert not (copy / ".index").exists()
    smaller = index_shards(copy, classes=dataset.classes, force=True)
    assert len(smaller.shards) == len(dataset.shards) - 1
    assert open_index(copy).fingerprint == smaller.fingerprint


def test_interrupted_index_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_img2dataset(tmp_path, shards=4)
    read: list[str] = []
    real_read = data.packing.adopt.read_shard

    def read_two(path: Path, describe: object) -> object:
        if len(read) == 2:
            raise KeyboardInterrupt
        read.append(path.name)
        return real_read(path, describe)  # type: ignore[arg-type]

    monkeypatch.setattr(data.packing.adopt, "read_shard", read_two)
    with pytest.raises(KeyboardInterrupt):
        index_shards(tmp_path, field="breed")
    assert not list(tmp_path.glob("*.idx"))
    assert not (tmp_path / "dataset.json").exists()

    os.utime(tmp_path / "00001.tar")  # as if the shard had changed
    read.clear()
    monkeypatch.setattr(data.packing.adopt, "read_shard", lambda path, describe: read.append(path.name) or real_read(path, describe))
    index = index_shards(tmp_path, field="breed")
    assert read == ["00001.tar", "00002.tar", "00003.tar"]
    assert len(index) == 16
    assert not (tmp_path / ".index").exists()
