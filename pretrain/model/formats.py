"""The weight formats that other projects read, as names of state-dict keys, both ways.

    state_dict = to_format(model.state_dict(), "official")       # what the authors' code loads
    model.load_state_dict(from_format(torch.load(path)))         # whichever of the formats the file is in

| format | who reads it |
|---|---|
| timm | pretrain.model.van itself and timm: the native names |
| official | the authors' VAN-Classification |
| mmseg | the authors' VAN-Segmentation, VAN-Detection and their ports: official without the head |
| mmpretrain | OpenMMLab's mmpretrain |
| hf | VanForImageClassification of Hugging Face transformers (its last release with VAN is 4.30) |

Only names differ between the formats: tensors and their shapes are the same in all of them. (mmpretrain and the authors' segmentation
code leave LayerNorm's epsilon at 1e-5, where their classification code has 1e-6; a weights file can't say that.) A format is a table of
native names and the names that the other project uses, so that either direction is a look-up and no name is made twice.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

Value = TypeVar("Value")

# In the tables below {s} numbers the stages from 0 and {n} from 1, {b} numbers a stage's blocks from 0, and * is one of a
# layer's tensors.
_PLACEHOLDERS = {
    "{s}": r"(?P<s>[0-3])",
    "{n}": r"(?P<n>[1-4])",
    "{b}": r"(?P<b>0|[1-9]\d*)",
    "*": r"(?P<tensor>weight|bias|running_mean|running_var|num_batches_tracked)",
}

_BLOCK = "stages.{s}.blocks.{b}"
_LKA = f"{_BLOCK}.attn.spatial_gating_unit"

_OFFICIAL = {
    "stages.{s}.patch_embed.proj.*": "patch_embed{n}.proj.*",
    "stages.{s}.patch_embed.norm.*": "patch_embed{n}.norm.*",
    f"{_BLOCK}.layer_scale_1": "block{n}.{b}.layer_scale_1",
    f"{_BLOCK}.layer_scale_2": "block{n}.{b}.layer_scale_2",
    f"{_BLOCK}.norm1.*": "block{n}.{b}.norm1.*",
    f"{_BLOCK}.attn.proj_1.*": "block{n}.{b}.attn.proj_1.*",
    f"{_LKA}.conv0.*": "block{n}.{b}.attn.spatial_gating_unit.conv0.*",
    f"{_LKA}.conv_spatial.*": "block{n}.{b}.attn.spatial_gating_unit.conv_spatial.*",
    f"{_LKA}.conv1.*": "block{n}.{b}.attn.spatial_gating_unit.conv1.*",
    f"{_BLOCK}.attn.proj_2.*": "block{n}.{b}.attn.proj_2.*",
    f"{_BLOCK}.norm2.*": "block{n}.{b}.norm2.*",
    f"{_BLOCK}.mlp.fc1.*": "block{n}.{b}.mlp.fc1.*",
    f"{_BLOCK}.mlp.dwconv.*": "block{n}.{b}.mlp.dwconv.dwconv.*",
    f"{_BLOCK}.mlp.fc2.*": "block{n}.{b}.mlp.fc2.*",
    "stages.{s}.norm.*": "norm{n}.*",
    "head.*": "head.*",
}

_MMPRETRAIN = {
    "stages.{s}.patch_embed.proj.*": "backbone.patch_embed{n}.projection.*",
    "stages.{s}.patch_embed.norm.*": "backbone.patch_embed{n}.norm.*",
    f"{_BLOCK}.layer_scale_1": "backbone.blocks{n}.{b}.layer_scale_1",
    f"{_BLOCK}.layer_scale_2": "backbone.blocks{n}.{b}.layer_scale_2",
    f"{_BLOCK}.norm1.*": "backbone.blocks{n}.{b}.norm1.*",
    f"{_BLOCK}.attn.proj_1.*": "backbone.blocks{n}.{b}.attn.proj_1.*",
    f"{_LKA}.conv0.*": "backbone.blocks{n}.{b}.attn.spatial_gating_unit.DW_conv.*",
    f"{_LKA}.conv_spatial.*": "backbone.blocks{n}.{b}.attn.spatial_gating_unit.DW_D_conv.*",
    f"{_LKA}.conv1.*": "backbone.blocks{n}.{b}.attn.spatial_gating_unit.conv1.*",
    f"{_BLOCK}.attn.proj_2.*": "backbone.blocks{n}.{b}.attn.proj_2.*",
    f"{_BLOCK}.norm2.*": "backbone.blocks{n}.{b}.norm2.*",
    f"{_BLOCK}.mlp.fc1.*": "backbone.blocks{n}.{b}.mlp.fc1.*",
    f"{_BLOCK}.mlp.dwconv.*": "backbone.blocks{n}.{b}.mlp.dwconv.*",
    f"{_BLOCK}.mlp.fc2.*": "backbone.blocks{n}.{b}.mlp.fc2.*",
    "stages.{s}.norm.*": "backbone.norm{n}.*",
    "head.*": "head.fc.*",
}

_HF_STAGE = "van.encoder.stages.{s}"
_HF_LAYER = f"{_HF_STAGE}.layers.{{b}}"
_HF = {
    "stages.{s}.patch_embed.proj.*": f"{_HF_STAGE}.embeddings.convolution.*",
    "stages.{s}.patch_embed.norm.*": f"{_HF_STAGE}.embeddings.normalization.*",
    f"{_BLOCK}.layer_scale_1": f"{_HF_LAYER}.attention_scaling.weight",
    f"{_BLOCK}.layer_scale_2": f"{_HF_LAYER}.mlp_scaling.weight",
    f"{_BLOCK}.norm1.*": f"{_HF_LAYER}.pre_normomalization.*",  # spelt so there
    f"{_BLOCK}.attn.proj_1.*": f"{_HF_LAYER}.attention.pre_projection.conv.*",
    f"{_LKA}.conv0.*": f"{_HF_LAYER}.attention.attention_layer.attention.depth_wise.*",
    f"{_LKA}.conv_spatial.*": f"{_HF_LAYER}.attention.attention_layer.attention.depth_wise_dilated.*",
    f"{_LKA}.conv1.*": f"{_HF_LAYER}.attention.attention_layer.attention.point_wise.*",
    f"{_BLOCK}.attn.proj_2.*": f"{_HF_LAYER}.attention.post_projection.*",
    f"{_BLOCK}.norm2.*": f"{_HF_LAYER}.post_normalization.*",
    f"{_BLOCK}.mlp.fc1.*": f"{_HF_LAYER}.mlp.in_dense.*",
    f"{_BLOCK}.mlp.dwconv.*": f"{_HF_LAYER}.mlp.depth_wise.*",
    f"{_BLOCK}.mlp.fc2.*": f"{_HF_LAYER}.mlp.out_dense.*",
    "stages.{s}.norm.*": f"{_HF_STAGE}.normalization.*",
    "head.*": "classifier.*",
}

# The order is that in which from_format tries them. A file without a head fits official and mmseg alike, and means the same in
# both.
_TABLES = {
    "timm": {native: native for native in _OFFICIAL},
    "official": _OFFICIAL,
    "mmseg": {native: other for native, other in _OFFICIAL.items() if native != "head.*"},
    "mmpretrain": _MMPRETRAIN,
    "hf": _HF,
}

FORMATS = tuple(_TABLES)

# VanModel of transformers holds a last LayerNorm that its forward pass never uses: files it saved have these keys, and nothing
# is lost with them.
WITHOUT_USE = ("van.layernorm.weight", "van.layernorm.bias")


def to_format(state_dict: Mapping[str, Value], fmt: str) -> dict[str, Value]:
    """A native state dict under the names of `fmt`, one of FORMATS; the tensors are the same objects. mmseg loses the head.

    Raises ValueError for another `fmt`, and for keys that aren't native.
    """
    if fmt not in FORMATS:
        raise ValueError(f"unknown weight format {fmt!r}: it must be one of {', '.join(FORMATS)}")
    _, unknown = _rename(state_dict, _TABLES["timm"].items())
    if unknown:
        raise ValueError(f"not keys of a native VAN state dict: {some(unknown)}")
    renamed, _ = _rename(state_dict, _TABLES[fmt].items())
    return renamed


def from_format(weights: Mapping[str, Any]) -> dict[str, Any]:
    """The native state dict of weights in any of FORMATS, which is told by the keys; the tensors are the same objects.

    `weights` is what `bare` takes. WITHOUT_USE is left out.

    Raises ValueError that names the keys in the way if no format has them all.
    """
    state_dict = {key: value for key, value in bare(weights).items() if key not in WITHOUT_USE}
    unknown_by_format = {}
    for fmt, table in _TABLES.items():
        renamed, unknown = _rename(state_dict, ((other, native) for native, other in table.items()))
        if not unknown:
            return renamed
        unknown_by_format[fmt] = unknown
    nearest = min(unknown_by_format, key=lambda fmt: len(unknown_by_format[fmt]))
    raise ValueError(
        f"these weights are in none of the formats {', '.join(FORMATS)}; the nearest is {nearest}, in which there are no keys "
        f"{some(unknown_by_format[nearest])}"
    )


def bare(weights: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict in `weights`: itself or its entry `state_dict`, without the prefix `module.` that data-parallel wrappers leave
    on all keys."""
    inner = weights.get("state_dict")
    state_dict = {str(key): value for key, value in (inner if isinstance(inner, Mapping) else weights).items()}
    wrapped = all(key.startswith("module.") for key in state_dict)
    return {key.removeprefix("module."): value for key, value in state_dict.items()} if wrapped else state_dict


def _rename(state_dict: Mapping[str, Value], rules: Iterable[tuple[str, str]]) -> tuple[dict[str, Value], list[str]]:
    """The values under new names, by rules (old, new), and the keys that no rule fits."""
    patterns = [(_pattern(old), new) for old, new in rules]
    renamed: dict[str, Value] = {}
    unknown = []
    for key, value in state_dict.items():
        for pattern, new in patterns:
            if match := pattern.fullmatch(key):
                renamed[_fill(new, match.groupdict())] = value
                break
        else:
            unknown.append(key)
    return renamed, unknown


def _pattern(template: str) -> re.Pattern[str]:
    """The regular expression of the keys that a table's entry stands for."""
    parts = re.split(r"(\{s\}|\{n\}|\{b\}|\*)", template)
    return re.compile("".join(_PLACEHOLDERS.get(part, re.escape(part)) for part in parts))


def _fill(template: str, found: dict[str, str]) -> str:
    """The key that a table's entry stands for, with the stage, block and tensor found in the same key of the other format."""
    stage = int(found["s"]) if "s" in found else int(found.get("n", 1)) - 1
    name = template.replace("{s}", str(stage)).replace("{n}", str(stage + 1))
    return name.replace("{b}", found.get("b", "")).replace("*", found.get("tensor", ""))


def some(names: Sequence[str], separator: str = ", ") -> str:
    """The first few of many names, for a message."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return separator.join(names[:5]) + more
