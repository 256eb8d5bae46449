"""Progress is logged with rate and remaining time."""

import pytest

import data.common.progress
from data.common.progress import report_progress


def test_lines_are_plain_without_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(report_progress(iter("abc"), 3, "letters")) == ["a", "b", "c"]
    assert capsys.readouterr().err == "letters: 3 of 3 in 0 s\n"
    monkeypatch.setattr(data.common.progress, "SECONDS_BETWEEN_LINES", 0.0)
    assert list(report_progress(range(2), 2, "numbers")) == [0, 1]
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == ["numbers: 1 of 2", "numbers: 2 of 2", "numbers: 2 of 2 in 0 s"]
    assert lines[1].endswith("a second, 0 s left")


def test_rate_and_remaining_time_count_what_items_weigh(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 10.0, 30.0, 30.0])
    monkeypatch.setattr(data.common.progress.time, "monotonic", lambda: next(now))
    assert list(report_progress(["a", "bcd"], 2000, "letters", weigh=lambda item: 100 * len(item))) == ["a", "bcd"]
    assert capsys.readouterr().err.splitlines() == [
        "letters: 100 of 2000, 10 a second, 3 min 10 s left",
        "letters: 400 of 2000, 13 a second, 2 min 0 s left",
        "letters: 400 of 2000 in 30 s",
    ]
