"""Converts state-dict keys between the native names and the weight formats of other projects.

    state_dict = to_format(model.state_dict(), "official")       # for the authors' code
    model.load_state_dict(from_format(torch.load(path)))         # a file in any of the formats

| format | who reads it |
|---|---|
| timm | pretrain.model.van itself and timm: the native names |
| official | the authors' VAN-Classification |
| mmseg | the authors' VAN-Segmentation, VAN-Detection and their ports: official without the head |
| mmpretrain | OpenMMLab's mmpretrain |
| hf | VanForImageClassification of Hugging Face transformers (its last release with VAN is 4.30) |

The formats differ only in names, not in tensors or shapes. (mmpretrain and the authors' segmentation code use PyTorch's LayerNorm epsilon
of 1e-5, their classification code 1e-6; a weights file can't express that.)
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from data.common.text import join_first

Value = TypeVar("Value")

# Placeholders in the names below: stage from 0 {s} or from 1 {n}, block of a stage from 0 {b}, and tensor of a layer *.
_PLACEHOLDERS = {
    "{s}": r"(?P<s>[0-3])",
    "{n}": r"(?P<n>[1-4])",
    "{b}": r"(?P<b>0|[1-9]\d*)",
    "*": r"(?P<tensor>weight|bias|running_mean|running_var|num_batches_tracked)",
}

# A name is the prefix of its stage or block and the layer's name.
_COLUMNS = ("timm", "official", "mmpretrain", "hf")
_STAGE_PREFIXES = ("stages.{s}.", "", "backbone.", "van.encoder.stages.{s}.")
_STAGE_LAYERS = (
    ("patch_embed.proj.*", "patch_embed{n}.proj.*", "patch_embed{n}.projection.*", "embeddings.convolution.*"),
    ("patch_embed.norm.*", "patch_embed{n}.norm.*", "patch_embed{n}.norm.*", "embeddings.normalization.*"),
    ("norm.*", "norm{n}.*", "norm{n}.*", "normalization.*"),
)
_BLOCK_PREFIXES = ("stages.{s}.blocks.{b}.", "block{n}.{b}.", "backbone.blocks{n}.{b}.", "van.encoder.stages.{s}.layers.{b}.")
_LKA = "attn.spatial_gating_unit"
_HF_LKA = "attention.attention_layer.attention"
_BLOCK_LAYERS = (
    ("layer_scale_1", "layer_scale_1", "layer_scale_1", "attention_scaling.weight"),
    ("layer_scale_2", "layer_scale_2", "layer_scale_2", "mlp_scaling.weight"),
    ("norm1.*", "norm1.*", "norm1.*", "pre_normomalization.*"),  # transformers' spelling
    ("attn.proj_1.*", "attn.proj_1.*", "attn.proj_1.*", "attention.pre_projection.conv.*"),
    (f"{_LKA}.conv0.*", f"{_LKA}.conv0.*", f"{_LKA}.DW_conv.*", f"{_HF_LKA}.depth_wise.*"),
    (f"{_LKA}.conv_spatial.*", f"{_LKA}.conv_spatial.*", f"{_LKA}.DW_D_conv.*", f"{_HF_LKA}.depth_wise_dilated.*"),
    (f"{_LKA}.conv1.*", f"{_LKA}.conv1.*", f"{_LKA}.conv1.*", f"{_HF_LKA}.point_wise.*"),
    ("attn.proj_2.*", "attn.proj_2.*", "attn.proj_2.*", "attention.post_projection.*"),
    ("norm2.*", "norm2.*", "norm2.*", "post_normalization.*"),
    ("mlp.fc1.*", "mlp.fc1.*", "mlp.fc1.*", "mlp.in_dense.*"),
    ("mlp.dwconv.*", "mlp.dwconv.dwconv.*", "mlp.dwconv.*", "mlp.depth_wise.*"),
    ("mlp.fc2.*", "mlp.fc2.*", "mlp.fc2.*", "mlp.out_dense.*"),
)
_HEADS = ("head.*", "head.*", "head.fc.*", "classifier.*")


def _table(fmt: str) -> dict[str, str]:
    """Maps native names to the names in the column of `fmt`."""
    table, column = dict[str, str](), _COLUMNS.index(fmt)
    for prefixes, layers in ((_STAGE_PREFIXES, _STAGE_LAYERS), (_BLOCK_PREFIXES, _BLOCK_LAYERS)):
        table |= {prefixes[0] + names[0]: prefixes[column] + names[column] for names in layers}
    return table | {_HEADS[0]: _HEADS[column]}


# In the order in which from_format tries them. A file without a head matches official and mmseg, with the same result.
_TABLES = {
    "timm": _table("timm"),
    "official": _table("official"),
    "mmseg": {native: other for native, other in _table("official").items() if native != _HEADS[0]},
    "mmpretrain": _table("mmpretrain"),
    "hf": _table("hf"),
}

FORMATS = tuple(_TABLES)

# VanModel of transformers saves a last LayerNorm that its forward pass never uses.
UNUSED_KEYS = ("van.layernorm.weight", "van.layernorm.bias")


def has_head(fmt: str) -> bool:
    """Returns whether weights in the format include the classifier."""
    return _HEADS[0] in _TABLES[fmt]


def to_format(state_dict: Mapping[str, Value], fmt: str) -> dict[str, Value]:
    """Renames the keys of a native state dict to format `fmt`; mmseg drops the head.

    Raises:
        ValueError: `fmt` is none of FORMATS, or keys are not native.
    """
    if fmt not in FORMATS:
        raise ValueError(f"unknown weight format {fmt!r}: it must be one of {', '.join(FORMATS)}")
    _, unknown = _rename(state_dict, _TABLES["timm"].items())
    if unknown:
        raise ValueError(f"not keys of a native VAN state dict: {join_first(unknown)}")
    renamed, _ = _rename(state_dict, _TABLES[fmt].items())
    return renamed


def from_format(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Renames the keys of weights in any of FORMATS to native names, and drops UNUSED_KEYS.

    Raises:
        ValueError: no format has all of the keys.
    """
    state_dict = {key: value for key, value in unwrap(weights).items() if key not in UNUSED_KEYS}
    unknown_by_format = {}
    for fmt, table in _TABLES.items():
        renamed, unknown = _rename(state_dict, ((other, native) for native, other in table.items()))
        if not unknown:
            return renamed
        unknown_by_format[fmt] = unknown
    nearest = min(unknown_by_format, key=lambda fmt: len(unknown_by_format[fmt]))
    raise ValueError(
        f"these weights are in none of the formats {', '.join(FORMATS)}; the nearest is {nearest}, which lacks the keys "
        f"{join_first(unknown_by_format[nearest])}"
    )


def unwrap(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `weights`, or its entry `state_dict`, without the prefix `module.` of data-parallel wrappers."""
    inner = weights.get("state_dict")
    state_dict = {str(key): value for key, value in (inner if isinstance(inner, Mapping) else weights).items()}
    wrapped = all(key.startswith("module.") for key in state_dict)
    return {key.removeprefix("module."): value for key, value in state_dict.items()} if wrapped else state_dict


def _rename(state_dict: Mapping[str, Value], rules: Iterable[tuple[str, str]]) -> tuple[dict[str, Value], list[str]]:
    """Returns the values renamed by rules (old, new), and the keys that no rule matches."""
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
    """Returns the regular expression that matches the keys of a name with placeholders."""
    parts = re.split(r"(\{s\}|\{n\}|\{b\}|\*)", template)
    return re.compile("".join(_PLACEHOLDERS.get(part, re.escape(part)) for part in parts))


def _fill(template: str, values: dict[str, str]) -> str:
    """Returns a name with its placeholders replaced by the groups that `_pattern` matched."""
    stage = int(values["s"]) if "s" in values else int(values.get("n", 1)) - 1
    name = template.replace("{s}", str(stage)).replace("{n}", str(stage + 1))
    return name.replace("{b}", values.get("b", "")).replace("*", values.get("tensor", ""))
