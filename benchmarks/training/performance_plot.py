"""Draws what `python -m benchmarks.training` found of whole steps: images a second of every way, with the authors' best as 1.

    python -m benchmarks.training.performance_plot [benchmarks/results/steps_….json …] [--out docs/performance.svg]

Bars for each measurement in the files (all of benchmarks/results unless some are named) that has the authors' code in it, with lines from
the tenth to the ninetieth percentile. On GPUs of the roofline's table two marks show what the eager and the fused cut allow at most.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.training import roofline

RESULTS = Path(__file__).parents[1] / "results"
PEER, OWN = "#8c8c8c", "#3b6fb6"


def measurements(files: list[Path]) -> list[dict[str, Any]]:
    """Those with a way of the authors'."""
    found = [one for file in files for one in json.loads(file.read_text())]
    return [one for one in found if authors_best(one) is not None]


def authors_best(measured: dict[str, Any]) -> float | None:
    """Images a second of the authors' fastest way as published, that is, not compiled."""
    published = [row for row in measured["rows"] if row["way"].startswith("peer") and row["way"] != "peer_compiled" and "failed" not in row]
    return max((row["images_per_s"]["median"] for row in published), default=None)


def draw(axes: Axes, measured: dict[str, Any]) -> None:
    """One measurement's bars."""
    rows = [row for row in measured["rows"] if "failed" not in row]
    one = authors_best(measured)
    assert one is not None
    for position, row in enumerate(rows):
        rate = row["images_per_s"]
        axes.barh(position, rate["median"] / one, color=PEER if row["way"].startswith("peer") else OWN)
        axes.hlines(position, rate["tenth"] / one, rate["ninetieth"] / one, color="black", linewidth=1)
        text = f" {rate['median']:.{0 if rate['median'] >= 100 else 2}f} images/s, {row['micro_batch']} at once"
        axes.text(max(rate["ninetieth"], rate["median"]) / one, position, text, va="center", fontsize=8)
    device = roofline.by_name(measured["device"])
    for name, kernels in (("eager", roofline.EAGER), ("fused", roofline.FUSED)):
        if device is not None:
            most = roofline.attainable(measured["model"], measured["image_size"], kernels, device) / one
            axes.axvline(most, color="black", linestyle=":", linewidth=1)
            axes.text(most, -0.7, f"{name} roofline", ha="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [row["way"] for row in rows])
    axes.invert_yaxis()
    axes.margins(x=0.35)
    axes.set_xlim(left=0)
    axes.axvline(1, color=PEER, linewidth=0.8)
    where = f"CPU, {measured['instructions']}" if measured["device"] == "cpu" else measured["device"]
    axes.set_title(f"{measured['model'].replace('van_b', 'VAN-B')} at {measured['image_size']} px, {where}", fontsize=10, loc="left")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[2] / "docs" / "performance.svg")
    args = parser.parse_args()
    found = measurements(args.files or sorted(RESULTS.glob("steps_*.json")))
    heights = [0.6 + 0.28 * len(measured["rows"]) for measured in found]
    figure = Figure(figsize=(8, 0.5 + sum(heights)), layout="constrained")
    all_axes = figure.subplots(len(found), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, measured in zip(all_axes, found, strict=True):
        draw(axes, measured)
    all_axes[-1].set_xlabel("images a second, the authors' best as published = 1")
    with matplotlib.rc_context({"svg.hashsalt": "performance", "svg.fonttype": "none"}):  # the same figures give the same file
        figure.savefig(args.out, metadata={"Date": None})
    print(args.out)


if __name__ == "__main__":
    main()
