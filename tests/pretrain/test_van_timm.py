"""VAN as other programs take a timm model: scripted, traced, cut into features, exported."""

from pathlib import Path

import onnxruntime
import pytest
import timm
import torch
from timm.models import FeatureGraphNet
from torch import Tensor, nn

import pretrain.van  # noqa: F401  registers the family with timm


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("van_b0", num_classes=10).eval()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_torchscript(model: nn.Module, images: Tensor) -> None:
    expected = model(images)
    assert torch.equal(torch.jit.script(model)(images), expected)
    assert torch.equal(torch.jit.trace(model, images)(images), expected)


def test_torchscript_trains(images: Tensor) -> None:
    scripted = torch.jit.script(timm.create_model("van_b0", num_classes=10).train())
    scripted(images).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in scripted.parameters())


@torch.no_grad()
def test_feature_extraction_by_torch_fx(model: nn.Module, images: Tensor) -> None:
    assert torch.equal(torch.fx.symbolic_trace(model)(images), model(images))
    expected = model.forward_intermediates(images, intermediates_only=True)  # type: ignore[operator]
    for training in (False, True):
        net = FeatureGraphNet(model.train(training), out_indices=(0, 3))
        model.eval()
        assert [f.shape for f in net(images)] == [expected[0].shape, expected[3].shape]
    assert all(torch.equal(*pair) for pair in zip(FeatureGraphNet(model, (0, 3))(images), (expected[0], expected[3]), strict=True))


@torch.no_grad()
def test_torch_export(model: nn.Module, images: Tensor) -> None:
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (images,), dynamic_shapes=({0: batch},))
    for size in (2, 5):
        inputs = images.repeat(3, 1, 1, 1)[:size]
        torch.testing.assert_close(program.module()(inputs), model(inputs), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_onnx(model: nn.Module, images: Tensor, tmp_path: Path) -> None:
    path = tmp_path / "van.onnx"
    torch.onnx.export(model, (images,), path, dynamo=True, input_names=["images"], output_names=["logits"], verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), model(images), rtol=1e-4, atol=1e-4)
