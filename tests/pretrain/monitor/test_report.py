"""The line of the log and the record of an interval."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from pretrain.monitor.interval import Steps
from pretrain.monitor.report import Reporter
from pretrain.monitor.stragglers import SlowestRank
from pretrain.run.log import RunLog
from tests.support import REPOSITORY


def report(folder: Path, *, skipped: tuple[bool, bool] = (False, False), bad_images: int = 0, launch_bound: float | None = 0.75) -> dict:
    """Reports steps 3 and 4 of 10, of two ranks; returns the record."""
    steps = Steps(
        numbers=[2, 3],
        losses=np.array([[2.0, 1.0], [3.0, 2.0]], np.float32),
        grad_norms=np.array([5.0, 7.0], np.float32),
        skipped=np.array(skipped),
        launch_bound=launch_bound,
        seconds=4.0,
        data_seconds=1.0,
        has_bad_images=False,
    )
    reporter = Reporter(
        RunLog(folder / "metrics.jsonl"), total=10, steps_per_epoch=5, global_batch=64, ranks=2, device=torch.device("cpu"),
        image_flops=1e9, peak_flops=1.6e11, has_graphs=False,
    )  # fmt: skip
    slowest = SlowestRank(rank=1, host="node2", seconds=1.5, median=1.0)
    reporter.report(4, steps, slowest, lr=0.004, bad_images=bad_images, is_evaluated=True)
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])


def test_record_has_means_over_ranks_and_steps(tmp_path: Path) -> None:
    record = report(tmp_path)
    # 2 steps of 64 images in 4 s; 16 images/s a rank of 1 GFLOP each, of 160 GFLOP/s.
    expected = {"loss": 2.0, "grad_norm": 6.0, "images_per_s": 32.0, "data_wait": 0.25, "left_s": 12.0, "mfu": 0.1, "launch_bound": 0.75}
    assert {key: record[key] for key in expected} == pytest.approx(expected)
    assert (record["kind"], record["step"], record["epoch"], record["lr"], record["total"]) == ("train", 4, 0.8, 0.004, 10)
    assert (record["slowest_rank"], record["slowest_host"], record["slowest_ratio"]) == (1, "node2", 1.5)
    assert not {"skipped", "bad_images"} & record.keys()


def test_skipped_steps_are_counted_and_excluded_from_the_means(tmp_path: Path) -> None:
    record = report(tmp_path, skipped=(True, False), bad_images=3)
    assert (record["loss"], record["grad_norm"], record["skipped"], record["bad_images"]) == (1.5, 7.0, 1, 3)


def test_values_that_are_not_finite_are_missing_from_the_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = report(tmp_path, skipped=(True, True))
    assert "loss" not in record
    assert all(math.isfinite(value) for value in record.values() if isinstance(value, float))
    assert "loss nan" in capsys.readouterr().out


def test_line_is_the_one_that_the_documentation_explains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report(tmp_path)
    line = capsys.readouterr().out.strip()
    template = next(line for line in (REPOSITORY / "docs" / "running.md").read_text().splitlines() if line.startswith("HH:MM:SS step"))
    parts, documented = line.split("  "), template.split("  ")
    assert len(parts) == len(documented)
    for part, words in zip(parts, documented, strict=True):
        pattern = re.sub(r"\b(HH:MM:SS|N|E|L|R|G|P|TOTAL|TIME|HOST|SETTING)\b", "@", words)
        assert re.fullmatch(re.escape(pattern).replace("@", r"\S.*?"), part), (part, words)
