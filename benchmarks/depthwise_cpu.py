"""The depth-wise convolution of a CPU beside PyTorch's operator, and what it is worth in a whole training step and in an evaluation.

    python -m benchmarks.depthwise_cpu [--image-size 64] [--batch 32] [--precision bf16 fp32]

Both ways run in turn in one process, on one thread; times are the smallest of several rounds, and what counts is their ratio. The
result goes to benchmarks/results/depthwise_cpu.json.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

import pretrain.van  # noqa: F401  registers the family with timm
from data.results import record
from pretrain.depthwise import DepthwiseConv2d
from pretrain.engine import PRECISIONS

TRIED = ["bf16", "fp32"]
RESULT = Path(__file__).parent / "results" / "depthwise_cpu.json"
ROUNDS = 5


class Plain(DepthwiseConv2d):
    """The same layer by PyTorch's operator."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.Conv2d.forward(self, x)


def smallest_times(steps: dict[str, Callable[[], None]]) -> dict[str, float]:
    """Milliseconds of each, the smallest of several rounds in which all take turns."""
    found: dict[str, float] = {}
    for turn in range(ROUNDS + 1):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            if turn > 0:  # the first warms up
                found[name] = min(found.get(name, float("inf")), 1000 * (time.perf_counter() - began))
    return found


def autocast(precision: str) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")


def layer(
    kind: type[DepthwiseConv2d], dim: int, size: int, kernel_size: int, dilation: int, batch: int, precision: str
) -> Callable[[], None]:
    conv = kind(dim, kernel_size, dilation)
    x = torch.randn(batch, dim, size, size).to(PRECISIONS[precision], memory_format=torch.channels_last).requires_grad_()
    grad = torch.randn_like(x)

    def step() -> None:
        with autocast(precision):
            y = conv(x)
        y.backward(grad)

    return step


def models(kind: type[DepthwiseConv2d], name: str, size: int, batch: int, precision: str) -> dict[str, Callable[[], None]]:
    """A training step, and an evaluation's."""
    net = timm.create_model(name, num_classes=1000)
    for module in net.modules():
        if isinstance(module, DepthwiseConv2d):
            module.__class__ = kind
    x = torch.randn(batch, 3, size, size).to(memory_format=torch.channels_last)
    target = torch.arange(batch) % 1000

    def train() -> None:
        net.train()
        with autocast(precision):
            loss = nn.functional.cross_entropy(net(x).float(), target)
        loss.backward()
        net.zero_grad()

    @torch.inference_mode()
    def evaluate() -> None:
        net.eval()
        with autocast(precision):
            net(x)

    return {"training step": train, "evaluation": evaluate}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--precision", nargs="+", choices=TRIED, default=TRIED, help="the layers are of the first")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []

    def compare(what: str, plain: Callable[[], None], own: Callable[[], None]) -> None:
        times = smallest_times({"pytorch_ms": plain, "own_ms": own})
        rows.append({"what": what, **{k: round(v, 2) for k, v in times.items()}, "ratio": round(times["pytorch_ms"] / times["own_ms"], 2)})
        print(f"{what:52} PyTorch {times['pytorch_ms']:8.2f} ms   own {times['own_ms']:8.2f} ms   {rows[-1]['ratio']:5.2f} x", flush=True)

    for dim, stride in ((32, 4), (64, 8), (160, 16), (256, 32)):
        size = args.image_size // stride
        for width, kernel_size, dilation in ((dim, 5, 1), (dim, 7, 3), (dim * (8 if stride < 16 else 4), 3, 1)):
            what = f"{width} channels, {size} px, {kernel_size}x{kernel_size}, dilation {dilation}"
            shape = (width, size, kernel_size, dilation, args.batch, args.precision[0])
            compare(what, layer(Plain, *shape), layer(DepthwiseConv2d, *shape))
    for precision in args.precision:
        plain, own = (models(kind, "van_b0", args.image_size, args.batch, precision) for kind in (Plain, DepthwiseConv2d))
        for what in plain:
            compare(f"{what} of VAN-B0, {args.image_size} px, {precision}", plain[what], own[what])
    command = f"python -m benchmarks.depthwise_cpu --image-size {args.image_size} --batch {args.batch}"
    if args.precision != TRIED:
        command += f" --precision {' '.join(args.precision)}"
    record(RESULT, command, ["torch"], cpu=torch.backends.cpu.get_cpu_capability(), rows=rows)


if __name__ == "__main__":
    main()
