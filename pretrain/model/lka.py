"""Large Kernel Attention (LKA), the layer that VAN is built of (arXiv 2202.09741, section 3.1 and Figure 3).

A K x K convolution costs K*K weights a channel and mixes channels besides. LKA takes it apart into three convolutions that
together see as far: a depth-wise one for near positions, a dilated depth-wise one for far positions, and a 1x1 one for
channels. Their result is not the output but an attention map: it multiplies the input, channel by channel and position by
position, without a softmax or a sigmoid.

    attention = LKA(dim=64)          # 21 x 21, dilation 3: 5x5, then 7x7 with dilation 3, then 1x1
    y = attention(x)                 # x and y: (N, 64, H, W)
"""

import math

import torch
from torch import nn

from pretrain.model.convolutions import PointwiseConv2d
from pretrain.model.depthwise import DepthwiseConv2d
from pretrain.model.fast.triton import Normed, gated, gelu_conv2d
from pretrain.model.fast.triton.trial import attention_fault


class LKA(nn.Module):
    """Multiplies its input by an attention map computed from a K x K neighbourhood of each position.

    `kernel_size` is K and `dilation` is d of section 3.1: (2d-1) x (2d-1) depth-wise, then ceil(K/d) x ceil(K/d) depth-wise
    with dilation d, then 1x1. The submodules carry the names that the published weights have.
    """

    def __init__(self, dim: int, kernel_size: int = 21, dilation: int = 3) -> None:
        super().__init__()
        self.conv0 = DepthwiseConv2d(dim, 2 * dilation - 1)
        far = math.ceil(kernel_size / dilation)
        self.conv_spatial = DepthwiseConv2d(dim, far, dilation) if far % 2 else _even(dim, far, dilation)
        self.conv1 = PointwiseConv2d(dim, dim)
        self.triton = False

    def triton_fault(self, size: int, dtype: torch.dtype, device: torch.device) -> str | None:
        """Why `behind` can't be on square maps of `size`; None where it can."""
        return attention_fault(self.conv0.in_channels, size, self.conv0.kernel_size[0], dtype, device)

    def behind(self, convolution: PointwiseConv2d, x: torch.Tensor | Normed) -> torch.Tensor:
        """By Triton's kernels, `forward` of GELU of what a 1x1 convolution makes of x. Backward they sum the gradients of two biases too,
        of that one's and conv1's, for which the maps would else be read once more."""
        assert self.conv0.bias is not None
        z, z_bias = convolution.without_bias_gradient(x)
        gelu, near = gelu_conv2d(z, self.conv0.weight, self.conv0.bias, z_bias)
        return gated(gelu, *self.conv1.without_bias_gradient(self.conv_spatial(near)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, dim, H, W) to (N, dim, H, W)."""
        attention = self.conv1(self.conv_spatial(self.conv0(x)))
        return x * attention


def _even(dim: int, kernel_size: int, dilation: int) -> nn.Conv2d:
    """A depth-wise convolution of an even size, which has no middle, and keeps the map's size all the same.

    It needs dilation * (kernel_size - 1) rows and columns of padding in all. Where that is odd no number does, and "same" gives
    the right and the bottom one more.
    """
    around = dilation * (kernel_size - 1)
    padding = around // 2 if around % 2 == 0 else "same"
    return nn.Conv2d(dim, dim, kernel_size, padding=padding, dilation=dilation, groups=dim)
