"""The parts of a VAN that PyTorch's operators are slow at when it trains on a CPU, done otherwise; the values are the same.

oneDNN, behind PyTorch's convolutions, is slow in three parts of a depth-wise one: dilation, the weight gradient of kernels wider than
three, and that of maps smaller than the kernel. And the MLP's maps, of four to eight times as many channels as the block's, go
through memory between any two operators.

- **Dilation d as d * d plain convolutions.** Positions of equal (row mod d, column mod d) form a smaller map, a phase, on which the
  dilated kernel is a plain one. The phases are laid side by side in the batch dimension. The sums are the same, bit for bit.
- **The input gradient as a forward convolution** with the kernel turned round.
- **The weight gradient three columns of the kernel at a time**, which oneDNN has code for; where half of the kernel reaches across the
  whole map, as a product and a sum for each tap, over the positions at which it meets the map at all.
- **The MLP a few images at a time**, forward and backward, so that what one operator writes is in the cache for the next.

`python -m benchmarks.training.on_cpu` measures this beside PyTorch's operators.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Bytes of a hidden map of the MLP that are worked on at a time, about what a core's own cache holds.
_AT_ONCE = 2 * 2**20


def trains(module: nn.Module, x: Tensor) -> bool:
    """Whether `module` is to take x the way of this file. What torch.compile traces meets PyTorch's operators."""
    return not torch.compiler.is_compiling() and module.training and x.device.type == "cpu"


def infers(x: Tensor) -> bool:
    """Whether a dilated convolution is, though it doesn't train."""
    return not torch.compiler.is_compiling() and torch.is_inference_mode_enabled() and x.device.type == "cpu"


def depthwise_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    """F.conv2d of each channel with a kernel of its own, odd and square, with padding that keeps the map's size: (N, C, H, W) with
    weight (C, 1, K, K) and bias (C,) to (N, C, H, W), channels-last."""
    return _DepthwiseConv2d.apply(x, weight, bias, dilation)


def gelu(x: Tensor) -> Tensor:
    """F.gelu of a channels-last map, of its pixels in the order in which they lie: for those PyTorch takes oneDNN's."""
    return F.gelu(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def mlp(x: Tensor, widen: nn.Conv2d, near: nn.Conv2d, narrow: nn.Conv2d) -> Tensor:
    """(N, dim, H, W) to the same by `widen`, a 1x1 convolution to more channels, `near`, a depth-wise one as `depthwise_conv2d` has it,
    GELU, and `narrow`, a 1x1 convolution back. Under autocast all are cast as F.conv2d would cast them; the weights' gradients of a few
    images each are added up in fp32."""
    return _Mlp.apply(x, *(t for layer in (widen, near, narrow) for t in (layer.weight, layer.bias)))


class _DepthwiseConv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
        phases = _split_phases(x, dilation)
        ctx.save_for_backward(phases, weight)
        ctx.dilation = dilation
        return _join_phases(_plain_conv2d(phases, weight, bias), dilation, *x.shape[2:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None]:
        phases, weight = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        grad_phases = _split_phases(grad, ctx.dilation)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = _plain_conv2d(grad_phases, _turned(weight, grad.dtype), None)
            grad_x = _join_phases(grad_x, ctx.dilation, *grad.shape[2:]).to(phases.dtype)
        grad_weight = _weight_gradient(phases.to(grad.dtype), grad_phases, weight.shape[-1])
        return grad_x, grad_weight.to(weight.dtype), grad.sum((0, 2, 3)).to(weight.dtype), None


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> Tensor:
        ctx.dtypes = [t.dtype for t in (x, *weights)]
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        x = x.to(dtype, memory_format=torch.channels_last)
        widen, widen_bias, near, near_bias, narrow, narrow_bias = (t.to(dtype) for t in weights)
        ctx.at_once = max(1, _AT_ONCE // (x[0, 0].numel() * len(widen) * x.element_size()))
        kept, results = [], []
        for images in x.split(ctx.at_once):
            wide = F.conv2d(images, widen, widen_bias)
            mixed = _plain_conv2d(wide, near, near_bias)
            active = gelu(mixed)
            results.append(F.conv2d(active, narrow, narrow_bias))
            kept += [wide, mixed, active]
        ctx.save_for_backward(x, widen, near, narrow, *kept)
        return torch.cat(results)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        x, widen, near, narrow, *kept = ctx.saved_tensors
        turned, k = _turned(near, grad.dtype), near.shape[-1]
        sums = [_exact(x.new_zeros(shape)) for weight in (widen, near, narrow) for shape in (weight.shape, len(weight))]
        grads_x = []
        for i, (images, g) in enumerate(zip(x.split(ctx.at_once), grad.split(ctx.at_once), strict=True)):
            wide, mixed, active = kept[3 * i : 3 * i + 3]
            of_result = _pixels(g)
            of_mixed = torch.ops.aten.gelu_backward(of_result @ narrow.flatten(1), _pixels(mixed))
            of_wide = _pixels(_plain_conv2d(_maps(of_mixed, g), turned, None))
            grads_x.append(_maps(of_wide @ widen.flatten(1), g))
            parts = [of_wide.t() @ _pixels(images), of_wide.sum(0)]
            parts += [_weight_gradient(wide, _maps(of_mixed, g), k), of_mixed.sum(0)]
            parts += [of_result.t() @ _pixels(active), of_result.sum(0)]
            for total, part in zip(sums, parts, strict=True):
                total += part.view_as(total)
        return tuple(t.to(dtype) for t, dtype in zip([torch.cat(grads_x), *sums], ctx.dtypes, strict=True))


def _plain_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=weight.shape[0])


def _turned(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.flip(2, 3).to(dtype)


def _pixels(x: Tensor) -> Tensor:
    """(N, C, H, W), channels-last, to (N * H * W, C)."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _maps(pixels: Tensor, like: Tensor) -> Tensor:
    """The way back from `_pixels` of as many positions as `like` has."""
    return pixels.view(like.shape[0], *like.shape[2:], -1).permute(0, 3, 1, 2)


def _exact(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _padded(x: Tensor, left: int, right: int, below: int) -> Tensor:
    return F.pad(x.permute(0, 2, 3, 1), (0, 0, left, right, 0, below)).permute(0, 3, 1, 2)


def _split_phases(x: Tensor, d: int) -> Tensor:
    """(N, C, H, W) to (d * d * N, C, H / d, W / d), rounded up with zeros; channels-last as its input."""
    if d == 1:
        return x
    n, c, height, width = x.shape
    rows, columns = -(-height // d), -(-width // d)
    nhwc = _padded(x, 0, columns * d - width, rows * d - height).permute(0, 2, 3, 1)
    return nhwc.view(n, rows, d, columns, d, c).permute(2, 4, 0, 1, 3, 5).reshape(d * d * n, rows, columns, c).permute(0, 3, 1, 2)


def _join_phases(y: Tensor, d: int, height: int, width: int) -> Tensor:
    """The way back from `_split_phases`."""
    if d == 1:
        return y
    n, c, rows, columns = y.shape[0] // (d * d), *y.shape[1:]
    nhwc = y.permute(0, 2, 3, 1).reshape(d, d, n, rows, columns, c).permute(2, 3, 0, 4, 1, 5).reshape(n, rows * d, columns * d, c)
    return nhwc[:, :height, :width].permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)


def _weight_gradient(x: Tensor, grad: Tensor, k: int) -> Tensor:
    """Sum over images and positions of grad[y, x] * x[y + dy, x + dx], (C, 1, k, k), for each tap's shift (dy, dx)."""
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():  # PyTorch's loops that step in are slow, and round their partial sums
        x, grad = _exact(x), _exact(grad)
    if 2 * min(x.shape[2:]) <= k:
        return _weight_gradient_by_taps(_exact(x), _exact(grad), k)
    below = k - x.shape[2]
    if below > 0:  # oneDNN's code for it wants as many rows as the kernel has
        x, grad = _padded(x, 0, 0, below), _padded(grad, 0, 0, below)
    outer = max(0, k - 3) // 2
    groups = [(0, outer), (outer, k - 2 * outer), (k - outer, outer)]
    return torch.cat([_columns_gradient(x, grad, k, first, count) for first, count in groups if count > 0], dim=3)


def _columns_gradient(x: Tensor, grad: Tensor, k: int, first: int, count: int) -> Tensor:
    """`_weight_gradient` of `count` columns of the kernel from `first` on, (C, 1, k, count)."""
    left, right = k // 2 - first, first + count - 1 - k // 2  # what they reach to either side
    around = left if left == right else 0
    if around == 0:
        x = _padded(x, left, right, 0)
    options = (None, [1, 1], [k // 2, around], [1, 1], False, [0, 0], x.shape[1], (False, True, False))
    return torch.ops.aten.convolution_backward(grad, x, x.new_empty(x.shape[1], 1, k, count), *options)[1]


def _weight_gradient_by_taps(x: Tensor, grad: Tensor, k: int) -> Tensor:
    height, width = x.shape[2:]
    result = x.new_zeros(k, k, x.shape[1])
    for i in range(k):
        dy = i - k // 2
        for j in range(k):
            dx = j - k // 2
            if abs(dy) < height and abs(dx) < width:
                here = grad[:, :, max(0, -dy) : height - max(0, dy), max(0, -dx) : width - max(0, dx)]
                there = x[:, :, max(0, dy) : height - max(0, -dy), max(0, dx) : width - max(0, -dx)]
                result[i, j] = (here * there).sum((0, 2, 3))
    return result.permute(2, 0, 1).unsqueeze(1)
