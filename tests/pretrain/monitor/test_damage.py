"""Damaged data in jobs of several ranks: all ranks continue, or all end."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from data.dataset.index import open_index
from data.loader.order import SampleOrder
from pretrain import checkpoint
from tests.support import jobs
from tests.support.damage import damaged_copy
from tests.support.ranks import run_on_ranks

pytestmark = pytest.mark.slow  # several processes per test

# ---------------------------------------------------------------- sharing between ranks


def report(folder: str, out: str, found: list[list[int]], max_bad: float) -> dict[str, Any]:
    """Reports the bad samples that this rank has found; returns all that it knows then."""
    from data.loader.quarantine import Quarantine
    from pretrain.monitor.damage import report_bad_images
    from pretrain.run.log import RunLog

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    quarantine = Quarantine(open_index(folder), max_bad, Path(out, "quarantine.jsonl"))
    for sample in found[rank]:
        quarantine.add(sample, "cut")
    error = None
    try:
        report_bad_images(quarantine, 50, RunLog(Path(out, "metrics.jsonl") if rank == 0 else None))
    except ValueError as raised:
        error = str(raised)
    dist.destroy_process_group()
    return {"known": quarantine.count, "replacement": quarantine.find_replacement(0), "error": error}


@pytest.mark.parametrize(("max_bad", "too_many"), [(0.025, True), (0.04, False)])
def test_all_ranks_know_the_bad_images_of_each(drawn: Path, tmp_path: Path, max_bad: float, too_many: bool) -> None:
    """Each rank has found two, which 3 of 120 allow; together there are four."""
    results = run_on_ranks(2, report, folder=str(drawn / "train"), out=str(tmp_path), found=[[0, 1], [2, 1, 119]], max_bad=max_bad)
    assert results[0] == results[1]
    assert (results[0]["known"], results[0]["replacement"]) == (4, 3)
    assert (results[0]["error"] is not None) == too_many
    entries = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert [(entry["sample"], entry["replaced_by"], entry["step"]) for entry in entries][:3] == [(0, 3, 50), (1, 3, 50), (2, 3, 50)]
    assert len(entries) == 4


def check(folders: list[str], checksums: bool) -> str | None:
    from pretrain.monitor.damage import check_shards

    dist.init_process_group("gloo")
    try:
        check_shards([open_index(folder) for folder in folders], checksums=checksums)
    except ValueError as error:
        return str(error)
    finally:
        dist.destroy_process_group()
    return None


def test_a_damaged_shard_is_named_at_the_start_by_all_ranks(drawn: Path, tmp_path: Path) -> None:
    index = damaged_copy(open_index(drawn / "train"), tmp_path / "train", {110: "no tables"})
    shard = index.shards[index.shard_of(110)]
    folders = [str(drawn / "val"), str(index.folder)]
    assert run_on_ranks(2, check, folders=folders, checksums=False) == [None, None]
    errors = run_on_ranks(2, check, folders=folders, checksums=True)
    assert errors[0] == errors[1]
    assert errors[0].startswith(f"{index.folder}: {shard.name} has the checksum ")
    assert errors[0].endswith("Copy these shards again from the original dataset")
    (index.folder / shard.name).write_bytes(bytes(shard.bytes))
    errors = run_on_ranks(2, check, folders=folders, checksums=False)
    assert errors[0] == errors[1]
    assert errors[0].startswith(f"{index.folder}: {shard.name} has no image where the index says (")


def is_first(messages: list[str]) -> bool:
    from pretrain.monitor.damage import is_first_to_report

    dist.init_process_group("gloo")
    return is_first_to_report(messages[dist.get_rank()])


def test_each_error_is_reported_once() -> None:
    assert sum(run_on_ranks(3, is_first, messages=["the same"] * 3)) == 1
    assert run_on_ranks(3, is_first, messages=["one", "another", "a third"]) == [True] * 3


# ---------------------------------------------------------------- whole jobs


def damaged_datasets(drawn: Path, folder: Path, train: dict[int, str], val: dict[int, str]) -> Path:
    folder.mkdir()
    damaged_copy(open_index(drawn / "train"), folder / "train", train)
    damaged_copy(open_index(drawn / "val"), folder / "val", val)
    return folder


@pytest.mark.long
def test_a_job_with_bad_images_resumes_bit_identical(drawn: Path, tmp_path: Path) -> None:
    train = {3: "cut", 4: "zeros", 60: "no tables", 61: "no tables", 90: "another size", 119: "no tables"}
    data = damaged_datasets(drawn, tmp_path / "data", train, {2: "cut", 5: "no tables"})
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    options = ("steps=10", "data.max_bad=0.1", "run.keep=20", "run.save_every=2")
    output = jobs.run(whole, data, *options, ranks=2)
    for sample in train:
        assert len(re.findall(rf"bad image: sample {sample} \(key {sample:09d}, shard train-\d+\.tar\): ", output)) == 1
    entries = [json.loads(line) for line in (whole / "run" / "quarantine.jsonl").read_text().splitlines()]
    fingerprints = [open_index(data / split).fingerprint for split in ("train", "val")]
    assert sorted(entry["sample"] for entry in entries if entry["dataset"] == fingerprints[0]) == sorted(train)
    assert sorted(entry["sample"] for entry in entries if entry["dataset"] == fingerprints[1]) == [2, 5]
    assert [record.get("bad_images") for record in jobs.metrics(whole, "train")][-1] == len(train)
    for record in jobs.metrics(whole, "evaluation"):
        assert [(record[kind]["images"], record[kind]["skipped"]) for kind in ("weight", "ema")] == [(18, 2)] * 2

    shutil.copytree(whole, resumed)
    for later in checkpoint.list_checkpoints(resumed / "run" / "checkpoints"):
        if later.name > "step-000000004":
            shutil.rmtree(later)
    (resumed / "run" / "metrics.jsonl").unlink()
    output = jobs.run(resumed, data, *options, ranks=2)
    assert "resumed at step 4 of 10" in output
    assert "bad image:" not in output  # all known, and replaced at once
    assert jobs.differing(jobs.final_state(whole, 10), jobs.final_state(resumed, 10)) == []
    losses = {record["step"]: record["loss"] for record in jobs.metrics(whole, "train")}
    assert {record["step"]: record["loss"] for record in jobs.metrics(resumed, "train")} == {step: losses[step] for step in range(5, 11)}


def test_a_job_with_too_many_bad_images_ends_with_one_error(drawn: Path, tmp_path: Path) -> None:
    index = open_index(drawn / "train")
    order = SampleOrder(index.shard_start, seed=5, global_batch=16, lanes=4, window=16)
    of_rank_1 = order.batch(0, 0)[8:12].tolist()
    data = damaged_datasets(drawn, tmp_path / "data", dict.fromkeys(of_rank_1, "no tables"), {})
    output = jobs.run(tmp_path / "job", data, "steps=10", "data.max_bad=0.02", ranks=2, code=2)
    message = r"error on rank 1: .*/train: 3 of 120 images can't be used, and data\.max_bad=0\.02 allows 2\. The last were sample "
    assert len(re.findall(message, output)) == 1
    assert output.count("images can't be used") == 1
    assert "DALI can't decode it" in output
    assert "python -m data verify --deep" in output
