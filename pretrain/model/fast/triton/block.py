"""VAN's block on Triton's kernels: what is computed between its parameters, in one place."""

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from pretrain.model import van
from pretrain.model.fast.triton.attention import gated, gelu_conv2d
from pretrain.model.fast.triton.depthwise import depthwise_conv2d
from pretrain.model.fast.triton.residual import scaled_residual


class Block(van.Block):
    """VAN's block without dropout in its MLP.

    The block reads the parameters of its layers and does not call the layers, so their forward hooks are not called.

    The bias of a 1x1 convolution is added outside of autograd. Its gradient is the sum of the gradient of the convolution's output,
    which the kernel that computes that gradient has at hand.
    """

    reads_child_parameters = True

    # Weights of matrix products, which autocast casts. Kernels read all other parameters as they are stored.
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
        """Returns the attention of x without its shortcut, and the bias at its end."""
        lka = self.attn.spatial_gating_unit
        assert lka.conv0.bias is not None
        z, z_bias = multiply_pixels(x, self.attn.proj_1)
        z, near = gelu_conv2d(z, lka.conv0.weight, lka.conv0.bias, z_bias)
        distant = depthwise_conv2d(near, lka.conv_spatial.weight, lka.conv_spatial.bias, lka.conv_spatial.dilation[0])
        return multiply_pixels(gated(z, *multiply_pixels(distant, lka.conv1)), self.attn.proj_2)

    def _mlp(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the MLP of x, and the bias at its end."""
        hidden, bias = multiply_pixels(x, self.mlp.fc1)
        hidden = depthwise_conv2d(hidden, self.mlp.dwconv.weight, self.mlp.dwconv.bias, gelu=True, x_bias=bias)
        return multiply_pixels(hidden, self.mlp.fc2)


def multiply_pixels(x: Tensor, convolution: nn.Conv2d) -> tuple[Tensor, Tensor]:
    """Returns a 1x1 convolution of (N, C, H, W), computed as a matrix product, and its bias, which gets no gradient through the product.

    PyTorch's convolution adds the bias in a pass of its own over the map; the product adds it before the first write.
    """
    assert convolution.bias is not None
    n, c, h, w = x.shape
    pixels = x.permute(0, 2, 3, 1).reshape(-1, c)
    y = F.linear(pixels, convolution.weight.flatten(1), convolution.bias.detach())
    return y.view(n, h, w, -1).permute(0, 3, 1, 2), convolution.bias


def draw_keep(drop_path: nn.Module, x: Tensor) -> Tensor | None:
    """Returns (N,) of what stochastic depth multiplies each sample by, or None for 1. Draws the numbers that timm's DropPath draws."""
    if not isinstance(drop_path, DropPath) or not drop_path.training or drop_path.drop_prob == 0:
        return None
    keep = 1 - drop_path.drop_prob
    return torch.empty(len(x), device=x.device).bernoulli_(keep).div_(keep)
