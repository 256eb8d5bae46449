"""Fine-tunes a pretrained VAN-B0 on 20 images per class, and trains one from scratch on the same images.

    python -m examples.transfer          or with --seeds N, --out FOLDER

VAN-B0 is pretrained on drawn figures of 50 classes, each a shape with a surface. It then learns ten new combinations from 200 images: from
the pretrained weights, and from scratch with four times the steps and a higher learning rate. (From scratch, learning rates of 5e-4 and
2e-3 ended within a point of each other, and more than 200 steps gained little.) All runs are jobs of configs/figures.yaml and
configs/other_figures.yaml, started as on a cluster, on two ranks (one if there is a single GPU).

Takes ten minutes on two cores and replaces its folder: data, runs, learning curves. Expected result: 79 % top-1 on 500 images from
pretrained weights, 23 % from scratch; chance is 10 %.
"""

import argparse
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from data.common.text import format_table
from examples.demo import announce, check_exit, run_python, start_job

CLASSES, IMAGES = 10, 20  # classes of the second set, and training images per class
STARTS = ("pretrained", "from scratch")
Curve = list[tuple[int, float]]  # (step, top-1 on the validation set after this step)


def draw_datasets(folder: Path, train: int, val: int) -> None:
    """Writes FOLDER/figures, with `train` training images, and FOLDER/other-figures; `val` is the size of each validation set."""
    for drawings, count in (("figures", train), ("other-figures", CLASSES * IMAGES)):
        run_python("-m", "data", "synthesize", str(folder / drawings), "--draw", drawings, "--train", str(count), "--val", str(val))


def run_job(config: str, data: Path, run: Path, *overrides: str) -> None:
    """Runs a training job on the datasets DATA/train and DATA/val; exits if the job fails."""
    places = [f"data.train={data / 'train'}", f"data.val={data / 'val'}", f"run.dir={run}"]
    check_exit(start_job(config, *places, *overrides).wait(), 0)


def pretrain(folder: Path, *overrides: str) -> Path:
    """Pretrains on the figures; returns the run directory."""
    run_job("configs/figures.yaml", folder / "figures", folder / "pretrained", *overrides)
    return folder / "pretrained"


def train_on_others(folder: Path, start: str, seed: int, *overrides: str) -> Curve:
    """Trains on the other figures from one of STARTS; returns the learning curve."""
    settings = {
        "pretrained": [f"model.init_from={folder / 'pretrained'}"],
        "from scratch": ["model.init_from=null", "optim.lr=2e-3", "epochs=60", "run.eval_every=10"],
    }
    run = folder / f"{start.replace(' ', '-')}-{seed}"
    run_job("configs/other_figures.yaml", folder / "other-figures", run, f"seed={seed}", *settings[start], *overrides)
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(record["step"], record["weight"]["top1"]) for record in records if record["kind"] == "evaluation"]


def format_top1(curves: dict[str, list[Curve]]) -> str:
    """Formats the top-1 of each start and seed after the last step, not the best one, and the mean over seeds."""
    rows = [["top-1", "steps", *(f"seed {seed}" for seed in range(len(curves[STARTS[0]]))), "mean"]]
    for start, runs in curves.items():
        ends = [points[-1] for points in runs]
        top1 = [accuracy for _, accuracy in ends]
        rows.append([start, str(ends[0][0]), *(f"{accuracy:.1%}" for accuracy in [*top1, mean(top1)])])
    return format_table(rows, left=[0])


def draw_curves(curves: dict[str, list[Curve]], path: Path) -> None:
    """Draws a line per seed, and a thick line for their mean."""
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    for (start, runs), color in zip(curves.items(), ("#4e79a7", "#f28e2b"), strict=True):
        for points in runs:
            axes.plot(*zip(*points, strict=True), color=color, linewidth=0.8, alpha=0.6)
        steps = [step for step, _ in runs[0]]
        top1 = [mean(accuracy for _, accuracy in points) for points in zip(*runs, strict=True)]
        axes.plot(steps, top1, color=color, linewidth=2.5, label=start)
    axes.axhline(1 / CLASSES, color="gray", linestyle=":", label="chance")
    axes.set(xlabel=f"step on {CLASSES * IMAGES} images", ylabel="top-1", ylim=(0, 1))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120, metadata={"Software": None})


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Trains on few images, from pretrained weights and from scratch.")
    parser.add_argument("--seeds", type=int, default=2, help="Runs from each start (default %(default)s).")
    parser.add_argument("--out", type=Path, default=Path("runs/transfer"), help="The folder to replace (default %(default)s).")
    parser.add_argument("--train", type=int, default=4000, help="Images to pretrain on (default %(default)s).")
    parser.add_argument("--val", type=int, default=500, help="Images in each val set (default %(default)s).")
    args = parser.parse_args(argv)
    began = time.monotonic()
    shutil.rmtree(args.out, ignore_errors=True)

    announce(f"1/3  drawing {args.train:,} figures of 50 classes, and {IMAGES} of each of ten other classes")
    draw_datasets(args.out, args.train, args.val)
    announce("2/3  pretraining VAN-B0 on the 50 classes")
    pretrain(args.out)
    curves: dict[str, list[Curve]] = {}
    for start in STARTS:
        announce(f"3/3  training on the ten other classes, {start}")
        curves[start] = [train_on_others(args.out, start, seed) for seed in range(args.seeds)]
    draw_curves(curves, args.out / "curves.png")
    announce(f"done in {time.monotonic() - began:.0f} s: ten classes, {IMAGES} training images each, {args.val} validation images")
    print(f"{format_top1(curves)}\n\nlearning curves: {args.out / 'curves.png'}")


if __name__ == "__main__":
    main()
