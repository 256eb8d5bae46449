"""VAN's block on the Triton kernels."""

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from pretrain.model import van
from pretrain.model.fast.triton.attention import gate, gelu_conv2d
from pretrain.model.fast.triton.depthwise import depthwise_conv2d
from pretrain.model.fast.triton.residual import scaled_residual


class Block(van.Block):
    """VAN's block without dropout in its MLP.

    The block reads its layers' parameters without calling the layers, so the layers' forward hooks do not run.

    The bias of a 1x1 convolution is added outside of autograd. The bias gradient is the sum of the output gradient, and the kernel that
    computes the output gradient sums it.
    """

    reads_child_parameters = True

    # Weights of matrix products, which autocast casts. The kernels read all other parameters in their stored type.
    matrix_weights = (
        "attn.proj_1.weight",
        "attn.spatial_gating_unit.conv1.weight",
        "attn.proj_2.weight",
        "mlp.fc1.weight",
        "mlp.fc2.weight",
    )

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, dim, H, W) to (N, dim, H, W)."""
        normalized = self.norm1(x)
        branch, bias = self._attention(normalized)
        x = scaled_residual(x, branch, normalized, self.layer_scale_1, draw_keep(self.drop_path, x), bias)
        branch, bias = self._mlp(self.norm2(x))
        return scaled_residual(x, branch, None, self.layer_scale_2, draw_keep(self.drop_path, x), bias)

    def _attention(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the attention of x without its shortcut, and the bias of its last convolution."""
        lka = self.attn.spatial_gating_unit
        assert lka.conv0.bias is not None
        z, z_bias = multiply_pixels(x, self.attn.proj_1)
        z, near = gelu_conv2d(z, lka.conv0.weight, lka.conv0.bias, z_bias)
        distant = depthwise_conv2d(near, lka.conv_spatial.weight, lka.conv_spatial.bias, lka.conv_spatial.dilation[0])
        return multiply_pixels(gate(z, *multiply_pixels(distant, lka.conv1)), self.attn.proj_2)

    def _mlp(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the MLP of x, and the bias of its last convolution."""
        hidden, bias = multiply_pixels(x, self.mlp.fc1)
        hidden = depthwise_conv2d(hidden, self.mlp.dwconv.weight, self.mlp.dwconv.bias, gelu=True, x_bias=bias)
        return multiply_pixels(hidden, self.mlp.fc2)


def multiply_pixels(x: Tensor, convolution: nn.Conv2d) -> tuple[Tensor, Tensor]:
    """Returns the 1x1 convolution of (N, C, H, W) by a matrix product, and its bias, which gets no gradient through the product.

    PyTorch's convolution adds the bias in a separate pass over the map; the matrix product adds it before the first write.
    """
    assert convolution.bias is not None
    n, c, h, w = x.shape
    pixels = x.permute(0, 2, 3, 1).reshape(-1, c)
    y = F.linear(pixels, convolution.weight.flatten(1), convolution.bias.detach())
    return y.view(n, h, w, -1).permute(0, 3, 1, 2), convolution.bias


def draw_keep(drop_path: nn.Module, x: Tensor) -> Tensor | None:
    """Returns stochastic depth's factor for each sample (N,), or None for 1. Draws the same numbers as timm's DropPath."""
    if not isinstance(drop_path, DropPath) or not drop_path.training or drop_path.drop_prob == 0:
        return None
    keep = 1 - drop_path.drop_prob
    return torch.empty(len(x), device=x.device).bernoulli_(keep).div_(keep)
