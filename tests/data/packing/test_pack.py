"""Packing: content, order and names of the result, and the errors."""

import io
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from nvidia.dali import fn
from nvidia.dali.pipeline import Pipeline
from PIL import Image

from data.__main__ import main
from data.dataset.index import open_index, read_key
from data.packing.images import ImageRules
from data.packing.pack import pack
from data.packing.plan import Settings
from data.packing.sources import encode_key
from tests.support.packs import (
    BROKEN,
    DRAWN,
    HOLDOUT,
    ODD_NAMES,
    SMALL,
    make_source_files,
    make_tar,
    pack_small,
    read_files,
    read_rejected,
    read_samples,
    write_files,
)

pytestmark = pytest.mark.slow


def test_every_file_is_packed_or_rejected_once(source: Path, tmp_path: Path) -> None:
    [index] = pack_small(source, tmp_path / "out")
    assert index.folder == tmp_path / "out" / "train"
    assert index.classes == ("n0000", "n0001", "n0002", "n0003")
    assert [shard.name for shard in index.shards] == [f"in-train-{number:06d}.tar" for number in range(len(index.shards))]
    assert len(index.shards) > 5
    samples = read_samples(index)
    keys = samples.keys() | {line["key"] for line in read_rejected(index.folder)}
    assert keys == {encode_key(name.rpartition(".")[0]) for name in make_source_files()}
    assert len(index) == len(samples) == 64
    for number, (encoded, label) in enumerate(DRAWN):
        assert samples[f"n{label:04d}/image%20{number}"] == (encoded, label), "sound JPEGs are stored as they are"
    for number in range(len(index)):
        with Image.open(io.BytesIO(samples[read_key(index, number)][0])) as image:
            assert (image.format, image.size) == ("JPEG", (index.samples["width"][number], index.samples["height"][number]))
    assert {line["path"] for line in read_rejected(index.folder)} == BROKEN
    assert all(line["reason"] for line in read_rejected(index.folder))
    assert main(["verify", str(index.folder)]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["train"], "no work files are left"


def test_dataset_json_describes_settings_and_images(source: Path, tmp_path: Path) -> None:
    [index] = pack_small(source, tmp_path / "out", Settings(name="in", rules=ImageRules(max_side=200)))
    about = json.loads((index.folder / "dataset.json").read_text())
    assert (about["samples"], about["classes"], about["rejected"]) == (64, 4, 3)
    samples = read_samples(index)
    assert sum(about["changes"].values()) == sum(encoded not in make_source_files().values() for encoded, _ in samples.values())
    assert {"png", "webp", "cmyk", "resized"} <= about["changes"].keys()
    made = about["made"]
    assert made["source"] == str(source)
    assert (made["seed"], made["max_side"], made["split"]) == (0, 200, "train")
    assert made["versions"].keys() >= {"pillow"}
    assert about["images"]["bytes"]["max"] == int(index.samples["size"].max())
    assert about["images"]["width"]["median"] == float(np.median(index.samples["width"]))
    pixels = []
    for encoded, _ in samples.values():
        with Image.open(io.BytesIO(encoded)) as image:
            pixels.append(np.asarray(image.convert("RGB")).reshape(-1, 3) / 255)
    assert about["images"]["mean"] == pytest.approx(np.concatenate(pixels).mean(axis=0), abs=0.01)
    assert about["images"]["std"] == pytest.approx(np.concatenate(pixels).std(axis=0), abs=0.01)


def test_shards_depend_on_seed_and_keys_but_not_on_the_layout(source: Path, tmp_path: Path) -> None:
    [first] = pack_small(source, tmp_path / "a")
    [other] = pack_small(source, tmp_path / "b", Settings(name="in", shard_bytes=60_000, seed=1))
    assert list(read_samples(first)) != list(read_samples(other))
    tars: dict[str, bytes] = {}
    for class_name in ("n0000", "n0001", "n0002", "n0003"):
        files = [(name.partition("/")[2], data) for name, data in make_source_files().items() if name.startswith(class_name)]
        random.Random(0).shuffle(files)
        tars[f"{class_name}.tar"] = make_tar(files)
    whole = tmp_path / "whole.tar"
    whole.write_bytes(make_tar(dict(reversed(tars.items()))))
    for place in (write_files(tmp_path / "tars", tars), whole):
        [index] = pack_small(place, tmp_path / f"from {place.name}")
        assert index.fingerprint == first.fingerprint
        for shard in first.shards:
            assert (index.folder / shard.name).read_bytes() == (first.folder / shard.name).read_bytes()
        prefix = "whole.tar/" if place == whole else ""
        assert {line["path"] for line in read_rejected(index.folder)} == {prefix + path.replace("/", ".tar/", 1) for path in BROKEN}


def test_packed_shards_can_be_packed_again(source: Path, tmp_path: Path) -> None:
    [first] = pack_small(source, tmp_path / "a")
    [again] = pack(first.folder, tmp_path / "b", SMALL)
    assert (list(read_samples(again).items()), again.classes) == (list(read_samples(first).items()), first.classes)
    [one] = pack(first.folder / first.shards[0].name, tmp_path / "c", SMALL)
    assert len(one) == first.shards[0].samples
    [smaller] = pack(first.folder, tmp_path / "d", Settings(name="in", shard_bytes=60_000, rules=ImageRules(resize_short=32)))
    assert read_samples(smaller).keys() == read_samples(first).keys()
    assert smaller.samples["width"].max() < first.samples["width"].max()
    assert 50_000 < np.mean([shard.bytes for shard in smaller.shards]) < 75_000, "cut by stored bytes, not by those of the source"


def test_labels_of_foreign_shards_are_names_or_positions(tmp_path: Path) -> None:
    encoded = [encoded for encoded, _ in DRAWN[:8]]

    def write_shards(name: str, labels: list[Any], *, repeat_keys: bool) -> Path:
        files = {}
        for shard in range(2):
            members: dict[str, bytes] = {}
            for place in range(4):
                number = shard * 4 + place
                stem = f"{place if repeat_keys else number:04d}"
                members |= {f"{stem}.jpg": encoded[number], f"{stem}.json": json.dumps({"label": labels[number]}).encode()}
            files[f"{name}-{shard}.tar"] = make_tar(members)
        return write_files(tmp_path / name, files)

    names = ["cat", "dog", "cat", "ant", "cat", "cat", "dog", "cat"]
    named = write_shards("names", names, repeat_keys=False)
    [index] = pack(named, tmp_path / "a", SMALL)
    assert index.classes == ("ant", "cat", "dog")
    assert read_samples(index) == {f"{number:04d}": (encoded[number], index.classes.index(names[number])) for number in range(8)}
    [given] = pack(named, tmp_path / "b", Settings(name="in", classes=("dog", "bee", "cat", "ant")))
    assert {label for _, label in read_samples(given).values()} == {0, 2, 3}

    numbers = [2, 0, 2, 1, 2, 2, 0, 2]
    numbered = write_shards("numbers", numbers, repeat_keys=True)
    with pytest.raises(ValueError, match=r"numbers-0\.tar: labels are numbers; give --classes"):
        pack(numbered, tmp_path / "c", SMALL)
    with pytest.raises(ValueError, match=r"numbers-0\.tar: label 2 of 2 classes"):
        pack(numbered, tmp_path / "c", Settings(name="in", classes=("a", "b")))
    [repeated] = pack(numbered, tmp_path / "d", Settings(name="in", classes=("dog", "ant", "cat")))
    assert read_samples(repeated) == {f"numbers-{number // 4}/{number % 4:04d}": (encoded[number], numbers[number]) for number in range(8)}
    # A number is a position in the list beside the shards, whatever the order of the given classes.
    (numbered / "classes.json").write_text('["dog", "ant", "cat"]')
    [mapped] = pack(numbered, tmp_path / "e", Settings(name="in", classes=("cat", "dog", "ant")))
    assert [label for _, label in sorted(read_samples(mapped).values())] == [
        {2: 0, 0: 1, 1: 2}[label] for _, label in sorted(read_samples(repeated).values())
    ]


def test_unusable_samples_of_shards_are_rejected(tmp_path: Path) -> None:
    members = {"2.jpg": DRAWN[2][0], "0.txt": b"no image", "0.cls": b"0", "1.jpg": DRAWN[1][0], "1.cls": b"1", "3.jpg": b"x", "3.cls": b"1"}
    source = write_files(tmp_path / "source", {"s.tar": make_tar(members), "classes.json": b'["a", "b"]'})
    [index] = pack_small(source, tmp_path / "out")
    assert read_samples(index) == {"1": (DRAWN[1][0], 1)}
    assert {(line["key"], line["path"], line["reason"][:24]) for line in read_rejected(index.folder)} == {
        ("0", "s.tar/0.txt", "it has txt, cls, and no "),
        ("2", "s.tar/2.jpg", "it has jpg, and neither "),
        ("3", "s.tar/3.jpg", "not an image of a suppor"),
    }


def test_odd_names_are_read_by_webdataset_and_by_dali(tmp_path: Path) -> None:
    class_name = "__cl\udce4ss 1.5__"  # WebDataset skips members whose names begin with __
    files = {f"{class_name}/{name}": DRAWN[number][0] for number, name in enumerate(ODD_NAMES)}
    write_files(tmp_path / "root", files | {f"{class_name}/not \udce9.jpg": b"x"})
    [index] = pack_small(tmp_path / "root", tmp_path / "out", Settings(name="in", shard_bytes=40_000))
    assert index.classes == ("__cl\\xe4ss 1.5__",)
    expected = read_samples(index)
    assert sorted(encoded for encoded, _ in expected.values()) == sorted(files.values())
    assert [(line["key"], line["path"]) for line in read_rejected(index.folder)] == [
        ("%5F_cl%E4ss%201%2E5__/not%20%E9", "__cl\\xe4ss 1.5__/not \\xe9.jpg")
    ]
    paths = [str(index.folder / shard.name) for shard in index.shards]
    from_webdataset = {
        sample["__key__"]: (sample["jpg"], int(sample["cls"])) for sample in webdataset.WebDataset(paths, shardshuffle=False)
    }
    assert from_webdataset == expected

    pipeline = Pipeline(batch_size=len(index), num_threads=1, device_id=None)
    with pipeline:
        outputs: Any = fn.readers.webdataset(
            paths=paths,
            index_paths=[path.replace(".tar", ".idx") for path in paths],
            ext=["jpg", "cls"],
            missing_component_behavior="error",
        )
        pipeline.set_outputs(*outputs, fn.decoders.image(outputs[0]))
    batch: Any = pipeline.run()
    from_dali = [(bytes(batch[0].at(place)), int(bytes(batch[1].at(place)))) for place in range(len(index))]
    assert from_dali == list(expected.values())


def test_holdout_depends_on_keys_alone(source: Path, packed: Path, tmp_path: Path) -> None:
    train, val = open_index(packed / "train"), open_index(packed / "val")
    assert train.classes == val.classes
    assert read_samples(train).keys().isdisjoint(read_samples(val).keys())
    assert len(train) + len(val) == 64
    assert sum(label == 0 for _, label in read_samples(val).values()) == 3
    assert len(val) + len(read_rejected(packed / "val")) == 12
    assert all(shard.name.startswith("in-val-") for shard in val.shards)

    kept_classes = ("n0001", "n0002")
    fewer = write_files(tmp_path / "fewer", {name: data for name, data in make_source_files().items() if name.startswith(kept_classes)})
    _, again = pack_small(fewer, tmp_path / "out", HOLDOUT)
    assert read_samples(again).keys() == {name for name in read_samples(val) if name.startswith(kept_classes)}
    _, other = pack_small(fewer, tmp_path / "other", Settings(name="in", seed=2, holdout=3))
    assert read_samples(other).keys() != read_samples(again).keys()

    _, share = pack_small(source, tmp_path / "share", Settings(name="in", holdout=0.25))
    _, same = pack_small(fewer, tmp_path / "same", Settings(name="in", holdout=0.25))
    assert read_samples(same).keys() == {name for name in read_samples(share) if name.startswith(kept_classes)}
    assert 6 <= len(share) <= 26


def test_too_many_rejected_images_stop_the_packing(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "in"
    with pytest.raises(ValueError, match=r"too many images are rejected: \d so far, and --max-rejected allows 0 of 67\. The first: n0003/"):
        pack_small(source, out, max_rejected=0)
    packed = read_files(out / "train")
    assert packed, "packed shards are kept"
    with pytest.raises(ValueError, match="allows 0 of 67"):
        pack_small(source, out, max_rejected=0.01)
    assert read_files(out / "train") == packed, "nothing more is packed"
    with pytest.raises(ValueError, match=r"rejected: 3 so far, and --max-rejected allows 2 of 67\. The first: n0003/.*; n0003/.*; n0003/"):
        pack_small(source, out, max_rejected=0.04)
    pack_small(source, out, max_rejected=3)
    pack_small(source, tmp_path / "other" / "in")
    assert read_files(out) == read_files(tmp_path / "other" / "in")
    assert packed.items() <= read_files(out / "train").items()


def test_shard_without_a_usable_image_is_not_written(tmp_path: Path) -> None:
    source = write_files(tmp_path / "source", {"a/1.jpg": DRAWN[0][0], "a/2.jpg": b"x" * 5000, "b/3.jpg": DRAWN[1][0]})
    [index] = pack_small(source, tmp_path / "out", Settings(name="in", shard_bytes=1000))
    assert (len(index), len(index.shards)) == (2, 2)
    assert main(["verify", str(index.folder)]) == 0
    unusable = write_files(tmp_path / "unusable", {"a/1.jpg": b"1", "a/2.jpg": b""})
    with pytest.raises(ValueError, match=r"all 2 images are rejected; the first: \{.*'key': 'a/"):
        pack_small(unusable, tmp_path / "none")


def test_resuming_with_other_settings_is_an_error(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "in"
    pack_small(source, out, part=(0, 2))
    before = read_files(out)
    other = Settings(name="in", shard_bytes=60_000, seed=1, rules=ImageRules(resize_short=32))
    with pytest.raises(
        ValueError, match=r"train\.packing was made with other settings: seed 0 instead of 1; resize_short None instead of 32"
    ):
        pack_small(source, out, other)
    assert read_files(out) == before
    pack_small(source, out)
    finished = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    with pytest.raises(ValueError, match=r"train was made with other settings: seed 0 instead of 1.*or another OUT, or remove"):
        pack_small(source, out, other)
    with pytest.raises(ValueError, match="classes None instead of 4, xxh3_64"):
        pack_small(source, out, Settings(name="in", shard_bytes=60_000, classes=("n0000", "n0001", "n0002", "n0003")))
    [index] = pack_small(source, out)
    assert len(index) == 64
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == finished, "packing again changes nothing"


def test_second_split_takes_the_classes_of_train(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "in"
    val = write_files(tmp_path / "val", {"n0002/1.jpg": DRAWN[0][0], "n0003/2.jpg": DRAWN[1][0]})
    settings = Settings(name="in", split="val")
    pack_small(source, out, part=(0, 2))
    with pytest.raises(ValueError, match="train, whose classes this split takes, is not packed yet"):
        pack(val, out, settings)
    pack_small(source, out)
    [index] = pack(val, out, settings)
    assert index.folder == out / "val"
    assert index.classes == open_index(out / "train").classes
    assert {label for _, label in read_samples(index).values()} == {2, 3}
    unknown = write_files(tmp_path / "unknown", {"n9/1.jpg": DRAWN[0][0]})
    with pytest.raises(ValueError, match=r"unknown/n9: class n9 is not among the 4 given classes"):
        pack(unknown, out, Settings(name="in", split="test"))
    [alone] = pack(val, tmp_path / "alone", settings)
    assert alone.classes == ("n0002", "n0003")


def test_errors_before_the_first_shard(source: Path, tmp_path: Path) -> None:
    write_files(tmp_path / "full" / "train", {"precious": b""})
    empty = write_files(tmp_path / "empty", {"a.tar": make_tar({})})
    twice = [(f"{stem}.{extension}", b"0") for stem in "aba" for extension in ("jpg", "cls")]
    repeated = write_files(tmp_path / "repeated", {"s.tar": make_tar(twice)})
    for place, out, settings, message in (
        (source, tmp_path / "full", SMALL, "is not empty"),
        (source, source / "out", SMALL, "lies inside"),
        (source, tmp_path / "a", Settings(name="in", split="val", holdout=3), "--holdout writes the split val"),
        (source, tmp_path / "b", Settings(name="in", holdout=1e-9), "--holdout 1e-09 of 67 images in 4 classes holds out no image"),
        (empty, tmp_path / "c", SMALL, "class tars without a file in them"),
        (repeated, tmp_path / "d", Settings(name="in", classes=("x",)), r"s\.tar/a\.jpg and s\.tar/a\.jpg have the same key, s/a"),
    ):
        with pytest.raises(ValueError, match=message):
            pack(place, out, settings)
