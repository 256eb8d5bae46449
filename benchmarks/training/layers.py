"""How fast this machine's GPU runs VAN's depth-wise layers: Triton's kernels beside PyTorch's operator in both memory layouts.

    python -m benchmarks.training --gpu --only layers [--model van_b3 …] [--image-size 224] [--batch 64] [--precision bf16]

Each layer of the model that differs from the others is timed by itself, forward, input gradient and weight gradient, with the L2 cache
cleared before every run. Beside the medians stand the bytes a second that the layer's maps amount to, each read or written once, and what
share that is of a copy's, measured in the same process. Before a time is taken both ways' results are compared.

PyTorch's operator, channels-last, is cuDNN; contiguous it is cuDNN or a kernel of PyTorch's own. Both are given weights that are already
in the activations' type. Triton's times hold the reordering of the weights that every call of its operator makes.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import timm
import torch
import torch.nn.functional as F
from torch import Tensor
from triton.testing import do_bench

from benchmarks.harness import deciles
from pretrain.model.fast import triton
from pretrain.model.fast.triton.depthwise import by_taps, conv, conv_tiles, weight_gradient
from pretrain.model.fast.triton.residual import scaled_residual
from pretrain.model.van import LKA, VAN, Block, Mlp

COPY_BYTES = 2**30


@dataclass(frozen=True)
class Layer:
    """A depthwise convolution on square maps of `size` pixels, or with kernel size 0 the end of a residual branch.

    `gelu` is "after" or "before" the convolution, or "". The model has `count` of these layers.
    """

    channels: int
    size: int
    kernel_size: int
    dilation: int = 1
    gelu: str = ""
    count: int = 1

    def __str__(self) -> str:
        kind = f"{self.kernel_size}x{self.kernel_size}" if self.kernel_size else "residual add"
        return f"{kind}{f' dilation {self.dilation}' if self.dilation > 1 else ''}, {self.channels} channels, {self.size} px"


@dataclass(frozen=True)
class Part:
    """One computation of a layer, in several ways; `map_bytes` is what it must read and write. The first two ways' results must agree."""

    name: str
    map_bytes: int
    ways: dict[str, Callable[[], Tensor]]


def layers(model_name: str, image_size: int) -> list[Layer]:
    """Returns the depthwise convolutions and residual adds of a model, each kind once."""
    with torch.device("meta"):
        model = cast(VAN, timm.create_model(model_name))
    kinds: list[Layer] = []
    for stage, info in zip(model.stages, model.feature_info, strict=True):
        channels, size = info["num_chs"], -(-image_size // info["reduction"])
        for module in stage.modules():
            if isinstance(module, LKA):
                kinds += [_convolution(module.conv0, size, "before"), _convolution(module.conv_spatial, size, "")]
            elif isinstance(module, Mlp):
                kinds.append(_convolution(module.dwconv, size, "after"))
            elif isinstance(module, Block):
                kinds += 2 * [Layer(channels, size, 0)]
    return [replace(layer, count=kinds.count(layer)) for layer in dict.fromkeys(kinds)]


def _convolution(convolution: torch.nn.Conv2d, size: int, gelu: str) -> Layer:
    return Layer(convolution.in_channels, size, convolution.kernel_size[0], convolution.dilation[0], gelu)


def usable_gpu() -> torch.device:
    """The GPU, with cuDNN set to choose its algorithms by time.

    Raises:
        ValueError: no GPU, or one that the kernels can't run on.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reason = triton.why_unusable(torch.nn.Identity(), device)
    if reason is not None:
        raise ValueError(f"--gpu can't run here: {reason}")
    torch.backends.cudnn.benchmark = True
    return device


def measure(chosen: list[Layer], batch: int, dtype: torch.dtype, device: torch.device) -> tuple[float, list[dict[str, Any]]]:
    """Returns the bytes/s of a copy, and a row for each part of each layer, which is also printed."""
    copy = copy_bytes_per_s(device)
    print(f"a copy moves {copy / 1e9:.0f} GB/s; in brackets the share of that", flush=True)
    rows: list[dict[str, Any]] = []
    for layer in chosen:
        torch.manual_seed(0)
        for part in (parts if layer.kernel_size else residual_parts)(layer, batch, dtype, device):
            row: dict[str, Any] = {**layer.__dict__, "part": part.name, "map_bytes": part.map_bytes, "difference": difference(part)}
            for way, run in part.ways.items():
                row[way] = summary(times_ms(run, device), part.map_bytes, copy)
            rows.append(row)
            times = "  ".join(f"{way} {row[way]['median_ms']:8.3f} ms ({row[way]['share_of_copy']:4.0%})" for way in part.ways)
            print(f"{layer!s:42} {part.name:16} {times}  differ by {row['difference']:.1e}", flush=True)
    return copy, rows


def parts(layer: Layer, batch: int, dtype: torch.dtype, device: torch.device) -> list[Part]:
    """A convolution's, by Triton and by PyTorch in both layouts."""
    k, dilation = layer.kernel_size, layer.dilation
    shape = (batch, layer.channels, layer.size, layer.size)
    nhwc = [torch.randn(shape, device=device).to(dtype).to(memory_format=torch.channels_last) for _ in range(2)]
    nchw = [t.contiguous() for t in nhwc]
    weight, bias = torch.randn(layer.channels, 1, k, k, device=device) / k, torch.randn(layer.channels, device=device)
    cast_weight, cast_bias = weight.to(dtype), bias.to(dtype)
    map_bytes = nhwc[0].numel() * nhwc[0].element_size()

    def forward(x: Tensor) -> Tensor:
        return F.conv2d(x, cast_weight, cast_bias, padding=dilation * (k // 2), dilation=dilation, groups=layer.channels)

    def backward(x: Tensor, grad: Tensor, *which: bool) -> tuple[Tensor, Tensor, Tensor]:
        around, steps = [dilation * (k // 2)] * 2, [dilation] * 2
        arguments = ([layer.channels], [1, 1], around, steps, False, [0, 0], layer.channels, which)
        return torch.ops.aten.convolution_backward(grad, x, cast_weight, *arguments)

    def three(triton_way: Callable[[], Tensor], pytorch: Callable[[Tensor, Tensor], Tensor]) -> dict[str, Callable[[], Tensor]]:
        return {"triton": triton_way, "pytorch_nhwc": lambda: pytorch(*nhwc), "pytorch_nchw": lambda: pytorch(*nchw)}

    x, grad = nhwc
    # A layer with GELU stands behind a 1x1 convolution, whose bias's gradient is summed on the way.
    tiles = conv_tiles(x, by_taps(weight), dilation)
    partial = torch.empty(tiles, layer.channels, device=device) if layer.gelu else None

    def input_gradient(**how: Any) -> Tensor:
        return conv(grad, by_taps(weight), None, dilation, flip=True, partial=partial, **how)

    def input_gradient_by_pytorch(x: Tensor, grad: Tensor) -> Tensor:
        return backward(x, grad, True, False, False)[0]

    found = [
        Part("forward", 2 * map_bytes, three(lambda: conv(x, by_taps(weight), bias, dilation), lambda x, grad: forward(x))),
        Part("input gradient", 2 * map_bytes, three(input_gradient, input_gradient_by_pytorch)),
        Part(
            "weight gradient",
            2 * map_bytes,
            three(lambda: weight_gradient(x, grad, weight, dilation)[0], lambda x, grad: backward(x, grad, False, True, True)[1]),
        ),
    ]
    if layer.gelu == "after":
        found.append(
            Part(
                "forward, GELU",
                2 * map_bytes,
                three(lambda: conv(x, by_taps(weight), bias, dilation, gelu="after"), lambda x, grad: F.gelu(forward(x))),
            )
        )
    if layer.gelu == "before":  # the convolution's gradient stands for the gate's too, and the input for GELU's
        gate = torch.ops.van.gate_backward.default
        found[1] = Part(
            "input gradient, GELU's",
            4 * map_bytes,
            three(
                lambda: input_gradient(gelu="gradient before", grad=grad, inner=x),
                lambda x, grad: torch.ops.aten.gelu_backward(input_gradient_by_pytorch(x, grad) + grad, x),
            ),
        )
        found.append(
            Part("gate's gradients", 5 * map_bytes, three(lambda: gate(grad, x, grad)[1], lambda x, grad: (grad * grad, grad * x)[1]))
        )
    return found


def residual_parts(layer: Layer, batch: int, dtype: torch.dtype, device: torch.device) -> list[Part]:
    """Returns the end of an attention with stochastic depth, by Triton and by PyTorch; the sum is fp32."""
    shape = (batch, layer.channels, layer.size, layer.size)
    x, branch, shortcut, grad = (torch.randn(shape, device=device).to(memory_format=torch.channels_last) for _ in range(4))
    x, branch, shortcut = x.requires_grad_(), branch.to(dtype).requires_grad_(), shortcut.to(dtype)
    scale, bias = (torch.randn(layer.channels, device=device, requires_grad=True) for _ in range(2))
    keep = torch.empty(batch, device=device).bernoulli_(0.9) / 0.9

    def by_triton() -> Tensor:
        return scaled_residual(x, branch, shortcut, scale, keep, bias)

    def by_pytorch() -> Tensor:
        return x + (scale[:, None, None] * (shortcut.float() + branch)) * keep[:, None, None, None]

    def backward(y: Tensor) -> Callable[[], Tensor]:
        return lambda: torch.autograd.grad(y, (branch, scale), grad, retain_graph=True)[0]

    full, small = x.numel() * 4, branch.numel() * branch.element_size()
    return [
        Part("forward", 2 * full + 2 * small, {"triton": by_triton, "pytorch_nhwc": by_pytorch}),
        Part("backward", full + 3 * small, {"triton": backward(by_triton()), "pytorch_nhwc": backward(by_pytorch())}),
    ]


def difference(part: Part) -> float:
    """Between the results of the first two ways: the largest, over the largest value."""
    one, other = (run().detach().float() for run in list(part.ways.values())[:2])
    return float((one - other).abs().max() / other.abs().max())


def times_ms(run: Callable[[], Tensor], device: torch.device) -> list[float]:
    """Of several runs, after some to warm up. On a CPU, where only tests come, of three."""
    if device.type == "cuda":
        return do_bench(run, warmup=50, rep=200, return_mode="all")
    found = []
    for _ in range(3):
        began = time.perf_counter()
        run()
        found.append(1000 * (time.perf_counter() - began))
    return found


def summary(times: list[float], map_bytes: int, copy: float) -> dict[str, float]:
    """Median and deciles in ms, number of runs, and the median's bytes a second with their share of a copy's."""
    found = deciles(times)
    speed = map_bytes / (found["median"] / 1000)
    return {f"{name}_ms": value for name, value in found.items()} | {
        "runs": len(times), "bytes_per_s": speed, "share_of_copy": speed / copy,
    }  # fmt: skip


def copy_bytes_per_s(device: torch.device) -> float:
    """Read and written, by a copy within the device's memory that is too large for its caches."""
    source = torch.empty(COPY_BYTES if device.type == "cuda" else 2**24, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / (statistics.median(times_ms(lambda: target.copy_(source), device)) / 1000)


def product_flops_per_s(device: torch.device) -> float:
    """Of a product of two square matrices, large enough to be bound by arithmetic: bf16 on a GPU, fp32 on a CPU."""
    side, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    matrix = torch.randn(side, side, dtype=dtype, device=device)  # a GPU runs faster on constants
    return 2 * side**3 / (statistics.median(times_ms(lambda: matrix @ matrix, device)) / 1000)
