"""Lines and records of a run."""

import errno
import json
import os
from pathlib import Path

import pytest

from pretrain.run.log import RunLog


def test_only_rank_0_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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


def test_a_record_that_a_full_disk_refuses_is_logged(
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
