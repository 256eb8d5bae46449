"""Depth-wise convolution: PyTorch's operator where that is fast, and other ways where it is not.

VAN spends most of a training step in depth-wise convolutions, and oneDNN, behind PyTorch's operator on a CPU, is slow in three of
their parts: dilation, the weight gradient in bf16, and maps that are smaller than the kernel's reach. DepthwiseConv2d is nn.Conv2d
(same names, same values) with these three done otherwise when it trains on a CPU, and dilation under torch.inference_mode too;
whatever else traces or exports a model meets PyTorch's operator. On a GPU it is that, or the Triton kernel of `pretrain.kernels`
where `pretrain.kernel_choice.use_kernels` chose it.

- **Dilation d as d * d plain convolutions.** Positions of equal (row mod d, column mod d) form a smaller map, a phase, on which the
  dilated kernel is a plain one. The phases are laid side by side in the batch dimension. The sums are the same, bit for bit.
- **The input gradient as a forward convolution** with the kernel turned round.
- **The weight gradient in fp32**; and where the kernel reaches across the whole map, as a product and a sum for each tap, over the
  positions at which it meets the map at all.

`python -m benchmarks.depthwise_cpu` measures this beside PyTorch's operator.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.convolutions import PointwiseConv2d
from pretrain.kernels import Normed, depthwise_conv2d
from pretrain.kernels.trial import convolution_fault

# Kernel sizes and dilations that the Triton kernels are tuned and tested for.
_TRITON_SIZES = ((3, 5, 7), (1, 3))


class DepthwiseConv2d(nn.Conv2d):
    """A convolution of each channel with a kernel of its own, odd and square, with padding that keeps the map's size.

    With `gelu`, GELU follows: the Triton kernel does both at once.
    """

    def __init__(self, dim: int, kernel_size: int, dilation: int = 1, gelu: bool = False) -> None:
        super().__init__(dim, dim, kernel_size, padding=dilation * (kernel_size // 2), dilation=dilation, groups=dim)
        self.gelu = gelu
        self.triton = False

    def triton_fault(self, size: int, dtype: torch.dtype, device: torch.device) -> str | None:
        """Why the Triton kernel can't compute this layer on square maps of `size`; None where it can."""
        k, dilation = self.kernel_size[0], self.dilation[0]
        if k not in _TRITON_SIZES[0] or dilation not in _TRITON_SIZES[1]:
            return "there is no such kernel"
        return convolution_fault(self.in_channels, size, k, dilation, self.gelu, dtype, device)

    def behind(self, convolution: PointwiseConv2d, x: Tensor | Normed) -> Tensor:
        """By the Triton kernel, `forward` of what a 1x1 convolution makes of x, (N, C, H, W) to (N, dim, H, W). Backward, the kernel
        sums the gradient of that one's bias too, for which the map would else be read once more."""
        y, bias = convolution.without_bias_gradient(x)
        return depthwise_conv2d(y, self.weight, self.bias, self.dilation[0], self.gelu, bias)

    def forward(self, x: Tensor) -> Tensor:
        """(N, dim, H, W) to (N, dim, H, W)."""
        if torch.jit.is_scripting():
            y = self._conv_forward(x, self.weight, self.bias)
        else:  # TorchScript leaves out only what stands in the other branch
            if self.triton:
                return depthwise_conv2d(x, self.weight, self.bias, self.dilation[0], self.gelu)
            # A 3x3 is only slow on maps that it reaches across.
            if self.training and x.device.type == "cpu" and (self.kernel_size[0] > 3 or min(x.shape[2:]) <= self.kernel_size[0] - 1):
                y = _TrainedOnCpu.apply(x, self.weight, self.bias, self.dilation[0])
            elif self.dilation[0] > 1 and torch.is_inference_mode_enabled() and x.device.type == "cpu":
                y = _same_convolution(x, self.weight, self.bias, self.dilation[0])
            else:
                y = super().forward(x)
        return F.gelu(y) if self.gelu else y


class _TrainedOnCpu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, dilation: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.dilation = dilation
        return _same_convolution(x, weight, bias, dilation)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = _same_convolution(grad, weight.flip(2, 3).to(grad.dtype), None, ctx.dilation).to(x.dtype)
        exact = torch.promote_types(weight.dtype, torch.float32)
        x, grad = x.to(exact), grad.to(exact)
        reach = ctx.dilation * (weight.shape[-1] - 1)
        by_taps = min(x.shape[2:]) <= reach
        grad_weight = (_weight_gradient_by_taps if by_taps else _weight_gradient)(x, grad, weight, ctx.dilation)
        return grad_x, grad_weight.to(weight.dtype), grad.sum((0, 2, 3)).to(weight.dtype), None


def _same_convolution(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    height, width = x.shape[2:]
    if dilation > 1:
        x = _split_phases(x, dilation)
    y = F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=weight.shape[0])
    return _join_phases(y, dilation, height, width) if dilation > 1 else y


def _split_phases(x: Tensor, d: int) -> Tensor:
    """(N, C, H, W) to (d * d * N, C, H / d, W / d), rounded up with zeros; channels-last as its input."""
    n, c, height, width = x.shape
    rows, columns = -(-height // d), -(-width // d)
    nhwc = F.pad(x.permute(0, 2, 3, 1), (0, 0, 0, columns * d - width, 0, rows * d - height))
    return nhwc.view(n, rows, d, columns, d, c).permute(2, 4, 0, 1, 3, 5).reshape(d * d * n, rows, columns, c).permute(0, 3, 1, 2)


def _join_phases(y: Tensor, d: int, height: int, width: int) -> Tensor:
    """The way back from `_split_phases`."""
    n, c, rows, columns = y.shape[0] // (d * d), *y.shape[1:]
    nhwc = y.permute(0, 2, 3, 1).reshape(d, d, n, rows, columns, c).permute(2, 3, 0, 4, 1, 5).reshape(n, rows * d, columns * d, c)
    return nhwc[:, :height, :width].permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)


def _weight_gradient(x: Tensor, grad: Tensor, weight: Tensor, dilation: int) -> Tensor:
    if dilation > 1:
        x, grad = _split_phases(x, dilation), _split_phases(grad, dilation)
    around = [weight.shape[-1] // 2] * 2
    arguments = (None, [1, 1], around, [1, 1], False, [0, 0], weight.shape[0], (False, True, False))
    return torch.ops.aten.convolution_backward(grad, x, weight.to(x.dtype), *arguments)[1]


def _weight_gradient_by_taps(x: Tensor, grad: Tensor, weight: Tensor, dilation: int) -> Tensor:
    """Sum over images and positions of grad[y, x] * x[y + dy, x + dx], for each tap's shift (dy, dx) that leaves any positions."""
    k = weight.shape[-1]
    height, width = x.shape[2:]
    result = torch.zeros(k, k, weight.shape[0], dtype=x.dtype)
    for i in range(k):
        dy = dilation * (i - k // 2)
        for j in range(k):
            dx = dilation * (j - k // 2)
            if abs(dy) < height and abs(dx) < width:
                here = grad[:, :, max(0, -dy) : height - max(0, dy), max(0, -dx) : width - max(0, dx)]
                there = x[:, :, max(0, dy) : height - max(0, -dy), max(0, dx) : width - max(0, -dx)]
                result[i, j] = (here * there).sum((0, 2, 3))
    return result.permute(2, 0, 1).unsqueeze(1)
