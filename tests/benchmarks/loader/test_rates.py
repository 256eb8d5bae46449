"""The benchmark of data loaders compares loaders that do the same, and times them rightly."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import fields, replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks.loader.__main__ import main
from benchmarks.loader.rates import (
    DECODING,
    OURS,
    TIMM,
    TIMM_NAMES,
    Case,
    Rates,
    compute_ratios,
    find_best,
    make_case,
    time_case,
    timm_batches,
    to_timm_arguments,
)
from data.dataset.index import Index
from data.settings import DataConfig

CPU = torch.device("cpu")
# Fields of DataConfig that change no image of a training batch before mixing.
NO_AUGMENTATION = {
    "train", "val", "val_except", "cache", "cache_gb", "image_size", "mixup", "cutmix", "mix_switch", "eval_resize", "eval_crop",
    "lanes", "window", "decode_threads", "read_threads", "hw_decoder_load", "repeats", "check", "max_bad",
}  # fmt: skip


# ---------------------------------------------------------------- the loaders do the same


def test_every_setting_of_augmentation_reaches_timm() -> None:
    """A new field of DataConfig must be passed to timm or added to NO_AUGMENTATION."""
    assert {f.name for f in fields(DataConfig)} <= TIMM_NAMES.keys() | NO_AUGMENTATION
    changed = replace(DataConfig(), crop_area=(0.3, 0.9), crop_ratio=(0.5, 2.0), flip=0.1, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    recipe = to_timm_arguments(changed)
    expected = {"scale": (0.3, 0.9), "ratio": (0.5, 2.0), "hflip": 0.1, "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    assert expected.items() <= recipe.items()
    assert recipe["interpolation"] == "bicubic"
    assert recipe["color_jitter"] is None


@pytest.mark.parametrize("prefetcher", [False, True])
def test_both_loaders_make_the_same_images(dataset: Index, prefetcher: bool) -> None:
    """Without random choices: the whole image, never flipped."""
    settings = DataConfig(image_size=48, crop_area=(1, 1), crop_ratio=(0.01, 100), flip=0, mixup=0, cutmix=0, lanes=5)
    with make_case(dataset, 0, settings, 50, CPU, {"decode_threads": 1, "read_threads": 1}).batches(3) as batches:
        own = [(batch.images, batch.labels) for batch in batches]
    with timm_batches(dataset, settings, 50, CPU, 0, prefetcher, 3) as batches:
        others = list(batches)
    (own_images, own_labels), (images, labels) = (map(torch.cat, zip(*found, strict=True)) for found in (own, others))
    assert own_images.shape == images.shape == (150, 3, 48, 48)
    distance = torch.cdist(own_images.flatten(1), images.flatten(1), p=1) / images[0].numel()
    nearest = distance.argmin(dim=1)
    assert sorted(nearest.tolist()) == list(range(150)), "each image of one loader is one of the other's"
    assert (own_labels == labels[nearest]).all()
    assert distance.min(dim=1).values.quantile(0.9) < 0.06  # a random crop of the same shape may be a row smaller
    assert distance.median() > 0.5  # control: the distance of different images


def test_random_crops_and_flips_of_both_loaders_vary_alike(dataset: Index) -> None:
    """Measured by the spread of the crops of one image."""
    settings = DataConfig(image_size=24, mixup=0, cutmix=0, crop_area=(0.2, 0.6))
    spread = []
    one = replace(dataset, samples=dataset.samples[:1], shard_start=np.array([0, 1]), shards=dataset.shards[:1])
    with timm_batches(one, settings, 300, CPU, 0, False, 1) as batches:
        spread.append(float(next(batches)[0].std(dim=0).mean()))
    with make_case(one, 0, settings, 1, CPU, {}).batches(300) as batches:
        spread.append(float(torch.cat([batch.images for batch in batches]).std(dim=0).mean()))
    assert spread[0] == pytest.approx(spread[1], rel=0.1)
    with make_case(one, 0, replace(settings, crop_area=(0.9, 1.0), flip=0), 1, CPU, {}).batches(300) as batches:
        less = torch.cat([batch.images for batch in batches]).std(dim=0).mean()
    assert less < 0.8 * spread[1]  # control


# ---------------------------------------------------------------- measuring


class Clock:
    """A clock that batches advance: the first `slow` by 500 ms each, the others by 10 ms."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr("benchmarks.harness.time", SimpleNamespace(perf_counter=lambda: self.now))

    @contextmanager
    def batches(self, slow: int, count: int) -> Iterator[Iterator[int]]:
        def make(number: int) -> int:
            self.now += 0.5 if number < slow else 0.01
            return number

        yield map(make, range(count))


def test_prefetched_batches_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    for prefetched, expected in ((3, 10 * 0.01), (2, 0.5 + 9 * 0.01)):
        case = Case("a", {}, lambda count: clock.batches(3, count), prefetched=prefetched)
        assert time_case(case, 10, CPU)[0] == pytest.approx(expected)


def test_ratios_compare_the_best_settings() -> None:
    def rates(name: str, per_s: list[float], busy: float) -> Rates:
        return Rates(Case(name, {}, lambda count: nullcontext(iter(()))), per_s, [busy * rate for rate in per_s])

    slow, fast = rates(OURS, [100, 900, 100], 1), rates(OURS, [200, 400, 600], 2)
    others = [rates(TIMM, [100, 100, 200], 1), rates(DECODING, [400, 800, 600], 2)]
    measured = [slow, fast, *others]
    assert find_best(measured, OURS) is fast, "by the median"
    assert compute_ratios(measured) == [
        {"ratio": f"{OURS} to {TIMM}", "images_per_s": 3, "images_per_cpu_s": 6},  # of 2, 4 and 3
        {"ratio": f"{OURS} to {DECODING}", "images_per_s": 0.5, "images_per_cpu_s": 0.5},  # of 1/2, 1/2 and 1
    ]
    assert [row["ratio"] for row in compute_ratios([fast, others[1]])] == [f"{OURS} to {DECODING}"]  # as on a GPU


# ---------------------------------------------------------------- the command


@pytest.mark.slow
def test_command_compares_with_timm(
    dataset: Index, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    job = tmp_path / "job.yaml"
    job.write_text(f"global_batch: 20\nengine: {{device: cpu}}\ndata: {{train: {dataset.folder}, image_size: 32}}\n")
    options = ["--against", "timm", "--images", "40", "--batch", "10", "--rounds", "2", "--out", str(tmp_path)]
    assert main([str(job), *options, "data.flip=0.4"]) == 0
    (result,) = json.loads((tmp_path / "loader.json").read_text())
    assert result["command"] == f"python -m benchmarks.loader --against timm --images 40 --batch 10 --rounds 2 {job} data.flip=0.4"
    assert result["device"] == "cpu"
    assert {"torch", "timm", "nvidia-dali-cuda130"} <= result["versions"].keys()
    tried = [{name: value for name, value in row.items() if not name.startswith("images")} for row in result["rows"]]
    assert [row for row in tried if row["case"] == OURS] == [
        {"case": OURS, "decode_threads": 1, "read_threads": count} for count in (1, 2, 4)
    ]
    assert [row for row in tried if row["case"] == TIMM] == [
        {"case": TIMM, "workers": count, "prefetcher": prefetcher} for prefetcher, count in product(("off", "on"), (0, 1, 2))
    ]
    assert [row["threads"] for row in tried if row["case"] == DECODING] == [1]
    assert all(rate > 0 for row in result["rows"] for rate in row["images_per_s"] + row["images_per_cpu_s"])
    assert f"{OURS} to {TIMM}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{job}", "--gpu-sweep", "engine.device=cpu"], "--gpu-sweep needs a GPU"),
        (["{job}", "--against", "timm", "data.flp=1"], "did you mean data.flip"),
    ],
)
def test_user_errors_end_the_command(
    dataset: Index, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(f"global_batch: 20\ndata: {{train: {dataset.folder}}}\n")
    assert main([*(argument.format(job=job) for argument in arguments)]) == 2
    assert message in capsys.readouterr().err
