"""Times of `pretrain/model/fast/cpu.py` beside PyTorch's operators: layers, a whole training step, and evaluation.

    python -m benchmarks.training.on_cpu [--image-size 224] [--batch 16] [--precision bf16 fp32]

Both take turns in one process, on one thread, with malloc set to keep freed memory: requests for new pages would otherwise account for most
of the difference, and vary. The shortest time over the rounds counts, and the ratios matter most.
"""

import ctypes
from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torch
from torch import nn

import pretrain.model.van  # noqa: F401  registers the family with timm
from benchmarks.harness import command_line, in_turns, parser, report, seconds
from pretrain.engine.precision import DTYPES
from pretrain.model.fast import cpu
from pretrain.model.fast.channels_last import use_channels_last
from pretrain.model.van import LKA, Mlp

MODULE = "benchmarks.training.on_cpu"
TYPES = ["bf16", "fp32"]
ROUNDS = 5


def keep_memory() -> None:
    """Stops glibc from returning freed memory to the system."""
    libc, trim_threshold, mmap_max = ctypes.CDLL(None), -1, -4  # malloc.h
    libc.mallopt(trim_threshold, 2**31 - 1)
    libc.mallopt(mmap_max, 0)


def shortest_ms(model: nn.Module, step: Callable[[], None]) -> dict[str, float]:
    """Returns the milliseconds of a step of the model with PyTorch's operators and with ours."""

    def run(swap: Callable[[nn.Module], None]) -> float:
        swap(model)
        return seconds(step)

    cases = {"pytorch_ms": partial(run, cpu.restore_reference), "ours_ms": partial(run, cpu.use_cpu_way)}
    return {name: 1000 * min(times) for name, times in in_turns(cases, ROUNDS, warm_up=True).items()}


def autocast(precision: str) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")


def layer_step(layer: nn.Module, dim: int, size: int, batch: int, precision: str) -> Callable[[], None]:
    x = torch.randn(batch, dim, size, size).to(DTYPES[precision], memory_format=torch.channels_last).requires_grad_()
    grad = torch.randn_like(x)

    def step() -> None:
        with autocast(precision):
            y = layer(x)
        y.backward(grad)
        x.grad = None
        layer.zero_grad()

    return step


def model_steps(net: nn.Module, size: int, batch: int, precision: str) -> tuple[Callable[[], None], Callable[[], None]]:
    """Returns a training step and an evaluation step of a model."""
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

    return train, evaluate


def main() -> None:
    options = parser(MODULE, __doc__)
    options.add_argument("--image-size", type=int, default=224)
    options.add_argument("--batch", type=int, default=16)
    options.add_argument("--precision", nargs="+", choices=TYPES, default=TYPES, help="the layers run in the first")
    args = options.parse_args()
    torch.set_num_threads(1)
    keep_memory()
    rows: list[dict[str, Any]] = []

    def compare(case: str, model: nn.Module, step: Callable[[], None]) -> None:
        times = shortest_ms(model, step)
        rows.append({"case": case, **times, "ratio": times["pytorch_ms"] / times["ours_ms"]})

    for dim, stride, ratio in ((32, 4, 8), (64, 8, 8), (160, 16, 4), (256, 32, 4)):
        size = args.image_size // stride
        lka, mlp = LKA(dim), Mlp(dim, dim * ratio)
        for layer, kernel in ((lka.conv0, "5x5, dilation 1"), (lka.conv_spatial, "7x7, dilation 3")):
            step = layer_step(layer, dim, size, args.batch, args.precision[0])
            compare(f"{dim} channels, {size} px, {kernel}", lka, step)
        compare(f"{dim} channels, {size} px, MLP of {dim * ratio}", mlp, layer_step(mlp, dim, size, args.batch, args.precision[0]))
    for precision in args.precision:
        net = timm.create_model("van_b0", num_classes=1000)
        use_channels_last(net)
        train, evaluate = model_steps(net, args.image_size, args.batch, precision)
        compare(f"training step of VAN-B0, {args.image_size} px, {precision}", net, train)
        compare(f"evaluation of VAN-B0, {args.image_size} px, {precision}", net, evaluate)
    precision = None if args.precision == TYPES else args.precision
    command = command_line(MODULE, {"image_size": args.image_size, "batch": args.batch, "precision": precision})
    instructions = "AVX512 BF16" if torch.cpu._is_avx512_bf16_supported() else torch.backends.cpu.get_cpu_capability()
    report(args.out / "on_cpu.json", command, ["torch"], cpu=instructions, rows=rows)


if __name__ == "__main__":
    main()
