import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from benchmarks.loader.__main__ import main
from benchmarks.loader.rates import (
    OWN,
    OWN_DECODING,
    TIMM,
    TIMM_DECODING,
    TIMM_NAMES,
    Rates,
    ShardImages,
    Way,
    best,
    counts,
    cpu_time,
    decoded_by_dali,
    measure,
    own_way,
    ratios,
    timed,
    timm_batches,
    timm_recipe,
)
from data.dataset.index import Index
from data.settings import DataConfig

CPU = torch.device("cpu")
# Decides nothing of what is done to an image of a training batch before mixing.
NO_AUGMENTATION = {
    "train",
    "val",
    "val_except",
    "cache",
    "cache_gb",
    "image_size",
    "mixup",
    "cutmix",
    "mix_switch",
    "eval_resize",
    "eval_crop",
}
NO_AUGMENTATION |= {"lanes", "window", "decode_threads", "read_threads", "hw_decoder_load", "repeats", "check", "max_bad"}


# ---------------------------------------------------------------- the loaders do the same


def test_all_augmentation_reaches_timm() -> None:
    """A new setting of the data has to be one that timm is told, or one of those above."""
    assert {f.name for f in fields(DataConfig)} <= TIMM_NAMES.keys() | NO_AUGMENTATION
    changed = replace(DataConfig(), crop_area=(0.3, 0.9), crop_ratio=(0.5, 2.0), flip=0.1, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    recipe = timm_recipe(changed)
    expected = {"scale": (0.3, 0.9), "ratio": (0.5, 2.0), "hflip": 0.1, "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    assert expected.items() <= recipe.items()
    assert recipe["interpolation"] == "bicubic"
    assert recipe["color_jitter"] is None


@pytest.mark.parametrize("prefetcher", [False, True])
def test_both_loaders_give_the_same_pictures(dataset: Index, prefetcher: bool) -> None:
    """Where nothing is left to chance: the whole image, never flipped."""
    settings = DataConfig(image_size=48, crop_area=(1, 1), crop_ratio=(0.01, 100), flip=0, mixup=0, cutmix=0, lanes=5)
    with own_way(dataset, 0, settings, 50, CPU, {"decode_threads": 1, "read_threads": 1}).batches(3) as batches:
        own = [(batch.images, batch.labels) for batch in batches]
    with timm_batches(dataset, settings, 50, CPU, 0, prefetcher, 3) as batches:
        others = list(batches)
    (own_images, own_labels), (images, labels) = (map(torch.cat, zip(*found, strict=True)) for found in (own, others))
    assert own_images.shape == images.shape == (150, 3, 48, 48)
    distance = torch.cdist(own_images.flatten(1), images.flatten(1), p=1) / images[0].numel()
    nearest = distance.argmin(dim=1)
    assert sorted(nearest.tolist()) == list(range(150)), "each of one loader's pictures is one of the other's"
    assert (own_labels == labels[nearest]).all()
    assert distance.min(dim=1).values.quantile(0.9) < 0.06  # chance may find a crop of the same shape that is a row smaller
    assert distance.median() > 0.5  # control: what different pictures are apart


def test_chance_has_the_same_size(dataset: Index) -> None:
    """Crops and flips of both, by how much the pictures of one image differ."""
    settings = DataConfig(image_size=24, mixup=0, cutmix=0, crop_area=(0.2, 0.6))
    spread = []
    one = replace(dataset, samples=dataset.samples[:1], shard_start=np.array([0, 1]), shards=dataset.shards[:1])
    with timm_batches(one, settings, 300, CPU, 0, False, 1) as batches:
        spread.append(float(next(batches)[0].std(dim=0).mean()))
    with own_way(one, 0, settings, 1, CPU, {}).batches(300) as batches:
        spread.append(float(torch.cat([batch.images for batch in batches]).std(dim=0).mean()))
    assert spread[0] == pytest.approx(spread[1], rel=0.1)
    with own_way(one, 0, replace(settings, crop_area=(0.9, 1.0), flip=0), 1, CPU, {}).batches(300) as batches:
        less = torch.cat([batch.images for batch in batches]).std(dim=0).mean()
    assert less < 0.8 * spread[1]  # control


def test_images_by_position(dataset: Index) -> None:
    images = ShardImages(dataset, 400)
    assert len(images) == 400
    for number in (3, 149, 153):
        image, label = images[number]
        row = dataset.samples[number % 150]
        assert image.size == (row["width"], row["height"])
        assert image.mode == "RGB"
        assert label == row["label"]


# ---------------------------------------------------------------- measuring


@contextmanager
def sleeping(slow: int, count: int) -> Iterator[Iterator[int]]:
    """Batches that take 10 ms, the first `slow` half a second."""
    yield (time.sleep(0.5 if number < slow else 0.01) or number for number in range(count))  # type: ignore[func-returns-value]


def test_what_is_made_ahead_is_not_timed() -> None:
    warm = Way("a", {}, lambda count: sleeping(3, count), ahead=3)
    cold = Way("b", {}, lambda count: sleeping(3, count), ahead=2)
    assert 0.1 <= timed(warm, 10, CPU)[0] < 0.5
    assert timed(cold, 10, CPU)[0] >= 0.19


def test_cpu_time_is_that_of_the_children_too() -> None:
    busy = "import time\nprint(1, flush=True)\nend = time.process_time() + 0.5\nwhile time.process_time() < end: pass\n"
    with subprocess.Popen(
        [sys.executable, "-c", f"{busy}print(2, flush=True)\ninput()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        before = cpu_time()
        child.stdout.readline()
        assert 0.4 < cpu_time() - before < 0.7
        before = cpu_time()
        time.sleep(0.2)
        assert cpu_time() - before < 0.1  # nobody works
        child.communicate("\n")


def test_ways_take_turns_and_count_whole_turns() -> None:
    opened = []

    def way(name: str, at_a_time: int) -> Way:
        def batches(count: int) -> Any:
            opened.append((name, count))
            return sleeping(0, count)

        return Way(name, {}, batches, at_a_time, ahead=1)

    found = measure([way("a", 1), way("b", 4), way("c", 1)], images=50, batch=10, device=CPU, rounds=3)
    assert [name for name, _ in opened] == ["a", "b", "c", "c", "b", "a", "a", "b", "c"]
    assert {name: count - 2 for name, count in opened} == {"a": 5, "b": 8, "c": 5}
    for rates in found:
        assert len(rates.a_second) == len(rates.a_cpu_second) == 3
        assert all(200 < rate < 1001 for rate in rates.a_second)  # 10 images in 10 ms
        assert all(rate > 2 * 1000 for rate in rates.a_cpu_second)  # sleeping takes no CPU time


def test_best_and_ratios() -> None:
    def rates(name: str, a_second: list[float], busy: float) -> Rates:
        return Rates(Way(name, {}, lambda count: sleeping(0, count)), a_second, [busy * rate for rate in a_second])

    slow, fast = rates(OWN, [100, 900, 100], 1), rates(OWN, [200, 400, 600], 2)
    others = [rates(TIMM, [100, 100, 200], 1), rates(OWN_DECODING, [400, 800, 600], 2), rates(TIMM_DECODING, [200, 200, 400], 1)]
    found = [slow, fast, *others]
    assert best(found, OWN) is fast, "by the median"
    assert ratios(found) == {
        f"{OWN} to {TIMM}": {"rate": 3, "rate_for_each_busy_core": 6},  # of 2, 4 and 3
        f"{OWN} to {OWN_DECODING}": {"rate": 0.5, "rate_for_each_busy_core": 0.5},  # of 1/2, 1/2 and 1
        f"{TIMM} to {TIMM_DECODING}": {"rate": 0.5, "rate_for_each_busy_core": 0.5},
    }
    assert ratios([fast, others[1]]).keys() == {f"{OWN} to {OWN_DECODING}"}  # as on a GPU


def test_counts() -> None:
    assert [counts(most) for most in (1, 2, 6, 16)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8, 16]]


def test_decoding_alone_decodes(dataset: Index) -> None:
    with decoded_by_dali(dataset, 10, CPU, 1, {}, 2) as batches:
        shapes = [tuple(np.asarray(image).shape) for (output,) in batches for image in output]
    rows = dataset.samples[:20]
    assert shapes == [(h, w, 3) for h, w in zip(rows["height"].tolist(), rows["width"].tolist(), strict=True)]


# ---------------------------------------------------------------- the command


@pytest.mark.slow
def test_against_timm(dataset: Index, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    before = set(psutil.Process().children(recursive=True))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    job = tmp_path / "job.yaml"
    job.write_text(f"global_batch: 20\nengine: {{device: cpu}}\ndata: {{train: {dataset.folder}, image_size: 32}}\n")
    options = ["--against", "timm", "--images", "40", "--batch", "10", "--rounds", "2", "--out", str(tmp_path)]
    assert main([str(job), *options, "data.flip=0.4"]) == 0
    (result,) = json.loads((tmp_path / "loader.json").read_text())
    assert result["command"] == f"python -m benchmarks.loader {job} --against timm --images 40 --batch 10 --rounds 2 data.flip=0.4"
    assert result["device"] == "cpu"
    assert {"torch", "timm", "nvidia-dali-cuda130"} <= result["versions"].keys()
    tried = [{name: value for name, value in row.items() if not name.startswith("images")} for row in result["rows"]]
    assert [row for row in tried if row["way"] == OWN] == [{"way": OWN, "decode_threads": 1, "read_threads": count} for count in (1, 2, 4)]
    assert [row for row in tried if row["way"] == TIMM] == [
        {"way": TIMM, "workers": count, "prefetcher": prefetcher} for prefetcher, count in product(("off", "on"), (0, 1, 2))
    ]
    assert [row["workers"] for row in tried if row["way"] == TIMM_DECODING] == [0, 1, 2]
    assert [row["threads"] for row in tried if row["way"] == OWN_DECODING] == [1]
    assert all(rate > 0 for row in result["rows"] for rate in row["images_a_second"] + row["images_a_cpu_second"])
    assert f"{OWN} to {TIMM}" in capsys.readouterr().out
    assert set(psutil.Process().children(recursive=True)) <= before, "no worker is left"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{job}", "--gpu-sweep", "engine.device=cpu"], "--gpu-sweep needs a GPU"),
        (["{job}", "--against", "timm", "data.flp=1"], "did you mean data.flip"),
    ],
)
def test_what_cannot_be_measured(
    dataset: Index, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(f"global_batch: 20\ndata: {{train: {dataset.folder}}}\n")
    assert main([*(argument.format(job=job) for argument in arguments)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [["--against", "timm"], ["job.yaml"], ["job.yaml", "--gpu-sweep", "--against", "timm"], ["job.yaml", "--against", "webdataset"]],
)
def test_one_thing_is_measured(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
