"""Each kind of source, as it is distributed, lists the same images; names of every kind make keys that every reader takes."""

import io
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
from data.packing.sources import KEY_BYTES, Source, encode_key, list_tar, read_entry, recognize_source
from tests.support.packs import ODD_NAMES, tar_of, write_tree

# Two classes; what is in a file does not matter before it is decoded.
IMAGES = {f"n{label:08d}/n{label:08d}_{number}.JPEG": f"image {label} {number}".encode() for label in (7, 3) for number in range(4)}
EXPECTED = {(name.removesuffix(".JPEG"), name.partition("/")[0], data) for name, data in IMAGES.items()}


def class_tars(prefix: str = "") -> dict[str, bytes]:
    """IMAGES as a tar a class, with names as image-net.org's tars have them."""
    classes = {name.partition("/")[0] for name in IMAGES}
    return {
        f"{prefix}{of}.tar": tar_of({name.partition("/")[2]: data for name, data in IMAGES.items() if name.startswith(of)})
        for of in classes
    }


def listed(source: Source, **options: Any) -> list[tuple[str, Any, bytes]]:
    """(key, label, bytes) of each entry, by key."""
    found = []
    for container in source.containers:
        part = source.make_lister(**options)(container)
        for row in part.rows:
            start, middle = int(row["text"]), int(row["text"]) + int(row["key_bytes"])
            key, name = part.text[start:middle], part.text[middle : middle + int(row["name_bytes"])]
            data = read_entry(source.root, container, os.fsdecode(name), int(row["offset"]), int(row["size"]))
            found.append((key.decode(), part.labels[row["label"]], data))
    return sorted(found)


def keys(source: Source, **options: Any) -> list[str]:
    return [key for key, _, _ in listed(source, **options)]


def test_class_folders(tmp_path: Path) -> None:
    source = recognize_source(write_tree(tmp_path, IMAGES | {"README": b"", ".cache/x": b""}))
    assert (source.kind, source.classes) == ("class folders", ("n00000003", "n00000007"))
    assert set(listed(source)) == EXPECTED


def test_any_depth_below_a_class_and_links(tmp_path: Path) -> None:
    elsewhere = write_tree(tmp_path / "elsewhere", {"deep/er/cat.jpg": b"1", "cat.jpg": b"2"})
    root = write_tree(tmp_path / "root", {"cats/a/b/c.jpg": b"3"})
    (root / "linked").symlink_to(elsewhere)
    (root / "cats" / "more").symlink_to(elsewhere / "deep")
    assert listed(recognize_source(root)) == [
        ("cats/a/b/c", "cats", b"3"),
        ("cats/more/er/cat", "cats", b"1"),
        ("linked/cat", "linked", b"2"),
        ("linked/deep/er/cat", "linked", b"1"),
    ]
    (root / "cats" / "gone.jpg").symlink_to("nowhere")
    with pytest.raises(ValueError, match=r"gone\.jpg is neither a file nor a folder"):
        listed(recognize_source(root))


def test_a_folder_of_class_tars(tmp_path: Path) -> None:
    source = recognize_source(write_tree(tmp_path, class_tars()))
    assert (source.kind, source.classes) == ("class tars", ("n00000003", "n00000007"))
    assert set(listed(source)) == EXPECTED


@pytest.mark.parametrize("prefix", ["", "fall11/", "./"])
def test_one_tar_of_class_tars(tmp_path: Path, prefix: str) -> None:
    whole = tmp_path / "fall11_whole.tar"
    whole.write_bytes(tar_of({prefix + "empty.tar": tar_of({})} | class_tars(prefix)))
    source = recognize_source(whole)
    assert (source.kind, source.classes) == ("class tars", ("empty", "n00000003", "n00000007"))
    assert set(listed(source)) == EXPECTED


def test_class_tars_whose_members_are_in_a_folder_of_the_class(tmp_path: Path) -> None:
    for prefix in ("", "./"):
        folder = write_tree(tmp_path / f"x{prefix}", {"n1.tar": tar_of({f"{prefix}n1/a.jpg": b"1", f"{prefix}b/c.jpg": b"2"})})
        assert keys(recognize_source(folder)) == ["n1/a", "n1/b/c"]


def test_the_last_of_two_members_of_one_name_counts_as_when_unpacking(tmp_path: Path) -> None:
    write_tree(tmp_path, {"n1.tar": tar_of([("a.jpg", b"old"), ("b.jpg", b"b"), ("a.jpg", b"new")])})
    assert listed(recognize_source(tmp_path)) == [("n1/a", "n1", b"new"), ("n1/b", "n1", b"b")]


# Validation images of ImageNet-1K: sorted names, numbers of the kit that are not in the order of the wnids.
VALIDATION = {f"ILSVRC2012_val_{number:08d}.JPEG": f"validation {number}".encode() for number in (3, 1, 2, 4)}
TRUTH = dict(zip(sorted(VALIDATION), ["n00000007", "n00000003", "n00000007", "n00000005"], strict=True))
VALIDATION_EXPECTED = {(f"{of}/{name.removesuffix('.JPEG')}", of, VALIDATION[name]) for name, of in TRUTH.items()}


def development_kit(folder: Path) -> Path:
    """meta.mat, with synsets above the classes as the kit has them, and the ground truth beside it."""
    folder.mkdir()
    fields = np.dtype([("ILSVRC2012_ID", object), ("WNID", object), ("words", object), ("num_children", object)])
    numbers = {1: "n00000007", 2: "n00000003", 3: "n00000005", 1001: "n00000001"}
    synsets = np.array([(number, of, "words", 0 if number < 1000 else 3) for number, of in numbers.items()], fields)
    savemat(folder / "meta.mat", {"synsets": synsets.reshape(-1, 1)})
    truth = folder / "ILSVRC2012_validation_ground_truth.txt"
    truth.write_text("".join(f"{number}\n" for number in (1, 2, 1, 3)))
    return truth


def label_file(folder: Path, kind: str) -> Path:
    if kind == "kit":
        return development_kit(folder / "kit")
    path = folder / ("labels.txt" if kind == "a class a line" else "labels.csv")
    shuffled = list(TRUTH.items())
    random.Random(0).shuffle(shuffled)
    path.write_text(
        {
            "Kaggle": "ImageId,PredictionString\n"
            + "".join(f"{name.removesuffix('.JPEG')},{of} 85 1 499 272 {of} 1 2 3 4 \n" for name, of in shuffled),
            "names": "".join(f"{name},{of}\n" for name, of in shuffled),
            "a class a line": "".join(f"{of}\n" for of in TRUTH.values()),
        }[kind]
    )
    return path


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "tar"])
@pytest.mark.parametrize("kind", ["kit", "Kaggle", "names", "a class a line"])
def test_flat_images_with_labels(tmp_path: Path, kind: str, packed: bool) -> None:
    labels = label_file(tmp_path, kind)
    if packed:
        (tmp_path / "ILSVRC2012_img_val.tar").write_bytes(tar_of(VALIDATION))
        source = recognize_source(tmp_path / "ILSVRC2012_img_val.tar", labels)
    else:
        source = recognize_source(write_tree(tmp_path / "val", VALIDATION), labels)
    assert source.kind == "labeled images"
    assert set(listed(source)) == VALIDATION_EXPECTED


def test_labels_that_do_not_fit(tmp_path: Path) -> None:
    names = sorted(VALIDATION)
    labels = tmp_path / "labels.csv"
    for text, message in (
        ("".join(f"{name},n1\n" for name in names[1:]), "no label for 1 of 4 images, such as ILSVRC2012_val_00000001"),
        ("".join(f"{name},n1\n" for name in [*names, "other"]), "line 5: 'other,n1' names no image"),
    ):
        labels.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_image_labels(labels, names)
    truth = development_kit(tmp_path / "kit")
    with pytest.raises(ValueError, match="4 labels for 3 images"):
        read_image_labels(truth, names[:3])
    (truth.parent / "meta.mat").unlink()
    with pytest.raises(ValueError, match=r"put the kit's meta\.mat beside it"):
        read_image_labels(truth, names)
    with pytest.raises(ValueError, match="can't be read as labels"):
        read_image_labels(tmp_path / "nowhere.txt", names)


def sample_members(label: str | int, key: str, data: bytes, extension: str, of: str) -> dict[str, bytes]:
    text = json.dumps({"label": label, "other": 1}) if of == "json" else str(label)
    return {f"{key}.{of}": text.encode(), f"{key}.{extension}": data}


@pytest.mark.parametrize("of", ["cls", "json"])
@pytest.mark.parametrize("names", [False, True], ids=["numbers", "names"])
def test_webdataset_shards(tmp_path: Path, of: str, names: bool) -> None:
    extensions = ("jpg", "jpeg", "png", "webp", "JPG")
    expected = set()
    for shard in range(2):
        members: dict[str, bytes] = {}
        for number, extension in enumerate(extensions):
            key, label, data = f"{shard}{number:03d}", "cat" if names else 3, f"{shard} {number}".encode()
            members |= sample_members(label, key, data, extension, of) | {f"{key}.txt": b"a caption"}
            expected.add((key, label, data))
        write_tree(tmp_path, {f"s-{shard}.tar": tar_of(members), f"s-{shard}.idx": b""})
    source = recognize_source(tmp_path)
    assert (source.kind, source.classes) == ("WebDataset shards", None)
    assert set(listed(source)) == expected
    one = recognize_source(tmp_path / "s-0.tar")
    assert set(listed(one)) == {entry for entry in expected if entry[0].startswith("0")}
    assert keys(source, shard_in_key=True)[0] == "s-0/0000"
    (tmp_path / "classes.json").write_text('["a", "b"]')
    assert recognize_source(tmp_path).classes == ("a", "b")


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"1.txt": b"", "1.cls": b"3"}, "it has txt, cls, and no jpg or jpeg or png or webp"),
        ({"1.jpg": b"", "1.txt": b""}, "it has jpg, txt, and neither cls nor json"),
        ({"1.jpg": b"", "1.json": b"{}"}, r"its \.json has no field label"),
        ({"1.jpg": b"", "1.json": b"no"}, r"its \.json can't be read"),
        ({"1.jpg": b"", "1.json": b'{"label": 0.5}'}, r"field label of its \.json is 0\.5 instead of a number or a class name"),
        ({"1.jpg": b"", "1.cls": b" "}, r"its \.cls holds b' ' instead of a number or a class name"),
        ({"1.jpg": b"", "1.cls": b"\xff"}, r"its \.cls holds b'\\xff' instead of"),
    ],
)
def test_samples_that_can_not_be_used(tmp_path: Path, members: dict[str, bytes], message: str) -> None:
    """One among others is rejected; a shard of nothing else is an error."""
    write_tree(tmp_path, {"s.tar": tar_of({"0.jpg": b"good", "0.cls": b"3"} | members)})
    source = recognize_source(tmp_path)
    part = source.make_lister()(source.containers[0])
    assert len(part.rows) == 2
    assert list(part.faults) == [1]
    assert re.search(message, part.faults[1])
    write_tree(tmp_path, {"s.tar": tar_of(members | {"2.json": b""})})
    with pytest.raises(ValueError, match=rf"s\.tar: none of its 2 samples can be used; of 1: {message}"):
        listed(source)


def test_what_is_no_source(tmp_path: Path) -> None:
    cases: dict[str, tuple[dict[str, bytes], str]] = {
        "empty": ({}, "no class folders and no tars in it; a source is a folder of class folders"),
        "flat": ({"a.jpg": b""}, "no class folders and no tars.*their labels in a file"),
        "both": ({"a/a.jpg": b"", "b.tar": tar_of({})}, "1 folders and 1 tars; classes can.t be in both"),
        "gz": ({"a.tar": tar_of({}), "b.tar.gz": b""}, r"b\.tar\.gz is compressed.*decompress it first"),
        "hidden gz": ({"a.tar": tar_of({"x.jpg": b""}, "w:gz")}, r"a\.tar is compressed.*with gunzip"),
        "splits": ({"train/n1/a.jpg": b"", "val/n1/a.jpg": b""}, "train and val look like splits of a dataset, not classes; pack .*/train"),
        "nested": ({"whole.tar": tar_of(class_tars())}, r"whole\.tar is a tar of tars; give it as SOURCE"),
    }
    for name, (files, message) in cases.items():
        (tmp_path / name).mkdir()
        with pytest.raises(ValueError, match=message):
            recognize_source(write_tree(tmp_path / name, files))
    with pytest.raises(ValueError, match="no such file or folder"):
        recognize_source(tmp_path / "nowhere")
    (tmp_path / "flat.tar").write_bytes(tar_of({"a.jpg": b""}))
    with pytest.raises(ValueError, match=r"it begins with a\.jpg; a source is"):
        recognize_source(tmp_path / "flat.tar")
    (tmp_path / "text").write_text("no tar " * 200)
    with pytest.raises(ValueError, match="not a whole tar"):
        recognize_source(tmp_path / "text")
    (tmp_path / "twice.tar").write_bytes(tar_of([("a/n1.tar", tar_of({})), ("b/n1.tar", tar_of({}))]))
    with pytest.raises(ValueError, match="several tars of the class n1"):
        recognize_source(tmp_path / "twice.tar")


@pytest.mark.parametrize("after", [None, tar_of({"other.jpg": b"x"}), bytes(1024)], ids=["tar", "tar in tar", "last tar in tar"])
def test_no_damage_to_a_tar_goes_unseen(tmp_path: Path, after: bytes | None) -> None:
    """Cut at every block, and with each header damaged: an error, or every file is listed."""
    members = {f"{number}.jpg": bytes([number]) * 700 for number in range(1, 4)}
    whole = tar_of(members)[: 3 * 1536 + 1024]
    path = tmp_path / "a.tar"

    def names(data: bytes) -> list[str]:
        before = tar_of({"before.jpg": b"x"}) if after else b""
        path.write_bytes(before + data + (after or b""))
        return [name for name, _, _ in list_tar(path, len(before), len(before) + len(data))]

    assert names(whole) == list(members)
    damaged = [whole[:end] for end in range(0, 3 * 1536 + 1, 512)]
    damaged += [whole[: 1536 * number] + b"\xff" * 512 + whole[1536 * number + 512 :] for number in range(3)]
    for data in damaged:
        with pytest.raises(ValueError, match=r"a\.tar.*not a whole tar"):
            names(data)


def test_links_in_a_tar_are_not_passed_over(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "n1.tar", "w") as tar:
        for kind in (tarfile.DIRTYPE, tarfile.LNKTYPE):
            entry = tarfile.TarInfo(f"x{kind.decode()}")
            entry.type, entry.linkname = kind, "y"
            tar.addfile(entry)
    with pytest.raises(ValueError, match="x1 is a link or a device; unpack this tar"):
        list(list_tar(tmp_path / "n1.tar"))


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "tar"])
def test_odd_names(tmp_path: Path, packed: bool) -> None:
    files = {name: os.fsencode(name) for name in ODD_NAMES}
    of = "cl\udce4ss 1.5"
    root = tmp_path / "root"
    if packed:
        root.mkdir()
        with tarfile.open(root / f"{of}.tar", "w", encoding="utf-8", errors="surrogateescape") as tar:
            for name, data in files.items():
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    else:
        write_tree(root / of, files)
    source = recognize_source(root)
    assert source.classes == ("cl\\xe4ss 1.5",)
    found = {data: key for key, label, data in listed(source) if label == source.classes[0]}
    assert found.keys() == set(files.values()), "each file is read by the name it has"
    assert len(set(found.values())) == len(ODD_NAMES)
    for key in found.values():
        assert set(key) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-~/%")
        assert len(key) <= KEY_BYTES
    start = "cl%E4ss%201%2E5/"
    for name, key in {
        "plain.jpg": "plain", "two.dots.in.it.jpg": "two%2Edots%2Ein%2Eit", "same.png": "same%2Epng", "same.jpg": "same%2Ejpg",
        "same.jpg.gif": "same%2Ejpg%2Egif", "caf\udce9.jpg": "caf%E9", "café.jpg": "caf%C3%A9", ".hidden": "%2Ehidden",
    }.items():  # fmt: skip
        assert found[os.fsencode(name)] == start + key


def test_a_key_that_is_cut_keeps_what_makes_it_one_of_its_kind() -> None:
    long = encode_key("n1/" + "x" * 200)
    assert len(long) == KEY_BYTES
    assert long.startswith("n1/xxx")
    assert long[78] == "~"
    assert encode_key("n1/" + "x" * 92) == "n1/" + "x" * 92
    assert encode_key("n1/" + "x" * 93)[78] == "~"


def test_keys_of_shards_stay_as_they_are(tmp_path: Path) -> None:
    write_tree(tmp_path, {"s.tar": tar_of({"a%2Eb/1.cls": b"0", "a%2Eb/1.jpg": b"", "c d.cls": b"0", "c d.jpg": b""})})
    assert keys(recognize_source(tmp_path)) == ["a%2Eb/1", "c%20d"]


def test_an_entry_that_has_changed_since_it_was_listed(tmp_path: Path) -> None:
    source = recognize_source(write_tree(tmp_path, IMAGES))
    container = source.containers[0]
    name = next(iter(IMAGES)).partition("/")[2].replace("7", "3")
    with pytest.raises(ValueError, match=rf"{name}: it has changed since it was listed \(9 bytes instead of 8\)"):
        read_entry(source.root, container, name, 0, 8)
    with pytest.raises(ValueError, match=r"gone\.jpg: can't be read \(No such file"):
        read_entry(source.root, container, "gone.jpg", 0, 8)
    write_tree(tmp_path / "tars", class_tars())
    tars = recognize_source(tmp_path / "tars")
    with pytest.raises(ValueError, match=r"tar: it has changed since it was listed \(0 bytes instead of 8\)"):
        read_entry(tars.root, tars.containers[0], "", 1 << 30, 8)


def test_lists_of_classes(tmp_path: Path) -> None:
    (tmp_path / "classes.json").write_text('["b", "a"]')
    assert read_classes(tmp_path) == read_classes(tmp_path / "classes.json") == ("b", "a")
    text = tmp_path / "classes.txt"
    text.write_text("n00000002 tench, Tinca tinca\nn00000001\ngolden retriever\n\n")
    assert read_classes(text) == ("n00000002", "n00000001", "golden retriever")
    for content, message in (("a\nb\na\n", "class a occurs 2 times"), ("", "expected a list of class names")):
        text.write_text(content)
        with pytest.raises(ValueError, match=message):
            read_classes(text)
    (tmp_path / "other.json").write_text('{"0": "a"}')
    with pytest.raises(ValueError, match="expected a list of class names"):
        read_classes(tmp_path / "other.json")
    with pytest.raises(ValueError, match="not a list of classes"):
        read_classes(tmp_path / "nowhere")
