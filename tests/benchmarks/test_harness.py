"""The parts that all benchmarks share."""

import json
from pathlib import Path

import pytest

from benchmarks import harness


def test_cases_take_turns_in_alternating_order() -> None:
    calls: list[str] = []

    def call(name: str) -> int:
        calls.append(name)
        return len(calls)

    results = harness.run_in_turns({name: lambda name=name: call(name) for name in "abc"}, 2, warm_up=True)  # type: ignore[misc]
    assert "".join(calls) == "cba" + "abc" + "cba"
    assert results == {"a": [4, 9], "b": [5, 8], "c": [6, 7]}


def test_ratios_are_of_rounds() -> None:
    """A slow round affects both cases alike."""
    assert harness.median_ratio([1.0, 10.0, 6.0], [2.0, 20.0, 10.0]) == 0.5


def test_table_has_a_column_for_each_key() -> None:
    rows = [{"case": "a", "images_per_s": [1.0, 2.0, 3.0]}, {"case": "bb", "rate": 12345.6, "count": 3}]
    assert harness.format_rows(rows).splitlines() == [
        "case        images/s    rate  count",
        "a     2 (1.2 to 2.8)",
        "bb                    12,346      3",
    ]


def test_command_line_has_the_options_that_are_set() -> None:
    options = {"batch": 2, "image_size": None, "gpu": True, "cpu": False, "models": ["a", "b"]}
    assert harness.format_command("benchmarks.x", options) == "python -m benchmarks.x --batch 2 --gpu --models a b"


def test_report_replaces_the_result_of_the_same_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "x.json"
    for command, value in (("one", 1.0), ("two", 2.0), ("one", 1.23456)):
        harness.report(path, command, ["numpy"], size=3, rows=[{"case": "a", "value": value}])
    assert "a      1.23\n" in capsys.readouterr().out
    results = json.loads(path.read_text())
    assert [(result["command"], result["rows"][0]["value"]) for result in results] == [("two", 2.0), ("one", 1.235)]
    assert {"machine", "commit", "versions", "size"} <= results[0].keys()
    assert '   {"case": "a", "value": 1.235}\n  ]\n' in path.read_text(), "a line for each row"
