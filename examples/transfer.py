"""What pretraining is for: VAN-B0 pretrained and fine-tuned on 20 images a class, beside VAN-B0 trained on these alone.

    python -m examples.transfer          or with --seeds N, --out FOLDER

The network is pretrained on drawn figures of 50 classes, each a shape with a surface. Then it learns ten combinations that it has
never seen from 200 images: from the pretrained weights, and from scratch with four times the steps and a higher learning rate. (On
these images, learning rates of 5e-4 and 2e-3 ended within a point of each other, and after 200 steps little was gained.) All of it
are jobs as on a cluster, on two ranks, or one for each GPU where there are two or more: configs/figures.yaml and
configs/other_figures.yaml. It takes ten minutes on two cores and writes its folder anew: data, runs, the learning curves. What to
expect: 79 % top-1 on 500 images from pretrained weights, 23 % from scratch; chance is 10 %.
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

from examples.demo import expect, python, say, start_job

CLASSES, IMAGES = 10, 20  # of the second set, and its training images of a class
STARTS = ("pretrained", "from scratch")
Curve = list[tuple[int, float]]  # step, and top-1 on the val set after it


def draw(folder: Path, train: int, val: int) -> None:
    """FOLDER/figures and FOLDER/other-figures, packed."""
    for drawings, count in (("figures", train), ("other-figures", CLASSES * IMAGES)):
        python("-m", "data", "synthesize", str(folder / drawings), "--draw", drawings, "--train", str(count), "--val", str(val))


def train(config: str, data: Path, run: Path, *overrides: str) -> None:
    places = [f"data.train={data / 'train'}", f"data.val={data / 'val'}", f"run.dir={run}"]
    expect(start_job(config, *places, *overrides).wait(), 0)


def pretrain(folder: Path, *overrides: str) -> Path:
    """The run directory."""
    train("configs/figures.yaml", folder / "figures", folder / "pretrained", *overrides)
    return folder / "pretrained"


def learn_others(folder: Path, start: str, seed: int, *overrides: str) -> Curve:
    settings = {
        "pretrained": [f"model.init_from={folder / 'pretrained'}"],
        "from scratch": ["model.init_from=null", "optim.lr=2e-3", "epochs=60", "run.eval_every=10"],
    }
    run = folder / f"{start.replace(' ', '-')}-{seed}"
    train("configs/other_figures.yaml", folder / "other-figures", run, f"seed={seed}", *settings[start], *overrides)
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(record["step"], record["weight"]["top1"]) for record in records if record["kind"] == "evaluation"]


def table(curves: dict[str, list[Curve]]) -> str:
    """Top-1 after the last step of each start's runs, one a seed, and their mean; never the best on the way."""
    seeds = len(curves[STARTS[0]])
    lines = ["  ".join([f"{'top-1':14}", " steps", *(f"seed {seed}" for seed in range(seeds)), "  mean"])]
    for start, of_seeds in curves.items():
        ends = [points[-1] for points in of_seeds]
        top1 = [accuracy for _, accuracy in ends]
        lines.append("  ".join([f"{start:14}", f"{ends[0][0]:6}", *(f"{accuracy:6.1%}" for accuracy in [*top1, mean(top1)])]))
    return "\n".join(lines)


def draw_curves(curves: dict[str, list[Curve]], path: Path) -> None:
    """A line a seed, and a thick one for their mean."""
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    for (start, of_seeds), colour in zip(curves.items(), ("#4e79a7", "#f28e2b"), strict=True):
        for points in of_seeds:
            axes.plot(*zip(*points, strict=True), color=colour, linewidth=0.8, alpha=0.6)
        steps, top1 = zip(*((found[0][0], mean(accuracy for _, accuracy in found)) for found in zip(*of_seeds, strict=True)), strict=True)
        axes.plot(steps, top1, color=colour, linewidth=2.5, label=start)
    axes.axhline(1 / CLASSES, color="grey", linestyle=":", label="chance")
    axes.set(xlabel=f"step on {CLASSES * IMAGES} images", ylabel="top-1", ylim=(0, 1))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120, metadata={"Software": None})


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Trains on few images, from pretrained weights and from scratch.")
    parser.add_argument("--seeds", type=int, default=2, help="runs from each start (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/transfer"), help="the folder (%(default)s)")
    parser.add_argument("--train", type=int, default=4000, help="images to pretrain on (%(default)s)")
    parser.add_argument("--val", type=int, default=500, help="images of each val set (%(default)s)")
    args = parser.parse_args(argv)
    began = time.monotonic()
    shutil.rmtree(args.out, ignore_errors=True)

    say(f"1/3  drawing figures: {args.train:,} of 50 classes, and {IMAGES} of each of ten others")
    draw(args.out, args.train, args.val)
    say("2/3  pretraining VAN-B0 on the 50 classes")
    pretrain(args.out)
    curves: dict[str, list[Curve]] = {}
    for start in STARTS:
        say(f"3/3  learning the ten others, {start}")
        curves[start] = [learn_others(args.out, start, seed) for seed in range(args.seeds)]
    draw_curves(curves, args.out / "curves.png")
    say(f"done in {time.monotonic() - began:.0f} s: ten classes, {IMAGES} training images each, {args.val} images to evaluate on")
    print(f"{table(curves)}\n\nlearning curves: {args.out / 'curves.png'}")


if __name__ == "__main__":
    main()
