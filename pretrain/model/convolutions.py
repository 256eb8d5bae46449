"""The dense convolutions of VAN, for channels-last activations: those of the patch embeddings, and the 1x1 ones.

Both are nn.Conv2d to all others: same names, same shapes in a state dict, same values.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from pretrain.model.fast.triton import Normed, fold_norm


class ChannelsLastConv2d(nn.Conv2d):
    """A convolution whose weight lies channels-last in memory and yet is a contiguous parameter.

    Convolution libraries want a channels-last weight for channels-last activations, and convert an ordinary one at every step.
    A parameter with channels-last strides won't do: DeepSpeed broadcasts and flattens parameters as contiguous bytes. So the
    parameter has the shape (out, kh, kw, in), and forward permutes it to the usual (out, in, kh, kw), which costs nothing. It
    is worth having for dense kernels larger than 1x1; 1x1 and depth-wise weights are the same bytes either way.

    The state dict shows the usual shape, contiguous, and load_state_dict takes it; the tensor shown is a copy, or with
    `keep_vars` a view through which gradients reach the parameter.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, padding: int = 0) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding)
        self.weight = nn.Parameter(self.weight.detach().permute(0, 2, 3, 1).contiguous())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in, H, W) to (N, out, H', W')."""
        return self._conv_forward(x, self.weight.permute(0, 3, 1, 2), self.bias)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        weight = destination[prefix + "weight"].permute(0, 3, 1, 2)
        destination[prefix + "weight"] = weight if keep_vars else weight.contiguous()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        key = prefix + "weight"
        # A weight of another rank is left as it is: load_state_dict reports it as a size mismatch.
        if key in state_dict and state_dict[key].ndim == 4:
            state_dict[key] = state_dict[key].permute(0, 2, 3, 1).contiguous()
        super()._load_from_state_dict(state_dict, prefix, *args)


class PointwiseConv2d(nn.Conv2d):
    """A 1x1 convolution, which on channels-last activations is a matrix product.

    With `by_linear` it is computed as one. On a GPU PyTorch's convolution adds the bias in a pass of its own, which reads and writes the
    whole map again; in the product it is added before the first write. On a CPU both take as long. With `triton` it stands in training
    behind a `Normed`, so that its weight and bias are read by a kernel, as they are stored.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1)
        self.by_linear = False
        self.triton = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in, H, W) to (N, out, H, W)."""
        return self._product(x, self.bias)

    def without_bias_gradient(self, x: torch.Tensor | Normed) -> tuple[torch.Tensor, torch.Tensor]:
        """`forward`, and the bias in it, whose gradient something else computes, where it has that of this map at hand. Of what is normed
        it takes the values, and what is left of the norm into its own weight and bias."""
        assert self.bias is not None
        if isinstance(x, Normed):
            weight, bias, low_bias = fold_norm(self.weight, self.bias, x.affine, x.values.dtype)
            return _on_pixels(x.values, weight, low_bias), bias
        return self._product(x, self.bias.detach()), self.bias

    def _product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if self.by_linear and not torch.jit.is_scripting():
            return _on_pixels(x, self.weight.flatten(1), bias)
        return self._conv_forward(x, self.weight, bias)


def _on_pixels(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    n, channels, height, width = x.shape
    pixels = x.permute(0, 2, 3, 1).reshape(-1, channels)
    return F.linear(pixels, weight, bias).view(n, height, width, -1).permute(0, 3, 1, 2)
