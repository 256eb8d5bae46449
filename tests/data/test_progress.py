import pytest

import data.progress
from data.progress import progress


def test_plain_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(progress(iter("abc"), 3, "letters")) == ["a", "b", "c"]
    assert capsys.readouterr().err == "letters: 3 of 3 in 0 s\n"
    monkeypatch.setattr(data.progress, "SECONDS_BETWEEN_LINES", 0.0)
    assert list(progress(range(2), 2, "numbers")) == [0, 1]
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == ["numbers: 1 of 2", "numbers: 2 of 2", "numbers: 2 of 2 in 0 s"]
