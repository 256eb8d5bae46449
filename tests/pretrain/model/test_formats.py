"""Names of the weight formats: the authors' to the letter, the others by hand, and all of them both ways."""

import json

import pytest
import timm
import torch

import pretrain.model.van  # noqa: F401  (registers the models)
from pretrain.model.formats import FORMATS, from_format, has_head, to_format
from tests.support import REFERENCE as REFERENCE_FOLDER

REFERENCE = json.loads((REFERENCE_FOLDER / "van_state_dicts.json").read_text())
AUTHORS_VARIANTS = sorted(REFERENCE)


@pytest.fixture(scope="module")
def native() -> dict[str, dict[str, torch.Tensor]]:
    """State dicts of all variants without memory behind them."""
    with torch.device("meta"):
        return {variant: timm.create_model(variant).state_dict() for variant in AUTHORS_VARIANTS}


@pytest.mark.parametrize("variant", AUTHORS_VARIANTS)
def test_official_keys_and_shapes_are_the_authors(native: dict, variant: str) -> None:
    official = to_format(native[variant], "official")
    assert {key: list(value.shape) for key, value in official.items()} == REFERENCE[variant]["state_dict"]


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("variant", AUTHORS_VARIANTS)
def test_round_trip(native: dict, variant: str, fmt: str) -> None:
    state_dict = {key: value for key, value in native[variant].items() if has_head(fmt) or not key.startswith("head.")}
    there = to_format(native[variant], fmt)
    assert len(there) == len(state_dict), "two keys became one"
    back = from_format(there)
    assert list(back) == list(state_dict)
    assert all(back[key] is value for key, value in state_dict.items())


# Written by hand from the projects' own naming, with the block and the stages counted as they do.
BY_HAND = {
    "mmseg": {
        "stages.0.patch_embed.proj.weight": "patch_embed1.proj.weight",
        "stages.2.blocks.26.mlp.dwconv.weight": "block3.26.mlp.dwconv.dwconv.weight",
        "stages.3.norm.bias": "norm4.bias",
    },
    "mmpretrain": {
        "stages.0.patch_embed.proj.weight": "backbone.patch_embed1.projection.weight",
        "stages.1.patch_embed.norm.running_var": "backbone.patch_embed2.norm.running_var",
        "stages.2.blocks.26.attn.spatial_gating_unit.conv0.bias": "backbone.blocks3.26.attn.spatial_gating_unit.DW_conv.bias",
        "stages.2.blocks.0.attn.spatial_gating_unit.conv_spatial.weight": ("backbone.blocks3.0.attn.spatial_gating_unit.DW_D_conv.weight"),
        "stages.0.blocks.2.attn.spatial_gating_unit.conv1.weight": "backbone.blocks1.2.attn.spatial_gating_unit.conv1.weight",
        "stages.0.blocks.2.attn.proj_1.weight": "backbone.blocks1.2.attn.proj_1.weight",
        "stages.0.blocks.2.mlp.dwconv.weight": "backbone.blocks1.2.mlp.dwconv.weight",
        "stages.3.blocks.1.layer_scale_2": "backbone.blocks4.1.layer_scale_2",
        "stages.3.norm.bias": "backbone.norm4.bias",
        "head.weight": "head.fc.weight",
    },
    "hf": {
        "stages.0.patch_embed.proj.weight": "van.encoder.stages.0.embeddings.convolution.weight",
        "stages.1.patch_embed.norm.running_mean": "van.encoder.stages.1.embeddings.normalization.running_mean",
        "stages.2.blocks.26.norm1.num_batches_tracked": ("van.encoder.stages.2.layers.26.pre_normomalization.num_batches_tracked"),
        "stages.2.blocks.26.attn.proj_1.weight": "van.encoder.stages.2.layers.26.attention.pre_projection.conv.weight",
        "stages.2.blocks.26.attn.spatial_gating_unit.conv0.bias": (
            "van.encoder.stages.2.layers.26.attention.attention_layer.attention.depth_wise.bias"
        ),
        "stages.2.blocks.0.attn.spatial_gating_unit.conv_spatial.weight": (
            "van.encoder.stages.2.layers.0.attention.attention_layer.attention.depth_wise_dilated.weight"
        ),
        "stages.2.blocks.0.attn.spatial_gating_unit.conv1.weight": (
            "van.encoder.stages.2.layers.0.attention.attention_layer.attention.point_wise.weight"
        ),
        "stages.0.blocks.2.attn.proj_2.bias": "van.encoder.stages.0.layers.2.attention.post_projection.bias",
        "stages.0.blocks.2.layer_scale_1": "van.encoder.stages.0.layers.2.attention_scaling.weight",
        "stages.0.blocks.2.norm2.weight": "van.encoder.stages.0.layers.2.post_normalization.weight",
        "stages.0.blocks.2.mlp.fc1.weight": "van.encoder.stages.0.layers.2.mlp.in_dense.weight",
        "stages.0.blocks.2.mlp.dwconv.weight": "van.encoder.stages.0.layers.2.mlp.depth_wise.weight",
        "stages.0.blocks.2.mlp.fc2.bias": "van.encoder.stages.0.layers.2.mlp.out_dense.bias",
        "stages.0.blocks.2.layer_scale_2": "van.encoder.stages.0.layers.2.mlp_scaling.weight",
        "stages.3.norm.bias": "van.encoder.stages.3.normalization.bias",
        "head.weight": "classifier.weight",
    },
}


@pytest.mark.parametrize("fmt", sorted(BY_HAND))
def test_names_written_by_hand(native: dict, fmt: str) -> None:
    names = to_format({key: key for key in native["van_b3"]}, fmt)
    assert {old: new for new, old in names.items() if old in BY_HAND[fmt]} == BY_HAND[fmt]


def test_wrappings_are_taken_off(native: dict) -> None:
    official = to_format(native["van_b0"], "official")
    wrapped = {"epoch": 3, "state_dict": {f"module.{key}": value for key, value in official.items()}}
    assert from_format(wrapped) == native["van_b0"]


def test_hf_layernorm_without_use_is_left_out(native: dict) -> None:
    hf = to_format(native["van_b0"], "hf")
    assert from_format({**hf, "van.layernorm.weight": torch.ones(256)}) == native["van_b0"]


def test_unknown_keys_are_named(native: dict) -> None:
    official = to_format(native["van_b0"], "official")
    with pytest.raises(ValueError, match=r"nearest is official, .* block1\.0\.attn\.extra\.weight$"):
        from_format({**official, "block1.0.attn.extra.weight": torch.ones(1)})
    with pytest.raises(ValueError, match=r"conv1\.weight, layer1\.weight"):
        from_format({"conv1.weight": torch.ones(1), "layer1.weight": torch.ones(1)})


@pytest.mark.parametrize(
    "key",
    ["block5.0.norm1.weight", "block1.00.norm1.weight", "block1.0.mlp.dwconv.weight", "block1.0.norm1.scale", "xhead.bias"],
)
def test_a_name_fits_wholly_or_not_at_all(native: dict, key: str) -> None:
    official = to_format(native["van_b0"], "official")
    with pytest.raises(ValueError, match=key.replace(".", r"\.")):
        from_format({**official, key: torch.ones(1)})


def test_to_format_refuses_what_it_cannot_name(native: dict) -> None:
    with pytest.raises(ValueError, match=r"'onnx'.* official"):
        to_format(native["van_b0"], "onnx")
    with pytest.raises(ValueError, match=r"patch_embed1\.proj\.weight"):
        to_format(to_format(native["van_b0"], "official"), "hf")
