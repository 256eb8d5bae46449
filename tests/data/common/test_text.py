"""Durations and tables as text."""

import pytest

from data.common.text import format_duration, format_table


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.6, "1 min 0 s"), (3599, "59 min 59 s"), (3600, "1 h 0 min"), (100_000, "27 h 46 min"), (183_600, "2 d 3 h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_columns_are_aligned() -> None:
    rows = [("run", "step", "note"), ("a", "1000", ""), ("longer", "5", "late")]
    assert format_table(rows, left=(0, 2)).splitlines() == ["run     step  note", "a       1000", "longer     5  late"]
