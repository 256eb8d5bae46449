"""Times VAN's depthwise convolutions and residual adds on a GPU: Triton kernels against PyTorch's operators in both memory layouts.

    python -m benchmarks.training --gpu --only layers [--model van_b3 …] [--image-size 224] [--batch 64] [--precision bf16]

Each distinct layer is timed in isolation: forward, input gradient and weight gradient, with the L2 cache cleared before every run. A row's
`share_of_copy` counts each of the layer's maps once, read or written, and divides these bytes per second by those of a copy measured in
the same process. `difference` compares the results of Triton and PyTorch.

PyTorch's operator is cuDNN in channels-last layout, and cuDNN or a native kernel in contiguous layout. Its weights are cast to the
activations' type beforehand. Triton's times include reordering the weights, which every call of its operator needs.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from triton.testing import do_bench

from benchmarks.harness import deciles, time_call
from pretrain.model.fast.triton import why_unusable
from pretrain.model.fast.triton.depthwise import by_taps, conv, conv_tiles, weight_gradient
from pretrain.model.fast.triton.residual import scaled_residual
from pretrain.model.van import VAN, Block

COPY_BYTES = {"cuda": 2**30, "cpu": 2**24}  # too large for caches


@dataclass(frozen=True)
class Layer:
    """A depthwise convolution on square maps of `size` px, or with kernel size 0 a residual add.

    `gelu` is "after" or "before" if a GELU follows or precedes the convolution; `count` is the number in the model.
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
    """One computation of a layer. `cases`: by Triton first, then by PyTorch; `map_bytes`: bytes that it must read and write."""

    name: str
    map_bytes: int
    cases: dict[str, Callable[[], Tensor]]


def layers(model_name: str, image_size: int) -> list[Layer]:
    """Returns the distinct depthwise convolutions and residual adds of a model."""
    with torch.device("meta"):
        model = cast(VAN, timm.create_model(model_name))
    result = []
    for stage, info in zip(model.stages, model.feature_info, strict=True):
        size, blocks = -(-image_size // info["reduction"]), cast(nn.Sequential, stage.blocks)
        block = cast(Block, blocks[0])
        lka = block.attn.spatial_gating_unit
        for convolution, gelu in ((lka.conv0, "before"), (lka.conv_spatial, ""), (block.mlp.dwconv, "after")):
            kernel_size, dilation = convolution.kernel_size[0], convolution.dilation[0]
            result.append(Layer(convolution.in_channels, size, kernel_size, dilation, gelu, count=len(blocks)))
        result.append(Layer(info["num_chs"], size, 0, count=2 * len(blocks)))
    return result


def usable_gpu() -> torch.device:
    """Returns the GPU, and makes cuDNN benchmark its algorithms.

    Raises:
        ValueError: there is no GPU, or the kernels can't run on it.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reason = why_unusable(nn.Identity(), device)
    if reason is not None:
        raise ValueError(f"--gpu can't run here: {reason}")
    torch.backends.cudnn.benchmark = True
    return device


def measure(chosen: list[Layer], batch: int, dtype: torch.dtype, device: torch.device) -> tuple[float, list[dict[str, Any]]]:
    """Returns the bytes/s of a copy, and a row for each part of each layer."""
    copy = copy_bytes_per_s(device)
    rows: list[dict[str, Any]] = []
    for layer in chosen:
        torch.manual_seed(0)
        for part in (convolution_parts if layer.kernel_size else residual_parts)(layer, batch, dtype, device):
            row: dict[str, Any] = {"layer": str(layer), "count": layer.count, "part": part.name, "map_bytes": part.map_bytes}
            for case, run in part.cases.items():
                times = deciles(times_ms(run, device))
                row |= {f"{case}_ms": times, f"{case}_share_of_copy": part.map_bytes / (times["median"] / 1000) / copy}
            rows.append(row | {"difference": difference(part)})
            print(f"{layer!s:42} {part.name}", flush=True)
    return copy, rows


def convolution_parts(layer: Layer, batch: int, dtype: torch.dtype, device: torch.device) -> list[Part]:
    """Returns the forward pass and the gradients of a convolution and its GELU."""
    k, dilation, channels = layer.kernel_size, layer.dilation, layer.channels
    shape = (batch, channels, layer.size, layer.size)
    x, grad = (torch.randn(shape, device=device).to(dtype).to(memory_format=torch.channels_last) for _ in range(2))
    weight, bias = torch.randn(channels, 1, k, k, device=device) / k, torch.randn(channels, device=device)
    cast_weight, cast_bias = weight.to(dtype), bias.to(dtype)
    map_bytes = x.numel() * x.element_size()
    # A convolution with a GELU follows a 1x1 convolution, whose bias gradient is the sum of the input gradient.
    partial = torch.empty(conv_tiles(x, by_taps(weight), dilation), channels, device=device) if layer.gelu else None

    def forward(x: Tensor) -> Tensor:
        return F.conv2d(x, cast_weight, cast_bias, padding=dilation * (k // 2), dilation=dilation, groups=channels)

    def gradients(x: Tensor, grad: Tensor, *wanted: bool) -> tuple[Tensor, Tensor, Tensor]:
        padding, dilations = [dilation * (k // 2)] * 2, [dilation] * 2
        arguments = ([channels], [1, 1], padding, dilations, False, [0, 0], channels, wanted)
        return torch.ops.aten.convolution_backward(grad, x, cast_weight, *arguments)

    def input_gradient(x: Tensor, grad: Tensor) -> Tensor:
        return gradients(x, grad, True, False, False)[0]

    def triton_input_gradient(**gelu: Any) -> Tensor:
        return conv(grad, by_taps(weight), None, dilation, flip=True, partial=partial, **gelu)

    def make_part(name: str, maps: int, triton: Callable[[], Tensor], pytorch: Callable[[Tensor, Tensor], Tensor]) -> Part:
        contiguous = x.contiguous(), grad.contiguous()
        cases = {"triton": triton, "pytorch_nhwc": lambda: pytorch(x, grad), "pytorch_nchw": lambda: pytorch(*contiguous)}
        return Part(name, maps * map_bytes, cases)

    parts = [
        make_part("forward", 2, lambda: conv(x, by_taps(weight), bias, dilation), lambda x, grad: forward(x)),
        make_part(
            "weight gradient",
            2,
            lambda: weight_gradient(x, grad, weight, dilation)[0],
            lambda x, grad: gradients(x, grad, False, True, True)[1],
        ),
    ]
    if layer.gelu == "before":  # `grad` also serves as the gradient from the gate, and `x` as the GELU's input
        gate = torch.ops.van.gate_backward.default
        return [
            *parts,
            make_part(
                "input gradient, GELU's",
                4,
                lambda: triton_input_gradient(gelu="gradient before", grad=grad, inner=x),
                lambda x, grad: torch.ops.aten.gelu_backward(input_gradient(x, grad) + grad, x),
            ),
            make_part("gate's gradients", 5, lambda: gate(grad, x, grad)[1], lambda x, grad: (grad * grad, grad * x)[1]),
        ]
    parts.append(make_part("input gradient", 2, triton_input_gradient, input_gradient))
    if layer.gelu == "after":
        with_gelu = lambda: conv(x, by_taps(weight), bias, dilation, gelu="after")  # noqa: E731
        parts.append(make_part("forward, GELU", 2, with_gelu, lambda x, grad: F.gelu(forward(x))))
    return parts


def residual_parts(layer: Layer, batch: int, dtype: torch.dtype, device: torch.device) -> list[Part]:
    """Returns both passes of the residual add after an attention, with stochastic depth; the shortcut along the blocks is fp32."""
    shape = (batch, layer.channels, layer.size, layer.size)
    x, branch, shortcut, grad = (torch.randn(shape, device=device).to(memory_format=torch.channels_last) for _ in range(4))
    x, branch, shortcut = x.requires_grad_(), branch.to(dtype).requires_grad_(), shortcut.to(dtype)
    scale, bias = torch.randn(layer.channels, device=device, requires_grad=True), torch.zeros(layer.channels, device=device)
    keep = torch.empty(batch, device=device).bernoulli_(0.9) / 0.9

    def triton() -> Tensor:
        return scaled_residual(x, branch, shortcut, scale, keep, bias)

    def pytorch() -> Tensor:
        return x + (scale[:, None, None] * (shortcut.float() + branch)) * keep[:, None, None, None]

    def backward(y: Tensor) -> Callable[[], Tensor]:
        return lambda: torch.autograd.grad(y, (branch, scale), grad, retain_graph=True)[0]

    full, small = x.numel() * x.element_size(), branch.numel() * branch.element_size()
    return [
        Part("forward", 2 * full + 2 * small, {"triton": triton, "pytorch_nhwc": pytorch}),
        Part("backward", full + 3 * small, {"triton": backward(triton()), "pytorch_nhwc": backward(pytorch())}),
    ]


def difference(part: Part) -> float:
    """Returns the largest difference between the results of Triton and PyTorch, relative to the largest value."""
    actual, expected = (run().detach().float() for run in list(part.cases.values())[:2])
    return float((actual - expected).abs().max() / expected.abs().max())


def times_ms(run: Callable[[], Tensor], device: torch.device) -> list[float]:
    """Returns the milliseconds of several runs after a warm-up; on a CPU, which only tests use, of three runs without warm-up."""
    if device.type == "cuda":
        return do_bench(run, warmup=50, rep=200, return_mode="all")
    return [1000 * time_call(run) for _ in range(3)]


def copy_bytes_per_s(device: torch.device) -> float:
    """Returns the bytes/s, read and written, of a copy within the device's memory."""
    source = torch.empty(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / (statistics.median(times_ms(lambda: target.copy_(source), device)) / 1000)


def product_flops_per_s(device: torch.device) -> float:
    """Returns the FLOP/s of a large product of two square matrices: bf16 on a GPU, fp32 on a CPU."""
    side, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    matrix = torch.randn(side, side, dtype=dtype, device=device)  # a GPU runs faster on constants
    return 2 * side**3 / (statistics.median(times_ms(lambda: matrix @ matrix, device)) / 1000)
