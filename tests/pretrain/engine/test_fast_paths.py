"""Fast paths of a job's model; a wrong or failing kernel is found before the first step."""

import dataclasses
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from pretrain.config import Config
from pretrain.engine.fast_paths import use_fast_paths
from pretrain.model.fast import cpu, registry, triton
from pretrain.model.fast.triton import block
from pretrain.model.van import VAN, Block
from tests.support.configs import make_config

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


def job(**model: Any) -> Config:
    return make_config(model=model, data={"image_size": 32}, engine={"micro_batch": 4, "precision": "bf16"})


def tiny() -> VAN:
    torch.manual_seed(0)
    return VAN(num_classes=3, embed_dims=(8, 12), depths=(1, 1), mlp_ratios=(2, 2))


@pytest.fixture
def usable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the kernels in Triton's interpreter."""
    runs = dataclasses.replace(registry.FAST_PATHS[VAN], why_no_kernels=lambda model, device: None)
    monkeypatch.setitem(registry.FAST_PATHS, VAN, runs)


def test_on_a_cpu_a_van_takes_the_cpu_path() -> None:
    model = tiny()
    assert use_fast_paths(model, job(), CPU) == "computing: the CPU path (no Triton kernels: as model.kernels=torch asks)"
    assert any(isinstance(module, cpu.Mlp) for module in model.modules())


def test_compiled_blocks_are_the_reference() -> None:
    model = tiny()
    assert "compiled blocks" in use_fast_paths(model, job(compile=True), CPU)
    assert not any(isinstance(module, cpu.Mlp | cpu.DepthwiseConv2d) for module in model.modules())


def test_other_models_compute_as_they_are() -> None:
    model = timm.create_model("resnet10t")
    types = [type(module) for module in model.modules()]
    assert use_fast_paths(model, job(), CPU) == "computing: PyTorch's operators (no fast path exists for ResNet)"
    with pytest.raises(ValueError, match=r"^model\.kernels=triton can't be used: there are none for ResNet;"):
        use_fast_paths(model, job(kernels="triton"), CPU)
    assert [type(module) for module in model.modules()] == types


@pytest.mark.usefixtures("usable")
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_kernels_that_agree_are_taken(precision: str) -> None:
    config = job(kernels="auto")
    config = dataclasses.replace(config, engine=dataclasses.replace(config.engine, precision=precision))
    model = tiny()
    assert use_fast_paths(model, config, CPU).startswith("computing: Triton's kernels")
    assert {type(module) for module in model.modules() if isinstance(module, Block)} == {triton.Block}


def raise_error(*_: Any, **__: Any) -> Tensor:
    raise RuntimeError("out of registers\nand more")


def wrong_gradient(*arguments: Any, **options: Any) -> Tensor:
    y = block.depthwise_conv2d_(*arguments, **options)  # type: ignore[attr-defined]
    return y.detach() * 2 - y


FAULTS = {
    "raises": (raise_error, "stage 0: RuntimeError: out of registers"),
    "wrong gradient": (wrong_gradient, "stage 0: they differ from PyTorch's operators by"),
    "not a number": (
        lambda *a, **o: block.depthwise_conv2d_(*a, **o) * float("nan"),
        "stage 0: they differ from PyTorch's operators by nan",
    ),
}


@pytest.mark.usefixtures("usable")
@pytest.mark.parametrize("kind", FAULTS)
def test_kernels_at_fault_are_not_taken(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    function, message = FAULTS[kind]
    monkeypatch.setattr(block, "depthwise_conv2d_", block.depthwise_conv2d, raising=False)
    monkeypatch.setattr(block, "depthwise_conv2d", function)
    model = tiny()
    assert message in use_fast_paths(model, job(kernels="auto"), CPU)
    assert not any(isinstance(module, triton.Block) for module in model.modules())
    with pytest.raises(ValueError, match=r"model\.kernels=triton can't be used: stage 0"):
        use_fast_paths(model, job(kernels="triton"), CPU)
