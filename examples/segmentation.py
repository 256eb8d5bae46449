"""Trains a segmentation head on VAN's feature maps, from exported weights and from random ones.

    make demo                                    once, to write the weights
    python -m examples.segmentation              or with --weights PATH, --steps N

timm loads the backbone from the exported folder with features_only, as in any other project. A small FPN (arXiv 1612.03144) on its four
feature maps learns to classify every pixel of images that contain two patterns, one pasted into the other. Both runs use the same head,
images, order and learning rate; only the initial weights differ. Takes about a minute on two cores and writes
runs/segmentation/segmentation.png. Expected result: a mean IoU of 31 % from pretrained weights, 6 % from random ones.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image, ImageColor, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.nn import functional as F

import pretrain.model.van  # noqa: F401  registers the models with timm
from data.synthetic.drawings import PATTERNS, draw_pattern

SIZE = 96  # pixels a side
TRAIN, HELD_OUT, DRAWN = 800, 200, 6  # images; the picture shows the first DRAWN held-out ones
BATCH, LEARNING_RATE = 16, 1e-3
PALETTE = ("#4e79a7", "#f28e2b", "#e15759", "#76b7b2", "#59a14f", "#edc948", "#b07aa1", "#ff9da7", "#9c755f", "#bab0ac")


def draw_scene(random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draws an image of one class with a region of another; returns uint8 (SIZE, SIZE, 3) and class ids, int64 (SIZE, SIZE)."""
    labels = random.choice(len(PATTERNS), 2, replace=False)
    drawings = (draw_pattern(list(PATTERNS.values())[label], random).convert("RGB") for label in labels)
    around, within = (np.array(drawing.resize((SIZE, SIZE), Image.Resampling.BICUBIC)) for drawing in drawings)
    rows, columns = np.mgrid[-1 : 1 : SIZE * 1j, -1 : 1 : SIZE * 1j]
    (center_y, center_x), (height, width) = random.uniform(-0.3, 0.3, 2), random.uniform(0.45, 0.75, 2)
    y, x, angle, power = rows - center_y, columns - center_x, random.uniform(0, np.pi), random.choice([2, 10])
    u, v = np.cos(angle) * x - np.sin(angle) * y, np.sin(angle) * x + np.cos(angle) * y
    region = np.abs(u / width) ** power + np.abs(v / height) ** power < 1  # an ellipse, or close to a rectangle
    return np.where(region[..., None], within, around), np.where(region, labels[1], labels[0])


def draw_set(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draws images, uint8 (count, 3, SIZE, SIZE), and masks, int64 (count, SIZE, SIZE)."""
    images, masks = zip(*(draw_scene(np.random.default_rng([seed, number])) for number in range(count)), strict=True)
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), torch.from_numpy(np.stack(masks))


def load_backbone(weights: Path, pretrained: bool) -> nn.Module:
    """Loads the four stages of an exported model, which map images to feature maps; newly initialized unless `pretrained`."""
    return timm.create_model(f"local-dir:{weights}", pretrained=pretrained, features_only=True)


class FPN(nn.Module):
    """Feature pyramid network: adds each coarse map to the next finer one, and classifies the sum of all at the finest stride."""

    def __init__(self, channels: Sequence[int], classes: int, width: int = 64) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(count, width, 1) for count in channels)
        self.smooth = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.GELU()) for _ in channels
        )
        self.classify = nn.Conv2d(width, classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps features (N, C_i, H_i, W_i), finest first, to logits (N, classes, H_0, W_0)."""
        pyramid = [lateral(x) for lateral, x in zip(self.lateral, maps, strict=True)]
        for i in reversed(range(len(pyramid) - 1)):
            pyramid[i] = pyramid[i] + _resize(pyramid[i + 1], pyramid[i].shape[-2:])
        return self.classify(sum(_resize(smooth(x), maps[0].shape[-2:]) for smooth, x in zip(self.smooth, pyramid, strict=True)))


class Segmenter(nn.Module):
    """Maps images, uint8 (N, 3, H, W), to logits (N, classes, H, W), with the normalization of the backbone's weights."""

    def __init__(self, backbone: nn.Module, classes: int) -> None:
        super().__init__()
        self.backbone, self.head = backbone, FPN(backbone.feature_info.channels(), classes)
        self.register_buffer("mean", 255 * torch.tensor(backbone.pretrained_cfg["mean"])[:, None, None])
        self.register_buffer("std", 255 * torch.tensor(backbone.pretrained_cfg["std"])[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        x = (images - self.mean) / self.std
        return _resize(self.head(self.backbone(x)), images.shape[-2:])


def _resize(x: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(x, size=list(size), mode="bilinear", align_corners=False)


def train(model: Segmenter, images: Tensor, masks: Tensor, steps: int) -> list[float]:
    """Trains backbone and head on images, uint8 (N, 3, H, W), and masks, int64 (N, H, W); returns the loss of each step."""
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.2)
    order = torch.Generator().manual_seed(0)
    losses = []
    model.train()
    for _ in range(steps):
        batch = torch.randint(len(images), (BATCH,), generator=order)
        loss = F.cross_entropy(model(images[batch]), masks[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


@torch.inference_mode()
def predict(model: Segmenter, images: Tensor) -> Tensor:
    """Predicts the class id of each pixel, int64 (N, H, W)."""
    model.eval()
    return torch.cat([model(part).argmax(1) for part in images.split(50)])


def compute_scores(predicted: Tensor, truth: Tensor, classes: int) -> tuple[float, float]:
    """Computes pixel accuracy, and mean IoU over the classes that occur, from class ids, int64 of equal shape."""
    confusion = torch.bincount((classes * truth + predicted).flatten(), minlength=classes**2).view(classes, classes)
    hits = confusion.diagonal()
    union = confusion.sum(0) + confusion.sum(1) - hits
    return (hits.sum() / confusion.sum()).item(), (hits / union)[union > 0].mean().item()


def draw_picture(rows: dict[str, Tensor], path: Path, cell: int = 2 * SIZE, gap: int = 8, label: int = 156) -> None:
    """Draws a named row of images (n, 3, H, W) or masks (n, H, W) each, and a legend of the class colors; sizes are in pixels."""
    columns, legend = max(map(len, rows.values())), 60
    picture = Image.new("RGB", (label + columns * (cell + gap) + gap, len(rows) * (cell + gap) + gap + legend), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(17)
    colors = np.array([ImageColor.getrgb(color) for color in PALETTE], np.uint8)
    for r, (name, tensors) in enumerate(rows.items()):
        y = gap + r * (cell + gap)
        draw.multiline_text((2 * gap, y + cell / 2), name, "black", font, anchor="lm", spacing=6)
        for c, tensor in enumerate(tensors.numpy()):
            image = Image.fromarray(colors[tensor] if tensor.ndim == 2 else tensor.transpose(1, 2, 0).copy())
            smooth = Image.Resampling.NEAREST if tensor.ndim == 2 else Image.Resampling.BICUBIC
            picture.paste(image.resize((cell, cell), smooth), (label + c * (cell + gap), y))
    step = (picture.width - 4 * gap) / len(PATTERNS)
    for i, name in enumerate(PATTERNS):
        x, y = 2 * gap + i * step, picture.height - legend / 2
        draw.rounded_rectangle((x, y - 9, x + 18, y + 9), 4, PALETTE[i])
        draw.text((x + 25, y), name, "black", font, anchor="lm")
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)


def check_features(weights: Path, images: Tensor) -> str:
    """Asserts that features_only returns the classification model's maps, bit for bit; returns a line that reports it."""
    backbone = load_backbone(weights, pretrained=True).eval()
    classifier = timm.create_model(f"local-dir:{weights}", pretrained=True).eval()
    with torch.no_grad():
        maps, expected = backbone(images), classifier.forward_intermediates(images, intermediates_only=True)
    strides, channels = backbone.feature_info.reduction(), backbone.feature_info.channels()
    assert strides == [4, 8, 16, 32]
    assert channels == [info["num_chs"] for info in classifier.feature_info]
    for x, count, stride in zip(maps, channels, strides, strict=True):
        assert x.shape == (len(images), count, images.shape[2] // stride, images.shape[3] // stride)
    assert all(torch.equal(x, y) for x, y in zip(maps, expected, strict=True))
    return f"features_only: strides {strides}, channels {channels}; equal to the classification model's, bit for bit"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Trains a segmentation head on exported weights and on random ones.")
    parser.add_argument(
        "--weights", type=Path, default=Path("runs/demo/timm"), help="A folder exported with --format timm (default %(default)s)."
    )
    parser.add_argument("--steps", type=int, default=100, help="Training steps from each start (default %(default)s).")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/segmentation/segmentation.png"), help="The picture to write (default %(default)s)."
    )
    args = parser.parse_args(argv)
    if not (args.weights / "config.json").is_file():
        sys.exit(f"error: {args.weights} has no exported weights; run `make demo`, which writes runs/demo/timm")

    print(check_features(args.weights, torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))))
    images, masks = draw_set(TRAIN, seed=0)
    held_out, truth = draw_set(HELD_OUT, seed=1)
    rows = {"image": held_out[:DRAWN], "truth": truth[:DRAWN]}
    print(f"{TRAIN} images to train on, {HELD_OUT} held out, {SIZE} px; {args.steps} steps of {BATCH} images each")
    for start in ("pretrained", "random"):
        began = time.monotonic()
        torch.manual_seed(0)
        model = Segmenter(load_backbone(args.weights, start == "pretrained"), len(PATTERNS))
        losses = train(model, images, masks, args.steps)
        predicted = predict(model, held_out)
        accuracy, iou = compute_scores(predicted, truth, len(PATTERNS))
        print(
            f"from {start} weights: pixel accuracy {accuracy:.1%}, mean IoU {iou:.1%}, loss {losses[0]:.2f} to {losses[-1]:.2f}"
            f" ({time.monotonic() - began:.0f} s)",
            flush=True,
        )
        rows[f"{start}\nmean IoU {iou:.0%}"] = predicted[:DRAWN]
    draw_picture(rows, args.out)
    print(f"picture: {args.out}")


if __name__ == "__main__":
    main()
