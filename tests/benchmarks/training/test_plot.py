"""The plot of whole steps: which measurements are drawn, and against what."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.training import performance_plot


def measurement(device: str, **rates: float) -> dict[str, Any]:
    rows: list[dict[str, Any]] = [
        {"way": way, "micro_batch": 4, "images_per_s": {"median": rate, "tenth": 0.9 * rate, "ninetieth": 1.1 * rate}}
        for way, rate in rates.items()
    ]
    return {
        "device": device,
        "instructions": "AVX2",
        "model": "van_b3",
        "image_size": 224,
        "rows": [*rows, {"way": "engine", "failed": "for a reason"}],
    }


@pytest.mark.parametrize(("device", "drawn_as", "marks"), [("cpu", "CPU, AVX2", False), ("NVIDIA H200", "NVIDIA H200", True)])
def test_bars_are_drawn_with_the_roofline_where_it_is_known(
    device: str, drawn_as: str, marks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, out = tmp_path / "steps.json", tmp_path / "plot.svg"
    file.write_text(json.dumps([measurement(device, peer_fp16=10.0, peer_compiled=30.0, own=42.0), measurement(device, own=77.0)]))
    monkeypatch.setattr(sys, "argv", ["performance_plot", str(file), "--out", str(out)])
    performance_plot.main()
    drawn = out.read_text()
    assert f"VAN-B3 at 224 px, {drawn_as}" in drawn
    assert "42.00 images/s, 4 at once" in drawn
    assert "77.00" not in drawn  # nothing of the authors' to compare it with
    assert "engine" not in drawn
    assert ("fused roofline" in drawn) == marks


def test_the_authors_best_is_as_published() -> None:
    assert performance_plot.authors_best(measurement("cpu", peer_fp16=10.0, peer_fp16_nhwc=20.0, peer_compiled=30.0)) == 20.0
    assert performance_plot.authors_best(measurement("cpu", own=1.0)) is None
