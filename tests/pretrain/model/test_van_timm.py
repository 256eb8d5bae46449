"""VAN in timm's hands: its interface, and what other programs do with a timm model: script it, trace it, cut it, export it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import onnxruntime
import pytest
import timm
import torch
from timm.models import FeatureGraphNet, group_parameters
from torch import nn

from pretrain.model import van
from pretrain.model.formats import to_format
from tests.pretrain.model.test_van import images, meta_model, small_model

pytestmark = pytest.mark.slow

# timm's interface


def test_features_only() -> None:
    model = small_model(features_only=True)
    assert model.feature_info.channels() == [32, 64, 160, 256]
    assert model.feature_info.reduction() == [4, 8, 16, 32]
    shapes = [tuple(f.shape) for f in model(images(size=64))]
    assert shapes == [(2, 32, 16, 16), (2, 64, 8, 8), (2, 160, 4, 4), (2, 256, 2, 2)]
    shallow = small_model(features_only=True, out_indices=(0, 2))
    assert [tuple(f.shape) for f in shallow(images(size=64))] == [shapes[0], shapes[2]]
    assert not any(name.startswith("model.stages.3") for name, _ in shallow.named_parameters())


def test_head() -> None:
    model = small_model().eval()
    x = images()
    features = model.forward_features(x)
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
    torch.testing.assert_close(model.forward_head(features), model(x))

    model = model.double()
    model.reset_classifier(7)
    assert model.num_classes == 7
    assert model(x.double()).shape == (2, 7)
    assert model.get_classifier() is model.head
    assert model.head.weight.std().item() == pytest.approx(0.02, rel=0.2)
    model.reset_classifier(0)
    assert model(x.double()).shape == (2, model.num_features)
    model.reset_classifier(0, "")
    assert model(x.double()).shape == (2, model.num_features, 2, 2)
    with pytest.raises(AssertionError, match="Invalid pool type: median"):
        model.reset_classifier(5, "median")


# As timm.layers.SelectAdaptivePool2d names them.
POOLS = {
    "avg": lambda x: x.mean((2, 3)),
    "max": lambda x: x.amax((2, 3)),
    "avgmax": lambda x: (x.mean((2, 3)) + x.amax((2, 3))) / 2,
    "catavgmax": lambda x: torch.cat([x.mean((2, 3)), x.amax((2, 3))], dim=1),
    "": lambda x: x,
}


@pytest.mark.parametrize("pool", POOLS)
def test_global_pool(pool: str) -> None:
    classes = 10 if pool else 0
    model, x = small_model(global_pool=pool, num_classes=classes).eval(), images()
    features = model.forward_features(x)
    pooled = model.forward_head(features, pre_logits=True)
    torch.testing.assert_close(pooled, POOLS[pool](features), rtol=1e-6, atol=1e-6)
    assert pooled.shape[1] == model.head_hidden_size == (512 if pool == "catavgmax" else 256)
    assert model.num_features == features.shape[1] == 256
    assert set(model.state_dict()) - set(small_model(num_classes=0).state_dict()) == ({"head.weight", "head.bias"} if pool else set())
    if pool:
        torch.testing.assert_close(model(x), model.head(pooled))

    model.reset_classifier(classes)  # keeps the pooling
    assert torch.equal(model.forward_head(features, pre_logits=True), pooled)
    model.reset_classifier(4, "avg")
    assert model.head_hidden_size == 256
    assert model(x).shape == (2, 4)
    assert not any(module.training for module in model.modules())
    model.prune_intermediate_layers([1])
    model.reset_classifier(4, "catavgmax")
    assert (model.num_features, model.head_hidden_size) == (64, 128)
    assert model(x).shape == (2, 4)


def test_created_on_a_device_and_in_a_type() -> None:
    whole = small_model(device="cpu", dtype=torch.float64)
    assert {p.dtype for p in whole.parameters()} == {torch.float64}
    expected = small_model().double().state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in whole.state_dict().items())
    empty = small_model(device="meta", dtype=torch.float64)
    assert {tensor.device.type for tensor in [*empty.parameters(), *empty.buffers()]} == {"meta"}
    empty.to_empty(device="cpu").load_state_dict(expected)
    assert torch.equal(empty.eval()(images().double()), whole.eval()(images().double()))


def test_pretrained_weights_for_other_classes_and_channels() -> None:
    source = small_model(seed=3)
    overlay = {"state_dict": source.state_dict(), "num_classes": 10}
    same = timm.create_model("van_b0", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=10).eval()
    torch.testing.assert_close(same(images()), source.eval()(images()))
    grey = timm.create_model("van_b0", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=4, in_chans=1)
    assert grey.head.out_features == 4
    weight = grey.state_dict()["stages.0.patch_embed.proj.weight"]
    torch.testing.assert_close(weight, source.state_dict()["stages.0.patch_embed.proj.weight"].sum(dim=1, keepdim=True))


@pytest.mark.parametrize("wrapped", [True, False])
def test_timm_loads_the_authors_files(tmp_path: Path, wrapped: bool) -> None:
    source, x, path = small_model(seed=3).eval(), images(), tmp_path / "van_b0.pth"
    weights = to_format(source.state_dict(), "official")
    torch.save({"state_dict": weights} if wrapped else weights, path)
    for arguments in (
        {"checkpoint_path": str(path)},
        {"pretrained": True, "pretrained_cfg_overlay": {"file": str(path), "num_classes": 10}},
    ):
        model = timm.create_model("van_b0", num_classes=10, **arguments).eval()
        assert torch.equal(model(x), source(x)), arguments
    features = timm.create_model("van_b0", features_only=True, pretrained=True, pretrained_cfg_overlay={"file": str(path)})
    assert torch.equal(features.eval()(x)[-1], source.forward_features(x))
    grey = timm.create_model(
        "van_b0", num_classes=4, in_chans=1, pretrained=True, pretrained_cfg_overlay={"file": str(path), "num_classes": 10}
    )
    assert grey.state_dict()["stages.0.patch_embed.proj.weight"].shape[1] == 1


def test_the_file_alone_is_the_model(tmp_path: Path) -> None:
    """Copied into an empty folder, it builds every variant and computes the golden logits, with torch and timm alone."""
    shutil.copy(van.__file__, tmp_path / "van.py")
    source = small_model(seed=3).eval()
    torch.save({"state_dict": to_format(source.state_dict(), "official")}, tmp_path / "official.pth")
    torch.save([images(), source(images()).detach()], tmp_path / "expected.pt")
    code = """
import sys, timm, torch, van
with torch.device("meta"):
    assert all(isinstance(timm.create_model(name), van.VAN) for name in van.VARIANTS)
x, expected = torch.load("expected.pt")
model = timm.create_model("van_b0", num_classes=10, checkpoint_path="official.pth").eval()
assert torch.equal(model(x), expected)
assert not {"pretrain", "data", "deepspeed", "nvidia.dali"} & sys.modules.keys()
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def test_parameter_groups() -> None:
    model = meta_model("van_b0")
    layers = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    assert layers["stages.0.patch_embed.proj.weight"] == 0
    assert layers["stages.0.blocks.0.mlp.fc1.weight"] == 1
    assert layers["stages.0.norm.weight"] == layers["stages.0.blocks.2.norm1.weight"] == 3
    assert layers["stages.1.patch_embed.proj.weight"] == layers["stages.1.blocks.0.layer_scale_1"] == 4
    assert layers["head.weight"] == 14
    coarse = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    assert sorted(set(coarse.values())) == [0, 1, 2, 3, 4, 5]
    one_dimensional = {name for name, p in model.named_parameters() if p.ndim == 1}
    assert model.no_weight_decay() <= one_dimensional
    assert len(model.no_weight_decay()) == 2 * 13


# Other programs


@pytest.fixture(
    scope="module", params=["avg", pytest.param("fastcatavgmax", marks=pytest.mark.long)]
)  # TorchScript takes no other catavgmax
def model(request: pytest.FixtureRequest) -> nn.Module:
    return small_model(global_pool=request.param).eval()


@torch.no_grad()
def test_torchscript(model: nn.Module) -> None:
    x = images()
    expected = model(x)
    assert torch.equal(torch.jit.script(model)(x), expected)
    assert torch.equal(torch.jit.trace(model, x)(x), expected)
    features = small_model(features_only=True).eval()
    assert all(torch.equal(*pair) for pair in zip(torch.jit.script(features)(x), features(x), strict=True))


@torch.no_grad()
def test_feature_extraction_by_torch_fx(model: nn.Module) -> None:
    x = images()
    assert torch.equal(torch.fx.symbolic_trace(model)(x), model(x))
    expected = model.forward_intermediates(x, intermediates_only=True)  # type: ignore[operator]
    for training in (False, True):
        net = FeatureGraphNet(model.train(training), out_indices=(0, 3))
        model.eval()
        assert [f.shape for f in net(x)] == [expected[0].shape, expected[3].shape]
    assert all(torch.equal(*pair) for pair in zip(FeatureGraphNet(model, (0, 3))(x), (expected[0], expected[3]), strict=True))


@torch.no_grad()
def test_torch_export(model: nn.Module) -> None:
    x = images(6)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (x[:2],), dynamic_shapes=({0: batch},))
    for size in (2, 5):
        torch.testing.assert_close(program.module()(x[:size]), model(x[:size]), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_onnx(model: nn.Module, tmp_path: Path) -> None:
    path, x = tmp_path / "van.onnx", images()
    torch.onnx.export(model, (x,), path, dynamo=True, input_names=["images"], output_names=["logits"], verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"images": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.long
@torch.no_grad()
def test_torch_compile_at_several_image_sizes() -> None:
    model = small_model(depths=(1, 1, 1, 1)).eval()
    compiled = torch.compile(model)
    for size in (64, 96, 80):
        torch.testing.assert_close(compiled(images(size=size)), model(images(size=size)), rtol=1e-4, atol=1e-5)
