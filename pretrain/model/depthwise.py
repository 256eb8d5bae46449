"""Depth-wise convolution: PyTorch's operator where that is fast, and other ways where it is not.

VAN spends most of a training step in depth-wise convolutions. DepthwiseConv2d is nn.Conv2d (same names, same values) that goes other
ways when it trains on a CPU, and for dilation under torch.inference_mode too (`pretrain.model.fast.cpu`); whatever else traces or exports a
model meets PyTorch's operator. On a GPU it is that, or the Triton kernel of `pretrain.model.fast.triton` where
`pretrain.model.fast.kernel_choice.use_kernels` chose it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.model.convolutions import PointwiseConv2d
from pretrain.model.fast import cpu as on_cpu
from pretrain.model.fast.triton import Normed, depthwise_conv2d
from pretrain.model.fast.triton.trial import convolution_fault

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
            if on_cpu.trains(self, x) or (self.dilation[0] > 1 and on_cpu.infers(x)):
                y = on_cpu.depthwise_conv2d(x, self.weight, self.bias, self.dilation[0])
            else:
                y = super().forward(x)
        return F.gelu(y) if self.gelu else y
