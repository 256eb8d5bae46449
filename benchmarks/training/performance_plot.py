"""Draws the training rates that `python -m benchmarks.training` measured, relative to the authors' fastest case.

    python -m benchmarks.training.performance_plot [benchmarks/results/steps_….json …] [--out docs/performance.svg]

Draws bars for each measurement that has a case of the authors, from all of benchmarks/results unless files are named; lines go from the
10th to the 90th percentile. On GPUs of the roofline's table, two marks show the bounds of eager and fused kernels.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.harness import RESULTS, deciles
from benchmarks.training import roofline

PEER_COLOR, OUR_COLOR = "#8c8c8c", "#3b6fb6"


def read_measurements(files: list[Path]) -> list[dict[str, Any]]:
    """Reads the measurements that have a case of the authors."""
    measurements = [measurement for file in files for measurement in json.loads(file.read_text())]
    return [measurement for measurement in measurements if authors_best(measurement) is not None]


def authors_best(measurement: dict[str, Any]) -> float | None:
    """Returns the images/s of the authors' fastest case as published, that is, not compiled."""
    rows = [row for row in measurement["rows"] if row["case"].startswith("peer") and "failed" not in row]
    return max((deciles(row["images_per_s"])["median"] for row in rows if row["case"] != "peer_compiled"), default=None)


def draw(axes: Axes, measurement: dict[str, Any]) -> None:
    """Draws the bars of one measurement."""
    rows = [row for row in measurement["rows"] if "failed" not in row]
    one = authors_best(measurement)
    assert one is not None
    for position, row in enumerate(rows):
        rate = deciles(row["images_per_s"])
        axes.barh(position, rate["median"] / one, color=PEER_COLOR if row["case"].startswith("peer") else OUR_COLOR)
        axes.hlines(position, rate["tenth"] / one, rate["ninetieth"] / one, color="black", linewidth=1)
        text = f" {rate['median']:.{0 if rate['median'] >= 100 else 2}f} images/s, micro-batch {row['micro_batch']}"
        axes.text(max(rate["ninetieth"], rate["median"]) / one, position, text, va="center", fontsize=8)
    device = roofline.by_name(measurement["device"])
    for name, kernels in (("eager", roofline.EAGER), ("fused", roofline.FUSED)):
        if device is not None:
            most = roofline.attainable(measurement["model"], measurement["image_size"], kernels, device) / one
            axes.axvline(most, color="black", linestyle=":", linewidth=1)
            axes.text(most, -0.7, f"{name} roofline", ha="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [row["case"] for row in rows])
    axes.invert_yaxis()
    axes.margins(x=0.35)
    axes.set_xlim(left=0)
    axes.axvline(1, color=PEER_COLOR, linewidth=0.8)
    device_name = f"CPU, {measurement['instructions']}" if measurement["device"] == "cpu" else measurement["device"]
    axes.set_title(
        f"{measurement['model'].replace('van_b', 'VAN-B')} at {measurement['image_size']} px, {device_name}", fontsize=10, loc="left"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[2] / "docs" / "performance.svg")
    args = parser.parse_args()
    measurements = read_measurements(args.files or sorted(RESULTS.glob("steps_*.json")))
    heights = [0.6 + 0.28 * len(measurement["rows"]) for measurement in measurements]
    figure = Figure(figsize=(8, 0.5 + sum(heights)), layout="constrained")
    all_axes = figure.subplots(len(measurements), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, measurement in zip(all_axes, measurements, strict=True):
        draw(axes, measurement)
    all_axes[-1].set_xlabel("images/s, authors' best as published = 1")
    with matplotlib.rc_context({"svg.hashsalt": "performance", "svg.fonttype": "none"}):  # the same figures give the same file
        figure.savefig(args.out, metadata={"Date": None})
    print(args.out)


if __name__ == "__main__":
    main()
