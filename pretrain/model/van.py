"""Visual Attention Network (VAN, arXiv 2202.09741): the variants VAN-B0 to VAN-B6, registered with timm.

This file depends only on torch and timm, so it can be copied into another project. Importing it registers the models:

    import timm, van                                              # in this repository: import pretrain.model.van
    model = timm.create_model("van_b3", num_classes=21841, drop_path_rate=0.1)
    logits = model(images)                                        # (N, 3, H, W) to (N, 21841), for any H and W
    model = timm.create_model("van_b3", checkpoint_path="van_b3.pth")

`load_state_dict` accepts the key names of this file and those of the authors' VAN-Classification.

A VAN has four stages with output strides 4, 8, 16 and 32, then global average pooling and a linear head. A stage is an overlapping patch
embedding, a sequence of blocks and a LayerNorm. A block has two residual branches with layer scale: BatchNorm and large kernel attention,
then BatchNorm and a convolutional MLP.
"""

import math
import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, SelectAdaptivePool2d, calculate_drop_path_rates, create_classifier, get_device_dtype, trunc_normal_
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

__all__ = ["LKA", "VAN", "VARIANTS"]


class LKA(nn.Module):
    """Large kernel attention (section 3.1, Figure 3).

        attention = Conv1x1(DW-D-Conv(DW-Conv(x)))
        output    = attention * x

    The three convolutions decompose one of K x K: DW-Conv is depthwise (2d-1) x (2d-1), DW-D-Conv is depthwise ceil(K/d) x ceil(K/d) with
    dilation d. The product is elementwise; the attention map passes through neither softmax nor sigmoid.

    Args:
        kernel_size: K. The default is the paper's 21, which gives a 5x5 and a 7x7 kernel.
        dilation: d.
    """

    def __init__(self, dim: int, kernel_size: int = 21, dilation: int = 3) -> None:
        super().__init__()
        dw, dwd = 2 * dilation - 1, math.ceil(kernel_size / dilation)
        # An even kernel can need an odd amount of padding, which only "same" splits over the two sides.
        padding = dilation * (dwd - 1)
        self.conv0 = nn.Conv2d(dim, dim, dw, padding=dw // 2, groups=dim)
        self.conv_spatial = nn.Conv2d(dim, dim, dwd, padding="same" if padding % 2 else padding // 2, dilation=dilation, groups=dim)
        self.conv1 = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, dim, H, W) to (N, dim, H, W)."""
        return x * self.conv1(self.conv_spatial(self.conv0(x)))


class Attention(nn.Module):
    """1x1 convolution, GELU, LKA and 1x1 convolution, with a shortcut (Figure 4)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj_1 = nn.Conv2d(dim, dim, 1)
        self.act = nn.GELU()
        self.spatial_gating_unit = LKA(dim)
        self.proj_2 = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, dim, H, W) to (N, dim, H, W)."""
        # A second shortcut inside the block's, taken after the block's BatchNorm, as in the authors' code.
        return x + self.proj_2(self.spatial_gating_unit(self.act(self.proj_1(x))))


class Mlp(nn.Module):
    """Convolutional feed-forward network: 1x1 to the hidden width, depthwise 3x3, GELU, 1x1 back (Figure 4)."""

    def __init__(self, dim: int, hidden_dim: int, drop: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(dim, hidden_dim, 1)
        self.dwconv = nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1, groups=hidden_dim)
        self.act = nn.GELU()
        self.drop1 = nn.Dropout(drop)
        self.fc2 = nn.Conv2d(hidden_dim, dim, 1)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, dim, H, W) to (N, dim, H, W)."""
        x = self.drop1(self.act(self.dwconv(self.fc1(x))))
        return self.drop2(self.fc2(x))


class Block(nn.Module):
    """Attention and MLP as residual branches, each with BatchNorm, layer scale and stochastic depth (Figure 4)."""

    def __init__(self, dim: int, mlp_ratio: int, drop: float = 0.0, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(dim)
        self.attn = Attention(dim)
        self.layer_scale_1 = nn.Parameter(torch.full((dim,), 1e-2))
        self.norm2 = nn.BatchNorm2d(dim)
        self.mlp = Mlp(dim, dim * mlp_ratio, drop)
        self.layer_scale_2 = nn.Parameter(torch.full((dim,), 1e-2))
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, dim, H, W) to (N, dim, H, W)."""
        x = x + self.drop_path(self.layer_scale_1[:, None, None] * self.attn(self.norm1(x)))
        return x + self.drop_path(self.layer_scale_2[:, None, None] * self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """Overlapping patch embedding: a convolution whose kernel is larger than its stride, then BatchNorm (section 3.2)."""

    def __init__(self, in_chans: int, embed_dim: int, kernel_size: int, stride: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size, stride, padding=kernel_size // 2)
        self.norm = nn.BatchNorm2d(embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, in_chans, H, W) to (N, embed_dim, H / stride, W / stride), rounded up."""
        return self.norm(self.proj(x))


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of a feature map."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, C, H, W) to (N, C, H, W)."""
        # Scale and shift are a separate operator: torch.compile fails on an affine layer_norm between two convolutions once the image size
        # changes (torch 2.13).
        x = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, eps=self.eps).permute(0, 3, 1, 2)
        return torch.addcmul(self.bias[:, None, None], x, self.weight[:, None, None])


class VANStage(nn.Module):
    """One of the four stages: patch embedding, blocks and LayerNorm."""

    grad_checkpointing: torch.jit.Final[bool]  # Final, so that TorchScript compiles only the branch in use

    def __init__(
        self, in_chans: int, dim: int, depth: int, mlp_ratio: int, patch_size: int, stride: int, drop: float, drop_path: Sequence[float]
    ) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.patch_embed = PatchEmbed(in_chans, dim, patch_size, stride)
        self.blocks = nn.Sequential(*(Block(dim, mlp_ratio, drop, drop_path[i]) for i in range(depth)))
        self.norm = LayerNorm2d(dim, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, in_chans, H, W) to (N, dim, H / stride, W / stride), rounded up."""
        x = self.patch_embed(x)
        x = checkpoint_seq(self.blocks, x) if self.grad_checkpointing else self.blocks(x)
        return self.norm(x)


class VAN(nn.Module):
    """Visual Attention Network with timm's model interface.

    Args:
        num_classes: outputs of the head; 0 for no head.
        global_pool: avg, max, avgmax, catavgmax (which doubles the head's input), or "" for none.
        embed_dims: channels of each stage.
        depths: blocks of each stage.
        mlp_ratios: hidden width of each stage's MLPs, as a multiple of its channels.
        drop_rate: dropout before the head.
        proj_drop_rate: dropout in the MLPs.
        drop_path_rate: stochastic depth rate of the last block; rates rise linearly from 0 at the first block. Both branches of a block
            have the same rate.
        device: device on which the parameters are created.
        dtype: type of the parameters.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (3, 5, 27, 3),
        mlp_ratios: Sequence[int] = (8, 8, 4, 4),
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_chans = in_chans
        self.num_features = embed_dims[-1]
        self.feature_info: list[dict[str, Any]] = []
        drop_path_rates: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)

        self.stages = nn.ModuleList()
        reduction = 1
        for i, (dim, depth, mlp_ratio) in enumerate(zip(embed_dims, depths, mlp_ratios, strict=True)):
            patch_size, stride = (7, 4) if i == 0 else (3, 2)
            with nullcontext() if device is None else torch.device(device):
                stage = VANStage(in_chans, dim, depth, mlp_ratio, patch_size, stride, proj_drop_rate, drop_path_rates[i])
            self.stages.append(stage)
            in_chans, reduction = dim, reduction * stride
            self.feature_info.append({"num_chs": dim, "reduction": reduction, "module": f"stages.{i}"})

        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)
        self.apply(_init_weights)
        self.to(dtype=dtype)
        self._register_load_state_dict_pre_hook(_rename_authors_keys)

    def forward(self, x: Tensor) -> Tensor:
        """Maps images (N, in_chans, H, W) to logits (N, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Maps images (N, in_chans, H, W) to the last stage's output (N, num_features, H / 32, W / 32), rounded up."""
        for stage in self.stages:
            x = stage(x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Maps (N, num_features, h, w) to logits, or with `pre_logits` to the head's input (N, head_hidden_size)."""
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.head(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Returns the last output and the outputs of the selected stages, each (N, C, H / reduction, W / reduction).

        Args:
            indices: stages to return; None for all, an int n for the last n.
            norm: has no effect, as every stage ends with a LayerNorm.
            stop_early: skip the stages after the last one returned.
            intermediates_only: return only the list of stage outputs.

        Raises:
            ValueError: `output_fmt` is not NCHW.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be NCHW, not {output_fmt}")
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        intermediates = []
        for i, stage in enumerate(self.stages):
            if i <= max_index or not stop_early:  # TorchScript supports neither slices of a ModuleList nor break
                x = stage(x)
                if i in take_indices:
                    intermediates.append(x)
        if intermediates_only:
            return intermediates
        return x, intermediates

    def prune_intermediate_layers(self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True) -> list[int]:
        """Removes the stages after the last one of `indices`, and the head; returns the indices as a list.

        `prune_norm` has no effect, as every stage ends with a LayerNorm.
        """
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        if prune_head or max_index < len(self.stages) - 1:
            self.num_features = self.feature_info[max_index]["num_chs"]
            self.reset_classifier(0, "")
        self.stages = self.stages[: max_index + 1]
        return take_indices

    def get_classifier(self) -> nn.Module:
        """Returns the head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the head by a new one for `num_classes` classes (0: none), and the pooling if `global_pool` is given."""
        self.global_pool: SelectAdaptivePool2d
        self.head: nn.Module
        pool_type = self.global_pool.pool_type if global_pool is None else global_pool
        self.num_classes = num_classes
        self.global_pool, self.head = create_classifier(self.num_features, num_classes, pool_type, **get_device_dtype(self))
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        _init_weights(self.head)
        for module in (self.global_pool, self.head):
            module.train(self.training)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Turns activation checkpointing on or off in all stages; `stages[i].grad_checkpointing` sets a single one."""
        for stage in self.stages:
            stage.grad_checkpointing = enable  # type: ignore[assignment]

    def group_matcher(self, coarse: bool = False) -> Mapping[str, Any]:
        """Returns regular expressions that group parameters into layers for timm: one per block, or per stage if `coarse`.

        A stage's patch embedding belongs to its first block and its LayerNorm to the last one (timm's 99999).
        """
        by_block = [
            (r"^stages\.(\d+)\.patch_embed", (0,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^stages\.(\d+)\.norm", (99999,)),
        ]
        return {"stem": r"^stages\.0\.patch_embed", "blocks": r"^stages\.(\d+)" if coarse else by_block}

    def no_weight_decay(self) -> set[str]:
        """Returns the names of the parameters without weight decay: the layer scales."""
        return {name for name, _ in self.named_parameters() if "layer_scale" in name}


def _init_weights(module: nn.Module) -> None:
    """Initializes one module as the authors do.

    Convolutions are normal with variance 2 / fan-out, linear layers truncated normal with standard deviation 0.02, biases 0. Normalization
    layers keep PyTorch's defaults, weight 1 and bias 0.
    """
    if isinstance(module, nn.Conv2d):
        kh, kw = module.kernel_size
        # Drawn in channels-last order (out, kh, kw, in), so that a seed gives the same weights in either memory layout.
        drawn = torch.empty_like(module.weight.permute(0, 2, 3, 1), memory_format=torch.contiguous_format)
        nn.init.normal_(drawn, std=math.sqrt(2 / (kh * kw * module.out_channels // module.groups)))
        with torch.no_grad():
            module.weight.copy_(drawn.permute(0, 3, 1, 2))
    elif isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
    else:
        return
    assert module.bias is not None
    nn.init.zeros_(module.bias)


# (pattern, replacement) from the authors' key names, in which stages count from 1, to those of this file.
_AUTHORS_KEYS = [
    (r"^patch_embed([1-4])\.", lambda match: f"stages.{int(match[1]) - 1}.patch_embed."),
    (r"^block([1-4])\.", lambda match: f"stages.{int(match[1]) - 1}.blocks."),
    (r"^norm([1-4])\.", lambda match: f"stages.{int(match[1]) - 1}.norm."),
    (r"\.mlp\.dwconv\.dwconv\.", lambda match: ".mlp.dwconv."),
]


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module | None = None) -> dict[str, Any]:
    """Renames the authors' keys of a state dict to those of this file; other keys stay."""
    renamed = {}
    for key, value in state_dict.items():
        for pattern, replacement in _AUTHORS_KEYS:
            key = re.sub(pattern, replacement, key)
        renamed[key] = value
    return renamed


def _rename_authors_keys(state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Applies `checkpoint_filter_fn` to the keys under `prefix`, in place, before any load_state_dict."""
    inside = {key.removeprefix(prefix): state_dict.pop(key) for key in list(state_dict) if key.startswith(prefix)}
    state_dict.update({prefix + key: value for key, value in checkpoint_filter_fn(inside).items()})


_CFG: dict[str, Any] = {
    "num_classes": 1000,
    "input_size": (3, 224, 224),
    "pool_size": (7, 7),
    "crop_pct": 0.875,  # images are resized to 256 pixels before the center crop of 224
    "interpolation": "bicubic",
    "mean": IMAGENET_DEFAULT_MEAN,
    "std": IMAGENET_DEFAULT_STD,
    "first_conv": "stages.0.patch_embed.proj",
    "classifier": "head",
    "paper_ids": "arXiv:2202.09741",
    "paper_name": "Visual Attention Network",
}


# Widths and depths from section 3.2; B4 to B6 as published by the authors.
VARIANTS: dict[str, dict[str, tuple[int, ...]]] = {
    "van_b0": {"embed_dims": (32, 64, 160, 256), "depths": (3, 3, 5, 2)},
    "van_b1": {"embed_dims": (64, 128, 320, 512), "depths": (2, 2, 4, 2)},
    "van_b2": {"embed_dims": (64, 128, 320, 512), "depths": (3, 3, 12, 3)},
    "van_b3": {"embed_dims": (64, 128, 320, 512), "depths": (3, 5, 27, 3)},
    "van_b4": {"embed_dims": (64, 128, 320, 512), "depths": (3, 6, 40, 3)},
    "van_b5": {"embed_dims": (96, 192, 480, 768), "depths": (3, 3, 24, 3)},
    "van_b6": {"embed_dims": (96, 192, 384, 768), "depths": (6, 6, 90, 6)},
}

default_cfgs = generate_default_cfgs(dict.fromkeys(VARIANTS, _CFG))


def _create_van(variant: str, pretrained: bool, kwargs: dict[str, Any]) -> VAN:
    return build_model_with_cfg(
        VAN,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        # The getter calls forward_intermediates of the whole model, so activation checkpointing keeps working.
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
        **{**VARIANTS[variant], **kwargs},
    )


@register_model
def van_b0(pretrained: bool = False, **kwargs: Any) -> VAN:
    """VAN-B0: 4.1 M parameters, 0.9 G multiply-adds at 224 x 224."""
    return _create_van("van_b0", pretrained, kwargs)


@register_model
def van_b1(pretrained: bool = False, **kwargs: Any) -> VAN:
    """VAN-B1: 13.9 M parameters, 2.5 G multiply-adds at 224 x 224."""
    return _create_van("van_b1", pretrained, kwargs)


@register_model
def van_b2(pretrained: bool = False, **kwargs: Any) -> VAN:
    """VAN-B2: 26.6 M parameters, 5.0 G multiply-adds at 224 x 224."""
    return _create_van("van_b2", pretrained, kwargs)


@register_model
def van_b3(pretrained: bool = False, **kwargs: Any) -> VAN:
    """VAN-B3: 44.8 M parameters, 9.0 G multiply-adds at 224 x 224."""
    return _create_van("van_b3", pretrained, kwargs)


@register_model
def van_b4(pretrained: bool = False, **kwargs: Any) -> VAN:
    """VAN-B4: 60.3 M parameters, 12.2 G multiply-adds at 224 x 224."""
    return _create_van("van_b4", pretrained, kwargs)


@register_model
def van_b5(pretrained: bool = False, **kwargs: Any) -> VAN:
    """VAN-B5: 90.0 M parameters, 17.2 G multiply-adds at 224 x 224."""
    return _create_van("van_b5", pretrained, kwargs)


@register_model
def van_b6(pretrained: bool = False, **kwargs: Any) -> VAN:
    """VAN-B6: 200 M parameters, 38.4 G multiply-adds at 224 x 224."""
    return _create_van("van_b6", pretrained, kwargs)
