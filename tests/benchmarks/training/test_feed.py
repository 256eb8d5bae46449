"""Steps fed by the data loader, beside steps on one batch."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.training import feed
from benchmarks.training.__main__ import main
from data.loader.loaders import TrainLoader
from data.loader.pipeline import Batch
from tests.support.jobs import SMALL
from tests.support.ranks import run_on_ranks

pytestmark = pytest.mark.slow

WAIT_S = 0.8


class Slow(TrainLoader):
    """A loader that delays each batch."""

    def __iter__(self) -> Iterator[Batch]:
        for batch in super().__iter__():
            time.sleep(WAIT_S)
            yield batch


def slowly_fed(arguments: list[str]) -> int:
    """The command, in a process that is a job's only rank."""
    feed.TrainLoader = Slow  # type: ignore[misc]
    return main(arguments)


def test_slow_loader_shows(drawn: Path, tmp_path: Path) -> None:
    config = tmp_path / "small.yaml"
    config.write_text(SMALL)
    settings = [f"data.train={drawn / 'train'}", "engine.micro_batch=2", "engine.precision=fp32", "data.mixup=0.8", "data.lanes=2"]
    options = ["--rounds", "1", "--steps", "3", "--out", str(tmp_path), "--feed", str(config), *settings]
    assert run_on_ranks(1, slowly_fed, arguments=["--cpu", *options]) == [0]
    (result,) = json.loads((tmp_path / "feed_cpu.json").read_text())
    fed, repeated = result["rows"]
    fed_s, repeated_s = (fed["micro_batch"] / row["images_per_s"][0] for row in (fed, repeated))
    assert fed["to_repeated"] == pytest.approx(repeated_s / fed_s, rel=1e-2)
    assert fed_s > WAIT_S  # these steps include the wait
    assert repeated_s < fed_s - WAIT_S / 2


def test_class_count_mismatch_is_an_error(drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "small.yaml"
    config.write_text(SMALL)
    arguments = ["--cpu", "--feed", str(config), f"data.train={drawn / 'train'}", "model.classes=7"]
    assert main(arguments) == 2
    assert "has 10 classes, but model.classes=7; make them agree" in capsys.readouterr().err
