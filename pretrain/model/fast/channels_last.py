"""Layers for channels-last activations: convolutions with channels-last weights, and LayerNorm over channels in one operator.

    use_channels_last(model)         # any model; before the optimizer or DeepSpeed sees the parameters
    restore_reference(model)

Convolution libraries want channels-last weights for channels-last activations and convert contiguous ones in every step. A parameter with
channels-last strides doesn't work: DeepSpeed broadcasts and flattens parameters as contiguous bytes. So the parameter gets the shape
(out, kh, kw, in), and the forward pass permutes it to (out, in, kh, kw), which costs nothing. Weights of 1x1 and depthwise convolutions
are the same bytes in either layout and stay unchanged.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pretrain.model import van
from pretrain.model.fast.swap import swap_class


class ChannelsLastConv2d(nn.Conv2d):
    """An nn.Conv2d whose parameter `weight` has the shape (out, kh, kw, in).

    state_dict and load_state_dict use the usual shape (out, in, kh, kw). The tensor in the state dict is a contiguous copy, or with
    `keep_vars` a view through which gradients reach the parameter.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, in, H, W) to (N, out, H', W')."""
        return self._conv_forward(x, self.weight.permute(0, 3, 1, 2), self.bias)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        weight = destination[prefix + "weight"].permute(0, 3, 1, 2)
        destination[prefix + "weight"] = weight if keep_vars else weight.contiguous()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        key = prefix + "weight"
        # load_state_dict reports a weight with another number of dimensions as a size mismatch.
        if key in state_dict and state_dict[key].ndim == 4:
            state_dict[key] = state_dict[key].permute(0, 2, 3, 1).contiguous()
        super()._load_from_state_dict(state_dict, prefix, *args)


class LayerNorm2d(van.LayerNorm2d):
    """VAN's LayerNorm with scale and shift in the same operator, which saves a pass over the map."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, C, H, W) to (N, C, H, W)."""
        return F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps).permute(0, 3, 1, 2)


def use_channels_last(model: nn.Module) -> None:
    """Stores the weight of every dense nn.Conv2d larger than 1x1 channels-last, and fuses VAN's LayerNorms.

    Subclasses of nn.Conv2d and parametrized convolutions stay unchanged, since they may compute with the weight themselves.
    """
    for module in model.modules():
        if type(module) is van.LayerNorm2d:
            swap_class(module, LayerNorm2d)
        elif (
            type(module) is nn.Conv2d and module.groups == 1 and module.weight[0, 0].numel() > 1 and not parametrize.is_parametrized(module)
        ):
            module.weight = nn.Parameter(module.weight.detach().permute(0, 2, 3, 1).contiguous(), module.weight.requires_grad)
            swap_class(module, ChannelsLastConv2d)


def restore_reference(model: nn.Module) -> None:
    """Undoes `use_channels_last`."""
    for module in model.modules():
        if isinstance(module, LayerNorm2d):
            swap_class(module, van.LayerNorm2d)
        elif isinstance(module, ChannelsLastConv2d):
            module.weight = nn.Parameter(module.weight.detach().permute(0, 3, 1, 2).contiguous(), module.weight.requires_grad)
            swap_class(module, nn.Conv2d)
