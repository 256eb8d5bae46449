"""The plot of training rates."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.training import performance_plot


def measurement(device: str, **rates: float) -> dict[str, Any]:
    rows: list[dict[str, Any]] = [
        {"case": case, "micro_batch": 4, "images_per_s": [0.9 * rate, rate, 1.1 * rate]} for case, rate in rates.items()
    ]
    return {
        "device": device,
        "instructions": "AVX2",
        "model": "van_b3",
        "image_size": 224,
        "rows": [*rows, {"case": "engine", "failed": "for a reason"}],
    }


@pytest.mark.parametrize(("device", "drawn_as", "marks"), [("cpu", "CPU, AVX2", False), ("NVIDIA H200", "NVIDIA H200", True)])
def test_known_gpus_show_the_roofline(device: str, drawn_as: str, marks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, out = tmp_path / "steps.json", tmp_path / "plot.svg"
    file.write_text(json.dumps([measurement(device, peer_fp16=10.0, peer_compiled=30.0, ours=42.0), measurement(device, ours=77.0)]))
    monkeypatch.setattr(sys, "argv", ["performance_plot", str(file), "--out", str(out)])
    performance_plot.main()
    drawn = out.read_text()
    assert f"VAN-B3 at 224 px, {drawn_as}" in drawn
    assert "42.00 images/s, micro-batch 4" in drawn
    assert "77.00" not in drawn  # no case of the authors
    assert "engine" not in drawn
    assert ("fused roofline" in drawn) == marks


def test_best_of_the_authors_excludes_their_compiled_model() -> None:
    assert performance_plot.authors_best(measurement("cpu", peer_fp16=10.0, peer_fp16_nhwc=20.0, peer_compiled=30.0)) == 20.0
    assert performance_plot.authors_best(measurement("cpu", ours=1.0)) is None
