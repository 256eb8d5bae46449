"""What `pretrain/model/fast/cpu.py` does otherwise, beside PyTorch's operators: layers, and a whole training step and an evaluation.

    python -m benchmarks.training.on_cpu [--image-size 224] [--batch 16] [--precision bf16 fp32]

Both ways run in turn in one process, on one thread, in memory that is kept: how often the system is asked for new pages would else
be most of the difference, and another one each time. Times are the smallest of several rounds, and what counts is their ratio. The
result goes to benchmarks/results/on_cpu.json.
"""

import argparse
import ctypes
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import timm
import torch
from torch import nn

import pretrain.model.van  # noqa: F401  registers the family with timm
from data.common.results import record_result
from pretrain.engine.precision import DTYPES
from pretrain.model.depthwise import DepthwiseConv2d
from pretrain.model.fast import cpu as on_cpu
from pretrain.model.van import Mlp

TRIED = ["bf16", "fp32"]
RESULT = Path(__file__).parents[1] / "results" / "on_cpu.json"
ROUNDS = 5


# Within these, layers train, or are evaluated, by PyTorch's operators.
TRAINED_BY_PYTORCH = partial(mock.patch.object, on_cpu, "trains", return_value=False)
EVALUATED_BY_PYTORCH = partial(mock.patch.object, on_cpu, "infers", return_value=False)


def keep_memory() -> None:
    """Lets glibc give nothing back to the system."""
    libc, trim_threshold, mmap_max = ctypes.CDLL(None), -1, -4  # malloc.h
    libc.mallopt(trim_threshold, 2**31 - 1)
    libc.mallopt(mmap_max, 0)


def smallest_times(step: Callable[[], None], pytorch: Callable[[], AbstractContextManager[Any]]) -> dict[str, float]:
    """Milliseconds of each way, the smallest of several rounds in which both take turns."""
    found: dict[str, list[float]] = {"pytorch_ms": [], "own_ms": []}
    for turn in range(ROUNDS + 1):
        for name, times in found.items():
            with pytorch() if name == "pytorch_ms" else nullcontext():
                began = time.perf_counter()
                step()
            if turn > 0:  # the first warms up
                times.append(1000 * (time.perf_counter() - began))
    return {name: min(times) for name, times in found.items()}


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


def model_steps(name: str, size: int, batch: int, precision: str) -> tuple[Callable[[], None], Callable[[], None]]:
    """A training step, and an evaluation's."""
    net = timm.create_model(name, num_classes=1000)
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--precision", nargs="+", choices=TRIED, default=TRIED, help="the layers are of the first")
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_memory()
    rows: list[dict[str, Any]] = []

    def compare(what: str, step: Callable[[], None], pytorch: Callable[[], AbstractContextManager[Any]] = TRAINED_BY_PYTORCH) -> None:
        times = smallest_times(step, pytorch)
        rows.append({"what": what, **{k: round(v, 2) for k, v in times.items()}, "ratio": round(times["pytorch_ms"] / times["own_ms"], 2)})
        print(f"{what:52} PyTorch {times['pytorch_ms']:8.2f} ms   own {times['own_ms']:8.2f} ms   {rows[-1]['ratio']:5.2f} x", flush=True)

    for dim, stride, ratio in ((32, 4, 8), (64, 8, 8), (160, 16, 4), (256, 32, 4)):
        size = args.image_size // stride
        for kernel_size, dilation in ((5, 1), (7, 3)):
            layer = DepthwiseConv2d(dim, kernel_size, dilation)
            what = f"{dim} channels, {size} px, {kernel_size}x{kernel_size}, dilation {dilation}"
            compare(what, layer_step(layer, dim, size, args.batch, args.precision[0]))
        what = f"{dim} channels, {size} px, MLP of {dim * ratio}"
        compare(what, layer_step(Mlp(dim, dim * ratio), dim, size, args.batch, args.precision[0]))
    for precision in args.precision:
        train, evaluate = model_steps("van_b0", args.image_size, args.batch, precision)
        compare(f"training step of VAN-B0, {args.image_size} px, {precision}", train)
        compare(f"evaluation of VAN-B0, {args.image_size} px, {precision}", evaluate, EVALUATED_BY_PYTORCH)
    command = f"python -m benchmarks.training.on_cpu --image-size {args.image_size} --batch {args.batch}"
    if args.precision != TRIED:
        command += f" --precision {' '.join(args.precision)}"
    instructions = "AVX512 BF16" if torch.cpu._is_avx512_bf16_supported() else torch.backends.cpu.get_cpu_capability()
    record_result(RESULT, command, ["torch"], cpu=instructions, rows=rows)


if __name__ == "__main__":
    main()
