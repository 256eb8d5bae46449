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
from dataclasses import dataclass
from typing import Any, cast

import timm
import torch
import torch.nn.functional as F
from torch import Tensor
from triton.testing import do_bench

from benchmarks.harness import deciles
from pretrain.model.depthwise import DepthwiseConv2d
from pretrain.model.fast.triton import expected_statistics, residual_norm, unusable
from pretrain.model.fast.triton.depthwise import by_taps, conv, conv_tiles, weight_gradient
from pretrain.model.lka import LKA
from pretrain.model.van import VAN, Block

COPY_BYTES = 2**30


@dataclass(frozen=True)
class Layer:
    """A depth-wise convolution on square maps of `size` px, with GELU "after" or "before" it, or with kernel size 0 a joint; the model has
    `count` of them."""

    channels: int
    size: int
    kernel_size: int
    dilation: int = 1
    gelu: str = ""
    count: int = 1

    def __str__(self) -> str:
        kind = f"{self.kernel_size}x{self.kernel_size}" if self.kernel_size else "joint"
        return f"{kind}{f' dilation {self.dilation}' if self.dilation > 1 else ''}, {self.channels} channels, {self.size} px"


@dataclass(frozen=True)
class Part:
    """One computation of a layer, in several ways; `map_bytes` is what it must read and write. The first two ways' results must agree."""

    name: str
    map_bytes: int
    ways: dict[str, Callable[[], Tensor]]


def layers(model_name: str, image_size: int) -> list[Layer]:
    """The depth-wise layers and joints of a model, each kind once."""
    with torch.device("meta"):
        model = cast(VAN, timm.create_model(model_name))
    found: list[Layer] = []
    behind_gelu: DepthwiseConv2d | None = None
    for stage, info in zip(model.stages, model.feature_info, strict=True):
        size = -(-image_size // info["reduction"])
        for module in stage.modules():
            if isinstance(module, LKA):
                behind_gelu = module.conv0
            if isinstance(module, DepthwiseConv2d):
                gelu = "after" if module.gelu else "before" if module is behind_gelu else ""
                found.append(Layer(module.in_channels, size, module.kernel_size[0], module.dilation[0], gelu))
            elif isinstance(module, Block):
                found += 2 * [Layer(info["num_chs"], size, 0)]
    return [Layer(**{**layer.__dict__, "count": found.count(layer)}) for layer in dict.fromkeys(found)]


def usable_gpu() -> torch.device:
    """The GPU, with cuDNN set to choose its algorithms by time.

    Raises:
        ValueError: no GPU, or one that the kernels can't run on.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reason = unusable(device)
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
        for part in (parts if layer.kernel_size else joint_parts)(layer, batch, dtype, device):
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


def joint_parts(layer: Layer, batch: int, dtype: torch.dtype, device: torch.device) -> list[Part]:
    """The end of an attention and the norm behind it, with paths dropped, by Triton and step by step; the sum along the blocks is fp32.
    Bytes are those of the operator's passes, one forward and one backward. The sums that the norm's gradient takes, which
    come from the convolution behind it, are given."""
    shape = (batch, layer.channels, layer.size, layer.size)
    x, branch, shortcut, grad, normed_grad = (torch.randn(shape, device=device).to(memory_format=torch.channels_last) for _ in range(5))
    x, branch, shortcut, normed_grad = x.requires_grad_(), branch.to(dtype).requires_grad_(), shortcut.to(dtype), normed_grad.to(dtype)
    scale, norm = torch.randn(layer.channels, device=device, requires_grad=True), torch.nn.BatchNorm2d(layer.channels, device=device)
    keep = torch.empty(batch, device=device).bernoulli_(0.9) / 0.9

    def by_triton() -> tuple[Tensor, ...]:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            y, normed, _ = residual_norm(x, branch, shortcut, scale, keep, norm, expected_statistics([norm])[0])
        return y, normed.values, normed.affine

    def by_steps() -> tuple[Tensor, ...]:
        y = x + (scale[:, None, None] * (shortcut.float() + branch)) * keep[:, None, None, None]
        return y, F.batch_norm(y, None, None, norm.weight, norm.bias, training=True).to(dtype)

    _, values, affine = by_triton()
    values_grad = normed_grad * affine[0, :, None, None]
    products = (normed_grad.float() * values, normed_grad.float(), values_grad, values_grad * values)
    sums = torch.stack([product.sum((0, 2, 3)) for product in products])

    def backward(results: tuple[Tensor, ...], *grads: Tensor) -> Callable[[], Tensor]:
        leaves = (x, branch, scale, norm.weight, norm.bias)
        return lambda: torch.autograd.grad(results, leaves, grads, retain_graph=True)[0]

    by_kernels = backward(by_triton(), grad, values_grad.to(dtype), sums)
    full, small = x.numel() * 4, branch.numel() * branch.element_size()
    return [
        Part("forward", 2 * full + 3 * small, {"triton": lambda: by_triton()[0], "pytorch_nhwc": lambda: by_steps()[0]}),
        Part("backward", 2 * full + 5 * small, {"triton": by_kernels, "pytorch_nhwc": backward(by_steps(), grad, normed_grad)}),
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
