"""CPU path of a VAN: replaces the operators that train slowly in PyTorch by faster code that computes the same.

    use_cpu_path(model)         # a VAN; evaluation and tracing keep the reference
    restore_reference(model)

oneDNN, which computes PyTorch's convolutions, is slow for depthwise convolutions in three cases: dilation, the weight gradient of kernels
wider than three columns, and the weight gradient of maps smaller than the kernel. And the MLP's hidden maps, four to eight times as large
as the block's, pass through memory between any two operators.

- **A convolution with dilation d is d * d plain convolutions.** Positions with equal (row mod d, column mod d) form a smaller map, a phase,
  on which the dilated kernel is a plain one. The phases become images of the batch. The sums are the same, bit for bit.
- **The input gradient is a forward convolution** with the kernel rotated by 180 degrees.
- **The weight gradient is computed for three kernel columns at a time**, for which oneDNN has fast code. Where half of the kernel spans
  the whole map, the weight gradient of each tap is a product and a sum over the positions at which the tap overlaps the map.
- **The MLP processes a few images at a time**, forward and backward, so that each operator finds its input in the cache.

docs/performance.md compares times with PyTorch's operators.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.model import van
from pretrain.model.fast.swap import swap_class

# Bytes of the MLP's hidden map that are processed at a time: about the size of a core's private cache.
_BYTES_AT_A_TIME = 2 * 2**20


def use_cpu_path(model: nn.Module) -> None:
    """Swaps the classes of a VAN's modules for those of this file; parameters, their names and the state dict stay."""
    for module in model.modules():
        if isinstance(module, van.LKA):
            for convolution in (module.conv0, module.conv_spatial):
                if convolution.kernel_size[0] % 2:
                    swap_class(convolution, DepthwiseConv2d)
        elif isinstance(module, van.Attention):
            swap_class(module.act, GELU)
        elif isinstance(module, van.Mlp):
            if module.drop1.p == 0:
                swap_class(module, Mlp)
            else:
                swap_class(module.act, GELU)
                swap_class(module.dwconv, DepthwiseConv2d)


def restore_reference(model: nn.Module) -> None:
    """Undoes `use_cpu_path`."""
    for module in model.modules():
        if isinstance(module, DepthwiseConv2d | Mlp | GELU):
            swap_class(module, type(module).__bases__[0])


class DepthwiseConv2d(nn.Conv2d):
    """A depthwise nn.Conv2d with an odd, square kernel and stride 1, padded to keep the size of the map."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, C, H, W) to (N, C, H, W)."""
        if self.training or (self.dilation[0] > 1 and torch.is_inference_mode_enabled()):
            return depthwise_conv2d(x, self.weight, self.bias, self.dilation[0])
        return super().forward(x)


class GELU(nn.GELU):
    """nn.GELU of a channels-last map, viewed as contiguous NHWC, because oneDNN's code takes only contiguous tensors."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, C, H, W) to (N, C, H, W)."""
        return gelu(x) if self.training else super().forward(x)


class Mlp(van.Mlp):
    """VAN's MLP without dropout between its layers. Forward hooks of fc1, dwconv, act and fc2 do not run in training."""

    reads_child_parameters = True

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, dim, H, W) to (N, dim, H, W)."""
        return self.drop2(mlp(x, self.fc1, self.dwconv, self.fc2)) if self.training else super().forward(x)


def depthwise_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    """Returns the depthwise convolution of a map, padded to keep its size.

    Args:
        x: (N, C, H, W).
        weight: (C, 1, K, K), K odd.
        bias: (C,).

    Returns:
        (N, C, H, W), channels-last.
    """
    return _DepthwiseConv2d.apply(x, weight, bias, dilation)


def gelu(x: Tensor) -> Tensor:
    """Returns GELU of a channels-last map (N, C, H, W), computed on its NHWC view."""
    return F.gelu(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def mlp(x: Tensor, expand: nn.Conv2d, depthwise: nn.Conv2d, reduce: nn.Conv2d) -> Tensor:
    """Applies 1x1 convolution, depthwise convolution, GELU and 1x1 convolution to a map, a few images at a time.

    Under autocast all tensors are cast as F.conv2d casts them. Weight gradients are accumulated in fp32.

    Args:
        x: (N, dim, H, W).
        expand: 1x1 convolution from dim to more channels.
        depthwise: as in `depthwise_conv2d`, without dilation.
        reduce: 1x1 convolution back to dim.

    Returns:
        (N, dim, H, W), channels-last.
    """
    return _Mlp.apply(x, *(t for layer in (expand, depthwise, reduce) for t in (layer.weight, layer.bias)))


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
            grad_x = _plain_conv2d(grad_phases, _rotated(weight, grad.dtype), None)
            grad_x = _join_phases(grad_x, ctx.dilation, *grad.shape[2:]).to(phases.dtype)
        grad_weight = _weight_gradient(phases.to(grad.dtype), grad_phases, weight.shape[-1])
        return grad_x, grad_weight.to(weight.dtype), grad.sum((0, 2, 3)).to(weight.dtype), None


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> Tensor:
        ctx.dtypes = [t.dtype for t in (x, *weights)]
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        x = x.to(dtype, memory_format=torch.channels_last)
        expand, expand_bias, depthwise, depthwise_bias, reduce, reduce_bias = (t.to(dtype) for t in weights)
        ctx.images_at_a_time = max(1, _BYTES_AT_A_TIME // (x[0, 0].numel() * len(expand) * x.element_size()))
        saved, results = [], []
        for images in x.split(ctx.images_at_a_time):
            wide = F.conv2d(images, expand, expand_bias)
            mixed = _plain_conv2d(wide, depthwise, depthwise_bias)
            active = gelu(mixed)
            results.append(F.conv2d(active, reduce, reduce_bias))
            saved += [wide, mixed, active]
        ctx.save_for_backward(x, expand, depthwise, reduce, *saved)
        return torch.cat(results)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        x, expand, depthwise, reduce, *saved = ctx.saved_tensors
        rotated, k = _rotated(depthwise, grad.dtype), depthwise.shape[-1]
        sums = [_in_fp32(x.new_zeros(shape)) for weight in (expand, depthwise, reduce) for shape in (weight.shape, len(weight))]
        grads_x = []
        for i, (images, g) in enumerate(zip(x.split(ctx.images_at_a_time), grad.split(ctx.images_at_a_time), strict=True)):
            wide, mixed, active = saved[3 * i : 3 * i + 3]
            result_grad = _pixels(g)
            mixed_grad = torch.ops.aten.gelu_backward(result_grad @ reduce.flatten(1), _pixels(mixed))
            wide_grad = _pixels(_plain_conv2d(_maps(mixed_grad, g), rotated, None))
            grads_x.append(_maps(wide_grad @ expand.flatten(1), g))
            parts = [wide_grad.t() @ _pixels(images), wide_grad.sum(0)]
            parts += [_weight_gradient(wide, _maps(mixed_grad, g), k), mixed_grad.sum(0)]
            parts += [result_grad.t() @ _pixels(active), result_grad.sum(0)]
            for total, part in zip(sums, parts, strict=True):
                total += part.view_as(total)
        return tuple(t.to(dtype) for t, dtype in zip([torch.cat(grads_x), *sums], ctx.dtypes, strict=True))


def _plain_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=weight.shape[0])


def _rotated(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.flip(2, 3).to(dtype)


def _pixels(x: Tensor) -> Tensor:
    """Returns a channels-last map (N, C, H, W) as rows (N * H * W, C)."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _maps(pixels: Tensor, like: Tensor) -> Tensor:
    """Inverts `_pixels`, for a map with the batch, height and width of `like`."""
    return pixels.view(like.shape[0], *like.shape[2:], -1).permute(0, 3, 1, 2)


def _in_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _padded(x: Tensor, left: int, right: int, rows_after: int) -> Tensor:
    return F.pad(x.permute(0, 2, 3, 1), (0, 0, left, right, 0, rows_after)).permute(0, 3, 1, 2)


def _split_phases(x: Tensor, d: int) -> Tensor:
    """Maps (N, C, H, W) to its phases (d * d * N, C, H / d, W / d), padded with zeros to round up; channels-last like x."""
    if d == 1:
        return x
    n, c, height, width = x.shape
    rows, columns = -(-height // d), -(-width // d)
    nhwc = _padded(x, 0, columns * d - width, rows * d - height).permute(0, 2, 3, 1)
    return nhwc.view(n, rows, d, columns, d, c).permute(2, 4, 0, 1, 3, 5).reshape(d * d * n, rows, columns, c).permute(0, 3, 1, 2)


def _join_phases(y: Tensor, d: int, height: int, width: int) -> Tensor:
    """Inverts `_split_phases` for maps of this height and width."""
    if d == 1:
        return y
    n, c, rows, columns = y.shape[0] // (d * d), *y.shape[1:]
    nhwc = y.permute(0, 2, 3, 1).reshape(d, d, n, rows, columns, c).permute(2, 3, 0, 4, 1, 5).reshape(n, rows * d, columns * d, c)
    return nhwc[:, :height, :width].permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)


def _weight_gradient(x: Tensor, grad: Tensor, k: int) -> Tensor:
    """Returns (C, 1, k, k): for each tap (dy, dx) the sum over images and positions of grad[y, x] * x[y + dy, x + dx]."""
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():  # PyTorch's own loops are slow, and round partial sums
        x, grad = _in_fp32(x), _in_fp32(grad)
    if 2 * min(x.shape[2:]) <= k:
        return _weight_gradient_by_taps(_in_fp32(x), _in_fp32(grad), k)
    rows_after = k - x.shape[2]
    if rows_after > 0:  # oneDNN's fast code needs at least as many rows as the kernel has
        x, grad = _padded(x, 0, 0, rows_after), _padded(grad, 0, 0, rows_after)
    outer = max(0, k - 3) // 2
    groups = [(0, outer), (outer, k - 2 * outer), (k - outer, outer)]
    return torch.cat([_columns_gradient(x, grad, k, first, count) for first, count in groups if count > 0], dim=3)


def _columns_gradient(x: Tensor, grad: Tensor, k: int, first: int, count: int) -> Tensor:
    """Returns `_weight_gradient` for `count` columns of the kernel, starting at `first`: (C, 1, k, count)."""
    left, right = k // 2 - first, first + count - 1 - k // 2  # reach of the columns to either side of the middle one
    padding = left if left == right else 0
    if padding == 0:
        x = _padded(x, left, right, 0)
    options = (None, [1, 1], [k // 2, padding], [1, 1], False, [0, 0], x.shape[1], (False, True, False))
    return torch.ops.aten.convolution_backward(grad, x, x.new_empty(x.shape[1], 1, k, count), *options)[1]


def _weight_gradient_by_taps(x: Tensor, grad: Tensor, k: int) -> Tensor:
    height, width = x.shape[2:]
    result = x.new_zeros(k, k, x.shape[1])
    for i in range(k):
        dy = i - k // 2
        for j in range(k):
            dx = j - k // 2
            if abs(dy) < height and abs(dx) < width:
                outputs = grad[:, :, max(0, -dy) : height - max(0, dy), max(0, -dx) : width - max(0, dx)]
                inputs = x[:, :, max(0, dy) : height - max(0, -dy), max(0, dx) : width - max(0, -dx)]
                result[i, j] = (outputs * inputs).sum((0, 2, 3))
    return result.permute(2, 0, 1).unsqueeze(1)
