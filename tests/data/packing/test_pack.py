"""Packing: what ends where, in which order, under which name, and what is refused."""

import contextlib
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

import data.packing.pack
from data.__main__ import main
from data.dataset.index import open_index, read_key
from data.packing.images import ImageRules
from data.packing.pack import pack
from data.packing.plan import Settings
from data.packing.sources import encode_key
from tests.support.packs import BROKEN, DRAWN, HOLDOUT, ODD_NAMES, SMALL, contents, files_of, quietly, rejected, tar_of, tree, write_tree

pytestmark = pytest.mark.slow


def test_what_ends_where(source: Path, tmp_path: Path) -> None:
    [index] = quietly(source, tmp_path / "out")
    assert index.folder == tmp_path / "out" / "train"
    assert index.classes == ("n0000", "n0001", "n0002", "n0003")
    assert [shard.name for shard in index.shards] == [f"in-train-{number:06d}.tar" for number in range(len(index.shards))]
    assert len(index.shards) > 5
    found = contents(index)
    assert found.keys() | {line["key"] for line in rejected(index.folder)} == {encode_key(name.rpartition(".")[0]) for name in tree()}, (
        "every file is packed or rejected"
    )
    assert len(index) == len(found) == 64, "and once"
    for number, (encoded, label) in enumerate(DRAWN):
        assert found[f"n{label:04d}/image%20{number}"] == (encoded, label), "good JPEGs are stored as they are"
    for number in range(len(index)):
        with Image.open(io.BytesIO(found[read_key(index, number)][0])) as image:
            assert (image.format, image.size) == ("JPEG", (index.samples["width"][number], index.samples["height"][number]))
    assert {line["path"] for line in rejected(index.folder)} == BROKEN
    assert all(line["reason"] for line in rejected(index.folder))
    assert main(["verify", str(index.folder)]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["train"], "no work files are left"


def test_dataset_json(source: Path, tmp_path: Path) -> None:
    [index] = quietly(source, tmp_path / "out", Settings(name="in", rules=ImageRules(max_side=200)))
    about = json.loads((index.folder / "dataset.json").read_text())
    assert (about["samples"], about["classes"], about["rejected"]) == (64, 4, 3)
    assert sum(about["changes"].values()) == sum(encoded not in tree().values() for encoded, _ in contents(index).values())
    assert {"png", "webp", "cmyk", "resized"} <= about["changes"].keys()
    made = about["made"]
    assert made["source"] == str(source)
    assert (made["seed"], made["max_side"], made["split"]) == (0, 200, "train")
    assert made["versions"].keys() >= {"pillow"}
    assert about["images"]["bytes"]["max"] == int(index.samples["size"].max())
    assert about["images"]["width"]["median"] == float(np.median(index.samples["width"]))
    # Mean and standard deviation are those of the pixels, which the histograms sample by rows.
    pixels = []
    for encoded, _ in contents(index).values():
        with Image.open(io.BytesIO(encoded)) as image:
            pixels.append(np.asarray(image.convert("RGB")).reshape(-1, 3) / 255)
    assert about["images"]["mean"] == pytest.approx(np.concatenate(pixels).mean(axis=0), abs=0.01)
    assert about["images"]["std"] == pytest.approx(np.concatenate(pixels).std(axis=0), abs=0.01)


def test_the_order_follows_from_seed_and_keys_alone(source: Path, tmp_path: Path) -> None:
    [first] = quietly(source, tmp_path / "a")
    [other] = quietly(source, tmp_path / "b", Settings(name="in", shard_bytes=60_000, seed=1))
    assert list(contents(first)) != list(contents(other))
    # The same images in class tars, and in one tar of those: the same shards.
    tars: dict[str, bytes] = {}
    for of in ("n0000", "n0001", "n0002", "n0003"):
        files = [(name.partition("/")[2], data) for name, data in tree().items() if name.startswith(of)]
        random.Random(0).shuffle(files)
        tars[f"{of}.tar"] = tar_of(files)
    whole = tmp_path / "whole.tar"
    whole.write_bytes(tar_of(dict(reversed(tars.items()))))
    for place in (write_tree(tmp_path / "tars", tars), whole):
        [index] = quietly(place, tmp_path / f"from {place.name}")
        assert index.fingerprint == first.fingerprint
        for shard in first.shards:
            assert (index.folder / shard.name).read_bytes() == (first.folder / shard.name).read_bytes()
        assert {line["path"] for line in rejected(index.folder)} == {
            ("whole.tar/" if place == whole else "") + path.replace("/", ".tar/", 1) for path in BROKEN
        }


def test_packed_shards_are_a_source(source: Path, tmp_path: Path) -> None:
    [first] = quietly(source, tmp_path / "a")
    [again] = pack(first.folder, tmp_path / "b", SMALL)
    assert (list(contents(again).items()), again.classes) == (list(contents(first).items()), first.classes)
    [one] = pack(first.folder / first.shards[0].name, tmp_path / "c", SMALL)
    assert len(one) == first.shards[0].samples
    [smaller] = pack(first.folder, tmp_path / "d", Settings(name="in", shard_bytes=60_000, rules=ImageRules(resize_short=32)))
    assert contents(smaller).keys() == contents(first).keys()
    assert smaller.samples["width"].max() < first.samples["width"].max()
    # By the sources' bytes they would have half of this.
    assert 50_000 < np.mean([shard.bytes for shard in smaller.shards]) < 75_000


def test_shards_of_others(tmp_path: Path) -> None:
    encoded = [encoded for encoded, _ in DRAWN[:8]]

    def shards(name: str, labels: list[Any], *, repeat: bool) -> Path:
        files = {}
        for shard in range(2):
            members: dict[str, bytes] = {}
            for place in range(4):
                number = shard * 4 + place
                stem = f"{place if repeat else number:04d}"
                members |= {f"{stem}.jpg": encoded[number], f"{stem}.json": json.dumps({"label": labels[number]}).encode()}
            files[f"{name}-{shard}.tar"] = tar_of(members)
        return write_tree(tmp_path / name, files)

    names = ["cat", "dog", "cat", "ant", "cat", "cat", "dog", "cat"]
    [index] = pack(shards("names", names, repeat=False), tmp_path / "a", SMALL)
    assert index.classes == ("ant", "cat", "dog")
    assert contents(index) == {f"{number:04d}": (encoded[number], index.classes.index(names[number])) for number in range(8)}
    [pinned] = pack(shards("names", names, repeat=False), tmp_path / "b", Settings(name="in", classes=("dog", "bee", "cat", "ant")))
    assert {label for _, label in contents(pinned).values()} == {0, 2, 3}

    numbered = shards("numbers", [2, 0, 2, 1, 2, 2, 0, 2], repeat=True)
    with pytest.raises(ValueError, match=r"numbers-0\.tar: labels are numbers; give --classes"):
        pack(numbered, tmp_path / "c", SMALL)
    with pytest.raises(ValueError, match=r"numbers-0\.tar: label 2 of 2 classes"):
        pack(numbered, tmp_path / "c", Settings(name="in", classes=("a", "b")))
    [repeated] = pack(numbered, tmp_path / "d", Settings(name="in", classes=("dog", "ant", "cat")))
    assert contents(repeated) == {
        f"numbers-{number // 4}/{number % 4:04d}": (encoded[number], [2, 0, 2, 1, 2, 2, 0, 2][number]) for number in range(8)
    }
    # Numbers mean what the list beside the shards says, whatever the order of the classes that are given.
    (numbered / "classes.json").write_text('["dog", "ant", "cat"]')
    [mapped] = pack(numbered, tmp_path / "e", Settings(name="in", classes=("cat", "dog", "ant")))
    assert [label for _, label in sorted(contents(mapped).values())] == [
        {2: 0, 0: 1, 1: 2}[label] for _, label in sorted(contents(repeated).values())
    ]


def test_samples_of_shards_that_can_not_be_used_are_rejected(tmp_path: Path) -> None:
    members = {"2.jpg": DRAWN[2][0], "0.txt": b"no image", "0.cls": b"0", "1.jpg": DRAWN[1][0], "1.cls": b"1", "3.jpg": b"x", "3.cls": b"1"}
    source = write_tree(tmp_path / "source", {"s.tar": tar_of(members), "classes.json": b'["a", "b"]'})
    [index] = quietly(source, tmp_path / "out")
    assert contents(index) == {"1": (DRAWN[1][0], 1)}
    assert {(line["key"], line["path"], line["reason"][:24]) for line in rejected(index.folder)} == {
        ("0", "s.tar/0.txt", "it has txt, cls, and no "),
        ("2", "s.tar/2.jpg", "it has jpg, and neither "),
        ("3", "s.tar/3.jpg", "not an image of a suppor"),
    }


@pytest.mark.parametrize("packed_in_tar", [False, True])
def test_odd_names_are_read_by_webdataset_and_by_dali(tmp_path: Path, packed_in_tar: bool) -> None:
    of = "__cl\udce4ss 1.5__"  # WebDataset takes names that begin like this for something else
    files = {f"{of}/{name}": DRAWN[number][0] for number, name in enumerate(ODD_NAMES)}
    if packed_in_tar:
        (tmp_path / "root").mkdir()
        (tmp_path / "root" / f"{of}.tar").write_bytes(tar_of({name.partition("/")[2]: data for name, data in files.items()}))
    else:
        write_tree(tmp_path / "root", files | {f"{of}/not \udce9.jpg": b"x"})
    [index] = quietly(tmp_path / "root", tmp_path / "out", Settings(name="in", shard_bytes=40_000))
    assert index.classes == ("__cl\\xe4ss 1.5__",)
    expected = contents(index)
    assert sorted(encoded for encoded, _ in expected.values()) == sorted(files.values())
    if not packed_in_tar:
        assert [(line["key"], line["path"]) for line in rejected(index.folder)] == [
            ("%5F_cl%E4ss%201%2E5__/not%20%E9", "__cl\\xe4ss 1.5__/not \\xe9.jpg")
        ]
    paths = [str(index.folder / shard.name) for shard in index.shards]
    by_webdataset = {sample["__key__"]: (sample["jpg"], int(sample["cls"])) for sample in webdataset.WebDataset(paths, shardshuffle=False)}
    assert by_webdataset == expected

    pipeline = Pipeline(batch_size=len(index), num_threads=1, device_id=None)
    with pipeline:
        outputs: Any = fn.readers.webdataset(
            paths=paths,
            index_paths=[path.replace(".tar", ".idx") for path in paths],
            ext=["jpg", "cls"],
            missing_component_behavior="error",
        )
        pipeline.set_outputs(*outputs, fn.decoders.image(outputs[0]))
    run: Any = pipeline.run()
    by_dali = [(bytes(run[0].at(place)), int(bytes(run[1].at(place)))) for place in range(len(index))]
    assert by_dali == list(expected.values())


def test_holdout(source: Path, packed: Path, tmp_path: Path) -> None:
    train, val = open_index(packed / "train"), open_index(packed / "val")
    assert train.classes == val.classes
    assert contents(train).keys().isdisjoint(contents(val).keys())
    assert len(contents(train)) + len(contents(val)) == 64
    held = [line["key"] for line in rejected(packed / "val")]
    assert sum(label == 0 for _, label in contents(val).values()) == 3
    assert len(val) + len(held) == 12
    assert all(shard.name.startswith("in-val-") for shard in val.shards)

    # What is held out of a class follows from its keys: another seed and other classes beside it change nothing of the sort.
    fewer = write_tree(tmp_path / "fewer", {name: data for name, data in tree().items() if name.startswith(("n0001", "n0002"))})
    _, again = quietly(fewer, tmp_path / "out", HOLDOUT)
    assert contents(again).keys() == {name for name in contents(val) if name.startswith(("n0001", "n0002"))}
    _, other = quietly(fewer, tmp_path / "other", Settings(name="in", seed=2, holdout=3))
    assert contents(other).keys() != contents(again).keys()

    _, share = quietly(source, tmp_path / "share", Settings(name="in", holdout=0.25))
    _, same = quietly(fewer, tmp_path / "same", Settings(name="in", holdout=0.25))
    assert contents(same).keys() == {name for name in contents(share) if name.startswith(("n0001", "n0002"))}
    assert 6 <= len(share) <= 26


def test_too_many_rejected(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "in"
    with pytest.raises(ValueError, match=r"too many images are rejected: \d so far, and --max-rejected allows 0 of 67\. The first: n0003/"):
        quietly(source, out, max_rejected=0)
    done = files_of(out / "train")
    assert done, "what is packed is kept"
    with pytest.raises(ValueError, match="allows 0 of 67"):
        quietly(source, out, max_rejected=0.01)
    assert files_of(out / "train") == done, "it stops before more is packed"
    with pytest.raises(ValueError, match=r"rejected: 3 so far, and --max-rejected allows 2 of 67\. The first: n0003/.*; n0003/.*; n0003/"):
        quietly(source, out, max_rejected=0.04)
    quietly(source, out, max_rejected=3)
    quietly(source, tmp_path / "other" / "in")
    assert files_of(out) == files_of(tmp_path / "other" / "in")
    assert done.items() <= files_of(out / "train").items()


def test_parts_reject_together(source: Path, tmp_path: Path) -> None:
    for part in range(2):
        with contextlib.suppress(ValueError):
            quietly(source, tmp_path / "in", part=(part, 2), max_rejected=2)
    with pytest.raises(ValueError, match=r"--max-rejected allows 2|not packed yet"):
        quietly(source, tmp_path / "in", max_rejected=2, merge_only=True)
    assert not (tmp_path / "in" / "train" / "dataset.json").exists()
    assert len(quietly(source, tmp_path / "in", max_rejected=3)) == 1


def test_nothing_but_rejected(tmp_path: Path) -> None:
    source = write_tree(tmp_path / "source", {"a/1.jpg": b"1", "a/2.jpg": b""})
    with pytest.raises(ValueError, match=r"all 2 images are rejected; the first: \{.*'key': 'a/"):
        quietly(source, tmp_path / "out")


def test_a_shard_of_which_nothing_is_left(tmp_path: Path) -> None:
    source = write_tree(tmp_path / "source", {"a/1.jpg": DRAWN[0][0], "a/2.jpg": b"x" * 5000, "b/3.jpg": DRAWN[1][0]})
    [index] = quietly(source, tmp_path / "out", Settings(name="in", shard_bytes=1000))
    assert (len(index), len(index.shards)) == (2, 2)
    assert main(["verify", str(index.folder)]) == 0


def test_other_settings(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "in"
    quietly(source, out, part=(0, 2))
    before = files_of(out)
    other = Settings(name="in", shard_bytes=60_000, seed=1, rules=ImageRules(resize_short=32))
    with pytest.raises(
        ValueError, match=r"train\.packing was made with other settings: seed 0 instead of 1; resize_short None instead of 32"
    ):
        quietly(source, out, other)
    assert files_of(out) == before
    quietly(source, out)
    finished = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    with pytest.raises(ValueError, match=r"train was made with other settings: seed 0 instead of 1.*or another OUT, or remove"):
        quietly(source, out, other)
    with pytest.raises(ValueError, match="classes None instead of 4, xxh3_64"):
        quietly(source, out, Settings(name="in", shard_bytes=60_000, classes=("n0000", "n0001", "n0002", "n0003")))
    [index] = quietly(source, out)
    assert len(index) == 64
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == finished, "packing again changes nothing"


def test_versions_that_differ_matter_while_packing(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "in"
    quietly(source, out, part=(0, 2))
    with monkeypatch.context() as patch:
        patch.setattr(data.packing.pack, "version", lambda name: "0.0")
        with pytest.raises(ValueError, match=r"versions \{'pillow'.* instead of \{'pillow': '0\.0'"):
            quietly(source, out)
    quietly(source, out)
    monkeypatch.setattr(data.packing.pack, "version", lambda name: "0.0")
    assert len(quietly(source, out)) == 1


def test_another_split_has_the_classes_of_train(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "in"
    val = write_tree(tmp_path / "val", {"n0002/1.jpg": DRAWN[0][0], "n0003/2.jpg": DRAWN[1][0]})
    settings = Settings(name="in", split="val")
    quietly(source, out, part=(0, 2))
    with pytest.raises(ValueError, match="train, whose classes this split takes, is not packed yet"):
        pack(val, out, settings)
    quietly(source, out)
    [index] = pack(val, out, settings)
    assert index.folder == out / "val"
    assert index.classes == open_index(out / "train").classes
    assert {label for _, label in contents(index).values()} == {2, 3}
    unknown = write_tree(tmp_path / "unknown", {"n9/1.jpg": DRAWN[0][0]})
    with pytest.raises(ValueError, match=r"unknown/n9: class n9 is not among the 4 given classes"):
        pack(unknown, out, Settings(name="in", split="test"))
    [alone] = pack(val, tmp_path / "alone", settings)
    assert alone.classes == ("n0002", "n0003")


def test_what_can_not_work(source: Path, tmp_path: Path) -> None:
    write_tree(tmp_path / "full" / "train", {"precious": b""})
    for out, settings, message in (
        (tmp_path / "full", SMALL, "is not empty"),
        (source / "out", SMALL, "lies inside"),
        (tmp_path / "a", Settings(name="in", split="val", holdout=3), "--holdout writes the split val"),
        (tmp_path / "b", Settings(name="in", holdout=1e-9), "--holdout 1e-09 of 67 images in 4 classes holds out no image"),
    ):
        with pytest.raises(ValueError, match=message):
            pack(source, out, settings)
    empty = write_tree(tmp_path / "empty", {"a.tar": tar_of({})})
    with pytest.raises(ValueError, match="class tars without a file in them"):
        pack(empty, tmp_path / "c", SMALL)
    twice = write_tree(tmp_path / "twice", {"s.tar": tar_of([(f"{stem}.{kind}", b"0") for stem in "aba" for kind in ("jpg", "cls")])})
    with pytest.raises(ValueError, match=r"s\.tar/a\.jpg and s\.tar/a\.jpg have the same key, s/a"):
        pack(twice, tmp_path / "d", Settings(name="in", classes=("x",)))
