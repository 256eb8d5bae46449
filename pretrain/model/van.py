"""The Visual Attention Networks VAN-B0 to B6 (arXiv 2202.09741), registered with timm.

Importing this module is enough to build them by name:

    import pretrain.model.van
    model = timm.create_model("van_b3", num_classes=21841, drop_path_rate=0.1)
    logits = model(images)           # (N, 3, H, W) to (N, 21841), for any H and W

A VAN is four stages with strides 4, 8, 16 and 32, then the mean over positions and a linear head. A stage is an overlapping
patch embedding, blocks and a LayerNorm; a block is attention and a convolutional MLP, each behind a BatchNorm and added to its
input.

Memory layout: activations are channels-last (tensors of shape (N, C, H, W) whose bytes lie as N, H, W, C) from the first
convolution to the head, without a change of layout or a copy on the way. Images may come in either layout: channels-last ones
are taken as they lie.

Precision: parameters stay fp32 and torch.autocast chooses what runs in bf16. The statistics of both kinds of norm are fp32
either way, and so is the sum that runs along a stage's blocks, because the layer scales are fp32.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, cast

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    DropPath,
    LayerNorm2d,
    SelectAdaptivePool2d,
    calculate_drop_path_rates,
    create_classifier,
    get_device_dtype,
    register_notrace_module,
    trunc_normal_,
)
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import nn

from pretrain.model.convolutions import ChannelsLastConv2d, PointwiseConv2d
from pretrain.model.depthwise import DepthwiseConv2d
from pretrain.model.fast import cpu as on_cpu
from pretrain.model.fast.triton import Normed, expected_statistics, move_statistics, residual_norm, scaled_residual
from pretrain.model.lka import LKA
from pretrain.model.recomputation import recomputed

__all__ = ["VAN", "VARIANTS"]


class PatchEmbed(nn.Module):
    """Overlapping patch embedding: a convolution whose kernel is wider than its stride, then BatchNorm (section 3.2)."""

    def __init__(self, in_chans: int, embed_dim: int, kernel_size: int, stride: int) -> None:
        super().__init__()
        self.proj = ChannelsLastConv2d(in_chans, embed_dim, kernel_size, stride, padding=kernel_size // 2)
        self.norm = nn.BatchNorm2d(embed_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_chans, H, W) to (N, embed_dim, H / stride, W / stride), rounded up."""
        return self.norm(self.proj(x))


# How this and the MLP compute depends on the input's size and device, which tracing does not know; timm's feature extraction keeps them
# whole.
@register_notrace_module
class Attention(nn.Module):
    """1x1 convolution, GELU, LKA, 1x1 convolution, and a shortcut around them (Figure 4)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj_1 = PointwiseConv2d(dim, dim)
        self.act = nn.GELU()
        self.spatial_gating_unit = LKA(dim)
        self.proj_2 = PointwiseConv2d(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, dim, H, W) to (N, dim, H, W)."""
        # The shortcut starts behind the block's BatchNorm, inside the block's own shortcut; the authors meant it so.
        return x + self.proj_2(self._gated(x))

    def branch(self, x: torch.Tensor | Normed) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What is added to the shortcut, and the bias in it whose gradient is left to what adds it."""
        gated = self.spatial_gating_unit.behind(self.proj_1, x) if isinstance(x, Normed) else self._gated(x)
        return self.proj_2.without_bias_gradient(gated)

    def _gated(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting() and self.spatial_gating_unit.triton:
            return self.spatial_gating_unit.behind(self.proj_1, x)
        x = self.proj_1(x)
        if not torch.jit.is_scripting():  # noqa: SIM102  TorchScript leaves out whole statements
            if on_cpu.trains(self, x):
                return self.spatial_gating_unit(on_cpu.gelu(x))
        return self.spatial_gating_unit(self.act(x))


@register_notrace_module
class Mlp(nn.Module):
    """The convolutional feed-forward part: 1x1 to the hidden width, depth-wise 3x3, GELU, 1x1 back (Figure 4)."""

    def __init__(self, dim: int, hidden_dim: int, drop: float = 0.0) -> None:
        super().__init__()
        self.fc1 = PointwiseConv2d(dim, hidden_dim)
        self.dwconv = DepthwiseConv2d(hidden_dim, 3, gelu=True)
        self.drop1 = nn.Dropout(drop)
        self.fc2 = PointwiseConv2d(hidden_dim, dim)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, dim, H, W) to (N, dim, H, W)."""
        if not torch.jit.is_scripting():  # noqa: SIM102  TorchScript leaves out whole statements
            if on_cpu.trains(self, x) and not self.dwconv.triton and self.drop1.p == 0:
                return self.drop2(on_cpu.mlp(x, self.fc1, self.dwconv, self.fc2))
        return self.drop2(self.fc2(self._hidden(x)))

    def branch(self, x: torch.Tensor | Normed) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`forward`, and the bias in it whose gradient is left to what adds it to the shortcut."""
        hidden = self.drop1(self.dwconv.behind(self.fc1, x)) if isinstance(x, Normed) else self._hidden(x)
        if self.drop2.p > 0:
            return self.drop2(self.fc2(hidden)), None
        return self.fc2.without_bias_gradient(hidden)

    def _hidden(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting() and self.dwconv.triton:
            return self.drop1(self.dwconv.behind(self.fc1, x))
        return self.drop1(self.dwconv(self.fc1(x)))


class Block(nn.Module):
    """Attention, then the MLP: each behind a BatchNorm, scaled per channel, dropped per sample, and added (Figure 4)."""

    def __init__(self, dim: int, mlp_ratio: int, drop: float = 0.0, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(dim)
        self.attn = Attention(dim)
        self.layer_scale_1 = nn.Parameter(torch.full((dim,), 1e-2))
        self.norm2 = nn.BatchNorm2d(dim)
        self.mlp = Mlp(dim, dim * mlp_ratio, drop)
        self.layer_scale_2 = nn.Parameter(torch.full((dim,), 1e-2))
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.triton = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, dim, H, W) to (N, dim, H, W)."""
        if not torch.jit.is_scripting() and self.triton:
            normed = self.norm1(x)
            branch, bias = self.attn.branch(normed)
            x = scaled_residual(x, branch, normed, self.layer_scale_1, _kept([self.drop_path], x)[0], bias)
            branch, bias = self.mlp.branch(self.norm2(x))
            return scaled_residual(x, branch, None, self.layer_scale_2, _kept([self.drop_path], x)[0], bias)
        x = self._add(x, self.attn(self.norm1(x)), self.layer_scale_1)
        return self._add(x, self.mlp(self.norm2(x)), self.layer_scale_2)

    def _add(self, x: torch.Tensor, branch: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting() and torch.compiler.is_compiling():
            kept, scaled = _kept([self.drop_path], x)[0], scale[:, None, None] * branch
            return x + (scaled if kept is None else scaled * kept[:, None, None, None].to(scaled.dtype))
        return x + self.drop_path(scale[:, None, None] * branch)

    def joined(
        self, x: torch.Tensor, normed: torch.Tensor | Normed, kept: Sequence[torch.Tensor | None], expected: torch.Tensor,
        after: nn.BatchNorm2d | None,
    ) -> tuple[torch.Tensor, Normed | None, list[tuple[torch.Tensor, torch.Tensor]]]:  # fmt: skip
        """`forward` in training on Triton's kernels, from one joint to the next: takes the block's input, `norm1` of it, `_kept` for both
        sums, and what is `expected` of them, (2, 2, C). Returns its output, the norm `after` of that, the next block's `norm1`, and what
        was found of the inputs of `norm2` and `after`."""
        branch, bias = self.attn.branch(normed)
        x, normed, found = residual_norm(x, branch, normed, self.layer_scale_1, kept[0], self.norm2, expected[0], bias)
        branch, bias = self.mlp.branch(normed)
        if after is None:
            return scaled_residual(x, branch, None, self.layer_scale_2, kept[1], bias), None, [found]
        x, normed, found_after = residual_norm(x, branch, None, self.layer_scale_2, kept[1], after, expected[1], bias)
        return x, normed, [found, found_after]


def _kept(drop_paths: Sequence[nn.Module], x: torch.Tensor) -> list[torch.Tensor | None]:
    """What each DropPath multiplies each sample by, (N,); None where that is 1. Draws the numbers that they would draw, unless
    compiled."""
    keeps = [1 - path.drop_prob if isinstance(path, DropPath) and path.training else 1.0 for path in drop_paths]
    dropping = [keep for keep in keeps if keep < 1]
    if torch.compiler.is_compiling():  # which would make a graph for each block, taking what bernoulli_ is given for a constant
        drawn = [(torch.rand(len(x), device=x.device) < keep) / keep for keep in dropping]
    else:
        drawn = [row.bernoulli_(keep) for row, keep in zip(torch.empty(len(dropping), len(x), device=x.device), dropping, strict=True)]
        if drawn:
            torch._foreach_div_(drawn, dropping)
    rows = iter(drawn)
    return [next(rows) if keep < 1 else None for keep in keeps]


class VANStage(nn.Module):
    """One of the four stages: patch embedding, blocks, LayerNorm over channels.

    With `grad_checkpointing` each block keeps its input alone and is computed again in the backward pass. With `joins` the blocks' sums
    and the norms behind them are one operator in training.
    """

    def __init__(
        self,
        in_chans: int,
        dim: int,
        depth: int,
        mlp_ratio: int,
        patch_size: int,
        stride: int,
        drop: float,
        drop_path: Sequence[float],
    ) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.joins = False
        self.patch_embed = PatchEmbed(in_chans, dim, patch_size, stride)
        self.blocks = nn.Sequential(*(Block(dim, mlp_ratio, drop, drop_path[i]) for i in range(depth)))
        self.norm = LayerNorm2d(dim, eps=1e-6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_chans, H, W) to (N, dim, H / stride, W / stride), rounded up."""
        x = self.patch_embed(x)
        if self.joins and self.training and not torch.jit.is_scripting():
            return self.norm(self._joined(x))
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():  # noqa: SIM108  TorchScript leaves out whole statements
                x = recomputed(block, [block.norm1, block.norm2], x)
            else:
                x = block(x)
        return self.norm(x)

    @torch.jit.unused
    def _joined(self, x: torch.Tensor) -> torch.Tensor:
        blocks = cast(list[Block], list(self.blocks))
        kept = _kept([block.drop_path for block in blocks for _ in range(2)], x)
        norms = [norm for block in blocks for norm in (block.norm1, block.norm2)]
        normed: torch.Tensor | Normed | None = norms[0](x)
        found: list[tuple[torch.Tensor, torch.Tensor]] = []
        expected = expected_statistics(norms[1:])
        for number, (block, after) in enumerate(zip(blocks, [*norms[2::2], None], strict=True)):
            assert normed is not None
            joined = partial(recomputed, block.joined, []) if self.grad_checkpointing else block.joined
            here = slice(2 * number, 2 * number + 2)
            x, normed, found_here = joined(x, normed, kept[here], expected[here], after)
            found += found_here
        move_statistics(norms[1:], found)
        return x


class VAN(nn.Module):
    """Visual Attention Network with timm's model interface.

    `depths` are blocks per stage; `mlp_ratios` widen the MLPs. `drop_path_rate` is reached linearly at the last block, starting
    at 0, and holds for both branches of a block; `proj_drop_rate` is the dropout of the MLPs, `drop_rate` the one before the
    head. `num_classes=0` leaves the head out. `global_pool` is one of timm's: avg, max, avgmax, catavgmax (twice as wide), or ""
    for none. `device` and `dtype` are those of the parameters.
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
        self.feature_info: list[dict[str, Any]] = []
        drop_path_rates = cast(list[list[float]], calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True))

        stages: list[VANStage] = []
        reduction = 1
        for i, (dim, depth, mlp_ratio) in enumerate(zip(embed_dims, depths, mlp_ratios, strict=True)):
            patch_size, stride = (7, 4) if i == 0 else (3, 2)
            stage_in = in_chans if i == 0 else embed_dims[i - 1]
            with nullcontext() if device is None else torch.device(device):
                stages.append(VANStage(stage_in, dim, depth, mlp_ratio, patch_size, stride, proj_drop_rate, drop_path_rates[i]))
            reduction *= stride
            self.feature_info.append({"num_chs": dim, "reduction": reduction, "module": f"stages.{i}"})
        self.stages = nn.ModuleList(stages)

        self.num_features = embed_dims[-1]
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)
        self.apply(_init_weights)
        self.to(dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_chans, H, W) to logits (N, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_chans, H, W) to the last stage's (N, num_features, H / 32, W / 32), rounded up."""
        for stage in self.stages:
            x = stage(x)
        return x

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """(N, num_features, h, w) to logits (N, num_classes), or with `pre_logits` to the head's input (N, head_hidden_size)."""
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.head(x)

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """The outputs of some stages, each (N, C, H / reduction, W / reduction), and unless `intermediates_only` the last
        output too.

        `indices` names stages: None for all, an int for that many last ones. `stop_early` leaves out the stages behind the last
        one named. Every stage ends with its norm, so `norm` changes nothing.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be NCHW, not {output_fmt}")
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        intermediates = []
        for i, stage in enumerate(self.stages):
            if i <= max_index or not stop_early:  # TorchScript knows neither a slice of modules nor a break among them
                x = stage(x)
                if i in take_indices:
                    intermediates.append(x)
        if intermediates_only:
            return intermediates
        return x, intermediates

    def prune_intermediate_layers(self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True) -> list[int]:
        """Removes the stages behind the last one named, and the head; returns the indices of the stages named.

        Every stage keeps its norm, so `prune_norm` changes nothing.
        """
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        stages_removed = max_index < len(self.stages) - 1
        self.stages = self.stages[: max_index + 1]
        self.num_features = self.feature_info[max_index]["num_chs"]
        if prune_head or stages_removed:
            self.reset_classifier(0, "")
        return take_indices

    def get_classifier(self) -> nn.Module:
        """The head's last layer."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the head by a new one for `num_classes` classes, or by none for 0; without `global_pool` the pooling
        stays."""
        self.global_pool: SelectAdaptivePool2d
        self.head: nn.Module
        pool_type = self.global_pool.pool_type if global_pool is None else global_pool
        self.num_classes = num_classes
        self.global_pool, self.head = create_classifier(self.num_features, num_classes, pool_type, **get_device_dtype(self))
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        _init_weights(self.head)
        for module in (self.global_pool, self.head):
            module.train(self.training)

    def set_grad_checkpointing(self, enable: bool | Sequence[bool] = True) -> None:
        """Turns gradient checkpointing of the blocks on or off, for all stages or for each stage by itself."""
        per_stage = [enable] * len(self.stages) if isinstance(enable, bool) else enable
        for stage, on in zip(self.stages, per_stage, strict=True):
            assert isinstance(stage, VANStage)
            stage.grad_checkpointing = on

    def group_matcher(self, coarse: bool = False) -> Mapping[str, Any]:
        """Regular expressions by which timm puts parameters into layers: a layer per block, or per stage with `coarse`.

        A stage's patch embedding belongs to its first block and its norm to its last one (timm's 99999).
        """
        by_block = [
            (r"^stages\.(\d+)\.patch_embed", (0,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^stages\.(\d+)\.norm", (99999,)),
        ]
        return {"stem": r"^stages\.0\.patch_embed", "blocks": r"^stages\.(\d+)" if coarse else by_block}

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters to leave undecayed besides biases and norms: the layer scales."""
        return {name for name, _ in self.named_parameters() if "layer_scale" in name}


def _init_weights(module: nn.Module) -> None:
    """The authors' initialisation: convolutions normal with variance 2 / fan-out, linear layers truncated normal with 0.02,
    biases 0.

    Norms start with weight 1 and bias 0 by themselves.
    """
    if isinstance(module, nn.Conv2d):
        kh, kw = module.kernel_size
        nn.init.normal_(module.weight, std=math.sqrt(2 / (kh * kw * module.out_channels // module.groups)))
    elif isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
    else:
        return
    assert module.bias is not None
    nn.init.zeros_(module.bias)


def _cfg() -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,  # images resized to 256 pixels before the centre crop of 224
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stages.0.patch_embed.proj",
        "classifier": "head",
        "paper_ids": "arXiv:2202.09741",
        "paper_name": "Visual Attention Network",
    }


# Widths and depths of section 3.2, as the published weights have them.
VARIANTS: dict[str, dict[str, tuple[int, ...]]] = {
    "van_b0": {"embed_dims": (32, 64, 160, 256), "depths": (3, 3, 5, 2)},
    "van_b1": {"embed_dims": (64, 128, 320, 512), "depths": (2, 2, 4, 2)},
    "van_b2": {"embed_dims": (64, 128, 320, 512), "depths": (3, 3, 12, 3)},
    "van_b3": {"embed_dims": (64, 128, 320, 512), "depths": (3, 5, 27, 3)},
    "van_b4": {"embed_dims": (64, 128, 320, 512), "depths": (3, 6, 40, 3)},
    "van_b5": {"embed_dims": (96, 192, 480, 768), "depths": (3, 3, 24, 3)},
    "van_b6": {"embed_dims": (96, 192, 384, 768), "depths": (6, 6, 90, 6)},
}

default_cfgs = generate_default_cfgs({name: _cfg() for name in VARIANTS})


def _create_van(variant: str, pretrained: bool, kwargs: dict[str, Any]) -> VAN:
    return build_model_with_cfg(
        VAN,
        variant,
        pretrained,
        # The getter asks the model itself for the stages' outputs, and so keeps its gradient checkpointing.
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
