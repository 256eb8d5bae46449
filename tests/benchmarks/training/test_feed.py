"""Steps that the real loader feeds, beside steps on one batch."""

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
    """A loader that does not keep up: each batch comes so much late."""

    def __iter__(self) -> Iterator[Batch]:
        for batch in super().__iter__():
            time.sleep(WAIT_S)
            yield batch


def slowly_fed(arguments: list[str]) -> int:
    """The command, in a process that is a job's only rank."""
    feed.TrainLoader = Slow  # type: ignore[misc]
    return main(arguments)


def test_a_loader_that_does_not_keep_up_shows(drawn: Path, tmp_path: Path) -> None:
    config = tmp_path / "small.yaml"
    config.write_text(SMALL)
    settings = [f"data.train={drawn / 'train'}", "engine.micro_batch=2", "engine.precision=fp32", "data.mixup=0.8", "data.lanes=2"]
    options = ["--rounds", "1", "--steps", "3", "--out", str(tmp_path), "--feed", str(config), *settings]
    assert run_on_ranks(1, slowly_fed, arguments=["--cpu", *options]) == [0]
    (found,) = json.loads((tmp_path / "feed_cpu.json").read_text())
    assert found["micro_batch"] == 2
    fed_s, repeated_s = (2 / found[f"{kind}_images_per_s"]["median"] for kind in feed.KINDS)
    assert found["fed_to_repeated"] == pytest.approx(repeated_s / fed_s, rel=1e-2)
    assert fed_s > WAIT_S  # the wait is in these steps
    assert repeated_s < fed_s - WAIT_S / 2  # and not in those


def test_class_count_mismatch_is_an_error(drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "small.yaml"
    config.write_text(SMALL)
    arguments = ["--cpu", "--feed", str(config), f"data.train={drawn / 'train'}", "model.classes=7"]
    assert main(arguments) == 2
    assert "has 10 classes, but model.classes=7; make them agree" in capsys.readouterr().err
