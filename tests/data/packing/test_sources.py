"""Sources: each layout in which the images are distributed has the same listing, and every file name becomes a valid key."""

import json
import os
import random
import re
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.io import savemat

from data.packing.labels import read_classes, read_image_labels
from data.packing.sources import KEY_BYTES, Source, list_tar, read_entry, recognize_source
from tests.support.packs import ODD_NAMES, make_tar, write_files

# Two classes; the content of a file does not matter before it is decoded.
IMAGES = {f"n{label:08d}/n{label:08d}_{number}.JPEG": f"image {label} {number}".encode() for label in (7, 3) for number in range(4)}
EXPECTED = {(name.removesuffix(".JPEG"), name.partition("/")[0], data) for name, data in IMAGES.items()}


def make_class_tars(prefix: str = "") -> dict[str, bytes]:
    """Returns IMAGES as one tar per class, with member names like those of image-net.org's tars."""
    classes = {name.partition("/")[0] for name in IMAGES}
    return {
        f"{prefix}{class_name}.tar": make_tar(
            {name.partition("/")[2]: data for name, data in IMAGES.items() if name.startswith(class_name)}
        )
        for class_name in classes
    }


def list_entries(source: Source, **options: Any) -> list[tuple[str, Any, bytes]]:
    """Returns (key, label, bytes) of each entry, by key."""
    entries = []
    for container in source.containers:
        listing = source.make_lister(**options)(container)
        for row in listing.rows:
            start, middle = int(row["text"]), int(row["text"]) + int(row["key_bytes"])
            key, name = listing.text[start:middle], listing.text[middle : middle + int(row["name_bytes"])]
            data = read_entry(source.root, container, os.fsdecode(name), int(row["offset"]), int(row["size"]))
            entries.append((key.decode(), listing.labels[row["label"]], data))
    return sorted(entries)


def list_keys(source: Source, **options: Any) -> list[str]:
    return [key for key, _, _ in list_entries(source, **options)]


def test_class_folders_are_listed(tmp_path: Path) -> None:
    source = recognize_source(write_files(tmp_path, IMAGES | {"README": b"", ".cache/x": b""}))
    assert (source.kind, source.classes) == ("class folders", ("n00000003", "n00000007"))
    assert set(list_entries(source)) == EXPECTED


def test_class_folders_may_be_deep_and_have_links(tmp_path: Path) -> None:
    elsewhere = write_files(tmp_path / "elsewhere", {"deep/er/cat.jpg": b"1", "cat.jpg": b"2"})
    root = write_files(tmp_path / "root", {"cats/a/b/c.jpg": b"3"})
    (root / "linked").symlink_to(elsewhere)
    (root / "cats" / "more").symlink_to(elsewhere / "deep")
    assert list_entries(recognize_source(root)) == [
        ("cats/a/b/c", "cats", b"3"),
        ("cats/more/er/cat", "cats", b"1"),
        ("linked/cat", "linked", b"2"),
        ("linked/deep/er/cat", "linked", b"1"),
    ]
    (root / "cats" / "gone.jpg").symlink_to("nowhere")
    with pytest.raises(ValueError, match=r"gone\.jpg is neither a file nor a folder"):
        list_entries(recognize_source(root))


def test_folder_of_class_tars_is_listed(tmp_path: Path) -> None:
    source = recognize_source(write_files(tmp_path, make_class_tars()))
    assert (source.kind, source.classes) == ("class tars", ("n00000003", "n00000007"))
    assert set(list_entries(source)) == EXPECTED


@pytest.mark.parametrize("prefix", ["", "fall11/"])
def test_tar_of_class_tars_is_listed(tmp_path: Path, prefix: str) -> None:
    whole = tmp_path / "fall11_whole.tar"
    whole.write_bytes(make_tar({prefix + "empty.tar": make_tar({})} | make_class_tars(prefix)))
    source = recognize_source(whole)
    assert (source.kind, source.classes) == ("class tars", ("empty", "n00000003", "n00000007"))
    assert set(list_entries(source)) == EXPECTED


def test_members_of_class_tars_are_listed_as_unpacked(tmp_path: Path) -> None:
    """Members may be in a folder of the class, and the last of two members with one name counts, as when unpacking."""
    for prefix in ("", "./"):
        folder = write_files(tmp_path / f"x{prefix}", {"n1.tar": make_tar({f"{prefix}n1/a.jpg": b"1", f"{prefix}b/c.jpg": b"2"})})
        assert list_keys(recognize_source(folder)) == ["n1/a", "n1/b/c"]
    twice = write_files(tmp_path / "twice", {"n1.tar": make_tar([("a.jpg", b"old"), ("b.jpg", b"b"), ("a.jpg", b"new")])})
    assert list_entries(recognize_source(twice)) == [("n1/a", "n1", b"new"), ("n1/b", "n1", b"b")]


# Validation images of ImageNet-1K: sorted names, and numbers of the development kit that do not follow the order of the wnids.
VALIDATION = {f"ILSVRC2012_val_{number:08d}.JPEG": f"validation {number}".encode() for number in (3, 1, 2, 4)}
TRUTH = dict(zip(sorted(VALIDATION), ["n00000007", "n00000003", "n00000007", "n00000005"], strict=True))


def write_development_kit(folder: Path) -> Path:
    """Writes meta.mat, with synsets above the classes as in the kit, and the ground truth beside it; returns the latter."""
    folder.mkdir()
    fields = np.dtype([("ILSVRC2012_ID", object), ("WNID", object), ("words", object), ("num_children", object)])
    numbers = {1: "n00000007", 2: "n00000003", 3: "n00000005", 1001: "n00000001"}
    synsets = np.array([(number, wnid, "words", 0 if number < 1000 else 3) for number, wnid in numbers.items()], fields)
    savemat(folder / "meta.mat", {"synsets": synsets.reshape(-1, 1)})
    truth = folder / "ILSVRC2012_validation_ground_truth.txt"
    truth.write_text("".join(f"{number}\n" for number in (1, 2, 1, 3)))
    return truth


def write_labels(folder: Path, kind: str) -> Path:
    if kind == "kit":
        return write_development_kit(folder / "kit")
    path = folder / ("labels.txt" if kind == "one class per line" else "labels.csv")
    shuffled = list(TRUTH.items())
    random.Random(0).shuffle(shuffled)
    rows = {
        "Kaggle": [f"{name.removesuffix('.JPEG')},{wnid} 85 1 499 272 {wnid} 1 2 3 4 \n" for name, wnid in shuffled],
        "file names": [f"{name},{wnid}\n" for name, wnid in shuffled],
        "one class per line": [f"{wnid}\n" for wnid in TRUTH.values()],
    }
    path.write_text(("ImageId,PredictionString\n" if kind == "Kaggle" else "") + "".join(rows[kind]))
    return path


@pytest.mark.parametrize(("kind", "is_tar"), [("kit", True), ("Kaggle", False), ("file names", False), ("one class per line", True)])
def test_images_with_a_file_of_labels_are_listed(tmp_path: Path, kind: str, is_tar: bool) -> None:
    labels = write_labels(tmp_path, kind)
    path = tmp_path / "ILSVRC2012_img_val.tar"
    if is_tar:
        path.write_bytes(make_tar(VALIDATION))
    else:
        write_files(path, VALIDATION)
    source = recognize_source(path, labels)
    assert source.kind == "labeled images"
    expected = {(f"{wnid}/{name.removesuffix('.JPEG')}", wnid, VALIDATION[name]) for name, wnid in TRUTH.items()}
    assert set(list_entries(source)) == expected


def test_labels_that_do_not_match_the_images_are_an_error(tmp_path: Path) -> None:
    names = sorted(VALIDATION)
    labels = tmp_path / "labels.csv"
    for text, message in (
        ("".join(f"{name},n1\n" for name in names[1:]), "no label for 1 of 4 images, such as ILSVRC2012_val_00000001"),
        ("".join(f"{name},n1\n" for name in [*names, "other"]), "line 5: 'other,n1' names no image"),
    ):
        labels.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_image_labels(labels, names)
    truth = write_development_kit(tmp_path / "kit")
    with pytest.raises(ValueError, match="4 labels for 3 images"):
        read_image_labels(truth, names[:3])
    (truth.parent / "meta.mat").unlink()
    with pytest.raises(ValueError, match=r"put the kit's meta\.mat beside it"):
        read_image_labels(truth, names)
    with pytest.raises(ValueError, match="can't be read as labels"):
        read_image_labels(tmp_path / "nowhere.txt", names)


@pytest.mark.parametrize("label_member", ["cls", "json"])
@pytest.mark.parametrize("label", ["cat", 3])
def test_webdataset_shards_are_listed(tmp_path: Path, label_member: str, label: str | int) -> None:
    expected = set()
    text = json.dumps({"label": label, "other": 1}) if label_member == "json" else str(label)
    for shard in range(2):
        members: dict[str, bytes] = {}
        for number, extension in enumerate(("jpg", "jpeg", "png", "webp", "JPG")):
            key, data = f"{shard}{number:03d}", f"{shard} {number}".encode()
            members |= {f"{key}.{label_member}": text.encode(), f"{key}.{extension}": data, f"{key}.txt": b"a caption"}
            expected.add((key, label, data))
        write_files(tmp_path, {f"s-{shard}.tar": make_tar(members), f"s-{shard}.idx": b""})
    source = recognize_source(tmp_path)
    assert (source.kind, source.classes) == ("WebDataset shards", None)
    assert set(list_entries(source)) == expected
    one = recognize_source(tmp_path / "s-0.tar")
    assert set(list_entries(one)) == {entry for entry in expected if entry[0].startswith("0")}
    assert list_keys(source, shard_in_key=True)[0] == "s-0/0000"
    (tmp_path / "classes.json").write_text('["a", "b"]')
    assert recognize_source(tmp_path).classes == ("a", "b")


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"1.txt": b"", "1.cls": b"3"}, "it has txt, cls, and no jpg or jpeg or png or webp"),
        ({"1.jpg": b"", "1.txt": b""}, "it has jpg, txt, and neither cls nor json"),
        ({"1.jpg": b"", "1.json": b"{}"}, r"its \.json has no field label"),
        ({"1.jpg": b"", "1.cls": b"\xff"}, r"its \.cls holds b'\\xff' instead of a number or a class name"),
    ],
)
def test_unusable_sample_is_a_fault(tmp_path: Path, members: dict[str, bytes], message: str) -> None:
    """An unusable sample among others is a fault; a shard of unusable samples alone is an error."""
    write_files(tmp_path, {"s.tar": make_tar({"0.jpg": b"usable", "0.cls": b"3"} | members)})
    source = recognize_source(tmp_path)
    listing = source.make_lister()(source.containers[0])
    assert len(listing.rows) == 2
    assert list(listing.faults) == [1]
    assert re.search(message, listing.faults[1])
    write_files(tmp_path, {"s.tar": make_tar(members | {"2.json": b""})})
    with pytest.raises(ValueError, match=rf"s\.tar: none of its 2 samples can be used; of 1: {message}"):
        list_entries(source)


CLASS_TARS_TWICE = make_tar([("a/n1.tar", make_tar({})), ("b/n1.tar", make_tar({}))])


@pytest.mark.parametrize(
    ("files", "place", "message"),
    [
        ({"other": b""}, "", "no class folders and no tars in it; a source is a folder of class folders"),
        ({"a.jpg": b""}, "", "no class folders and no tars.*their labels in a file"),
        ({"a/a.jpg": b"", "b.tar": make_tar({})}, "", "1 folders and 1 tars; classes can't be in both"),
        ({"a.tar": make_tar({}), "b.tar.gz": b""}, "", r"b\.tar\.gz is compressed.*decompress it first"),
        ({"a.tar": make_tar({"x.jpg": b""}, "w:gz")}, "", r"a\.tar is compressed.*with gunzip"),
        ({"train/n1/a.jpg": b"", "val/n1/a.jpg": b""}, "", "train and val look like splits of a dataset, not classes; pack .*/train"),
        ({"whole.tar": make_tar(make_class_tars())}, "", r"whole\.tar is a tar of tars; give it as SOURCE"),
        ({}, "nowhere", "no such file or folder"),
        ({"flat.tar": make_tar({"a.jpg": b""})}, "flat.tar", r"it begins with a\.jpg; a source is"),
        ({"text": b"no tar " * 200}, "text", "not a whole tar"),
        ({"twice.tar": CLASS_TARS_TWICE}, "twice.tar", "several tars of the class n1"),
    ],
)
def test_unrecognized_source_is_an_error(tmp_path: Path, files: dict[str, bytes], place: str, message: str) -> None:
    write_files(tmp_path, files)
    with pytest.raises(ValueError, match=message):
        recognize_source(tmp_path / place)


@pytest.mark.parametrize("following", [None, make_tar({"other.jpg": b"x"}), bytes(1024)], ids=["tar", "tar in tar", "last tar in tar"])
def test_damaged_tar_is_an_error(tmp_path: Path, following: bytes | None) -> None:
    """The tar is cut at every block, and each header is damaged."""
    members = {f"{number}.jpg": bytes([number]) * 700 for number in range(1, 4)}
    whole = make_tar(members)[: 3 * 1536 + 1024]
    path = tmp_path / "a.tar"

    def list_names(data: bytes) -> list[str]:
        preceding = make_tar({"before.jpg": b"x"}) if following else b""
        path.write_bytes(preceding + data + (following or b""))
        return [name for name, _, _ in list_tar(path, len(preceding), len(preceding) + len(data))]

    assert list_names(whole) == list(members)
    damaged = [whole[:end] for end in range(0, 3 * 1536 + 1, 512)]
    damaged += [whole[: 1536 * number] + b"\xff" * 512 + whole[1536 * number + 512 :] for number in range(3)]
    for data in damaged:
        with pytest.raises(ValueError, match=r"a\.tar.*not a whole tar"):
            list_names(data)


def test_link_in_a_tar_is_an_error(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "n1.tar", "w") as tar:
        for kind in (tarfile.DIRTYPE, tarfile.LNKTYPE):
            entry = tarfile.TarInfo(f"x{kind.decode()}")
            entry.type, entry.linkname = kind, "y"
            tar.addfile(entry)
    with pytest.raises(ValueError, match="x1 is a link or a device; unpack this tar"):
        list(list_tar(tmp_path / "n1.tar"))


@pytest.mark.parametrize("is_tar", [False, True], ids=["folder", "tar"])
def test_odd_names_become_distinct_valid_keys(tmp_path: Path, is_tar: bool) -> None:
    files = {name: os.fsencode(name) for name in ODD_NAMES}
    class_name = "cl\udce4ss 1.5"
    if is_tar:
        write_files(tmp_path, {f"{class_name}.tar": make_tar(files)})
    else:
        write_files(tmp_path / class_name, files)
    source = recognize_source(tmp_path)
    assert source.classes == ("cl\\xe4ss 1.5",)
    keys = {data: key for key, label, data in list_entries(source) if label == source.classes[0]}
    assert keys.keys() == set(files.values()), "each file is read by its name"
    assert len(set(keys.values())) == len(ODD_NAMES)
    for key in keys.values():
        assert re.fullmatch(r"[\w~/%-]+", key, re.ASCII)
        assert len(key) <= KEY_BYTES
    for name, key in {
        "plain.jpg": "plain", "two.dots.in.it.jpg": "two%2Edots%2Ein%2Eit", "same.png": "same%2Epng", "same.jpg": "same%2Ejpg",
        "same.jpg.gif": "same%2Ejpg%2Egif", "caf\udce9.jpg": "caf%E9", "café.jpg": "caf%C3%A9", ".hidden": "%2Ehidden",
    }.items():  # fmt: skip
        assert keys[os.fsencode(name)] == "cl%E4ss%201%2E5/" + key


def test_encoded_keys_of_shards_are_not_encoded_again(tmp_path: Path) -> None:
    write_files(tmp_path, {"s.tar": make_tar({"a%2Eb/1.cls": b"0", "a%2Eb/1.jpg": b"", "c d.cls": b"0", "c d.jpg": b""})})
    assert list_keys(recognize_source(tmp_path)) == ["a%2Eb/1", "c%20d"]


def test_file_changed_after_the_listing_is_an_error(tmp_path: Path) -> None:
    source = recognize_source(write_files(tmp_path, IMAGES))
    container, name = source.containers[0], "n00000003_0.JPEG"
    with pytest.raises(ValueError, match=rf"{name}: it has changed since it was listed \(9 bytes instead of 8\)"):
        read_entry(source.root, container, name, 0, 8)
    with pytest.raises(ValueError, match=r"gone\.jpg: can't be read \(No such file"):
        read_entry(source.root, container, "gone.jpg", 0, 8)
    tars = recognize_source(write_files(tmp_path / "tars", make_class_tars()))
    with pytest.raises(ValueError, match=r"tar: it has changed since it was listed \(0 bytes instead of 8\)"):
        read_entry(tars.root, tars.containers[0], "", 1 << 30, 8)


def test_classes_are_read_from_json_and_text(tmp_path: Path) -> None:
    (tmp_path / "classes.json").write_text('["b", "a"]')
    assert read_classes(tmp_path) == read_classes(tmp_path / "classes.json") == ("b", "a")
    text = tmp_path / "classes.txt"
    text.write_text("n00000002 tench, Tinca tinca\nn00000001\ngolden retriever\n\n")
    assert read_classes(text) == ("n00000002", "n00000001", "golden retriever")
    for name, content, message in (
        ("classes.txt", "a\nb\na\n", "class a occurs 2 times"),
        ("classes.txt", "", "expected a list of class names"),
        ("other.json", '{"0": "a"}', "expected a list of class names"),
        ("broken.json", "[", "not a list of classes"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=message):
            read_classes(tmp_path / name)
