"""What a person and a program see of a run."""

import errno
import json
import os
from pathlib import Path

import pytest

from pretrain.run.metrics import RunLog, duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "00:00"), (59.4, "00:59"), (59.6, "01:00"), (3599, "59:59"), (3600, "01:00:00"), (86399.7, "1d 00:00:00"),
        (2 * 86400 + 3 * 3600 + 4 * 60 + 5, "2d 03:04:05"), (86400, "1d 00:00:00"), (90 * 86400 + 61, "90d 00:01:01"),
    ],
)  # fmt: skip
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_one_rank_has_a_voice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    for log in (RunLog(path), RunLog(None), RunLog(path)):  # the third: the job started again
        log.line("hello")
        log.record("train", step=3)
        log.start_progress(0, 5)
        log.advance()
        log.close()
    assert [line.split(" ", 1)[1] for line in capsys.readouterr().out.splitlines()] == ["hello", "hello"]
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(record["kind"], record["step"]) for record in records] == [("train", 3), ("train", 3)]
    assert records[0]["time"] <= records[1]["time"]


def test_on_a_full_disk_a_record_is_lost_and_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics.jsonl"
    log, write = RunLog(path), os.write
    log.record("train", step=1)
    for name, failing in {"all of it": lambda *args: refuse(), "a part": lambda descriptor, data: write(descriptor, data[:10])}.items():
        monkeypatch.setattr(os, "write", failing)
        log.record("train", step=name)
        monkeypatch.setattr(os, "write", write)
    log.record("train", step=2)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    for line, name in zip(lines, ("all of it", "a part"), strict=True):
        assert f"{path} could not be written: [Errno 28] No space left on device; lost:" in line
        assert name in line


def refuse() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
