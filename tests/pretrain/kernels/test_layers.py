"""The model on Triton's kernels: which layers take them, and that it is the same model."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor
from triton import knobs

from pretrain import van
from pretrain.depthwise import DepthwiseConv2d
from pretrain.van import VAN, Block, use_kernels
from tests.ranks import run_on_ranks

DEVICE = "cpu" if knobs.runtime.interpret else "cuda"
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def tiny() -> VAN:
    torch.manual_seed(0)
    sizes = {"embed_dims": (8, 12, 16, 40), "depths": (1, 1, 1, 1), "mlp_ratios": (2, 2, 2, 2)}
    return VAN(num_classes=3, drop_path_rate=0.5, **sizes)


def outcome(model: VAN, images: Tensor, precision: torch.dtype) -> dict[str, Tensor]:
    torch.manual_seed(3)  # of the dropped paths
    with torch.autocast(DEVICE, torch.bfloat16, enabled=precision == torch.bfloat16):
        logits = model(images)
    torch.nn.functional.cross_entropy(logits.float(), torch.tensor([0, 2, 1], device=DEVICE)).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(grads) == len(list(model.parameters()))
    return {"logits": logits.detach().float()} | grads


@pytest.fixture
def plain_and_fast(monkeypatch: pytest.MonkeyPatch) -> tuple[VAN, VAN]:
    """A model on PyTorch's operators, and the same one on Triton's."""
    plain = tiny().to(DEVICE).train()
    with torch.no_grad():
        for name, p in plain.named_parameters():
            if "layer_scale" in name:
                p.fill_(1.0)  # at its initial 0.01 an error of a branch would be a hundredth of itself
    fast = copy.deepcopy(plain)
    monkeypatch.setattr(van, "unusable", lambda device: None)
    assert use_kernels(fast, "triton", GPU) == "kernels: Triton for 12 of 12 depth-wise convolutions, and for 8 shortcuts"
    assert fast.state_dict().keys() == plain.state_dict().keys()
    return plain, fast


IMAGES = torch.randn(3, 3, 32, 44, generator=torch.Generator().manual_seed(1)).to(memory_format=torch.channels_last)


def test_the_model_computes_the_same(plain_and_fast: tuple[VAN, VAN]) -> None:
    """In training, with paths dropped: the same samples drop them, and all gradients are those of PyTorch's operators."""
    expected, found = (outcome(model, IMAGES.to(DEVICE), torch.float32) for model in plain_and_fast)
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-4, atol=1e-4 * float(value.abs().max()) + 1e-6, msg=lambda t, n=name: f"{n}: {t}"
        )


def test_under_autocast_it_is_as_close_to_fp32(plain_and_fast: tuple[VAN, VAN]) -> None:
    """As PyTorch's operators in bf16 are, but for the interpreter, which cuts bf16 off where a GPU rounds."""
    plain, fast = plain_and_fast
    exact = outcome(copy.deepcopy(plain), IMAGES.to(DEVICE), torch.float32)
    distances = []
    for model in (plain, fast):
        found = outcome(model, IMAGES.to(DEVICE), torch.bfloat16)
        distances.append(torch.cat([(found[name] - exact[name]).flatten() for name in exact]).norm())
    assert distances[1] < 2 * distances[0]
    assert 2 * distances[0] < 0.2 * torch.cat([value.flatten() for value in exact.values()]).norm()  # so the bound says something


def chosen(model: torch.nn.Module) -> list[bool]:
    return [m.triton for m in model.modules() if isinstance(m, DepthwiseConv2d | Block)]


def test_auto_is_pytorch_on_a_cpu() -> None:
    model = tiny()
    assert use_kernels(model, "auto", CPU) == "kernels: PyTorch's, the device is cpu"
    assert not any(chosen(model))


def test_torch_is_pytorch_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(van, "unusable", lambda device: None)
    model = tiny()
    use_kernels(model, "auto", GPU)
    assert all(chosen(model))
    assert use_kernels(model, "torch", GPU) == "kernels: PyTorch's, as model.kernels=torch asks"
    assert not any(chosen(model))


def test_triton_is_an_error_where_it_cant_run() -> None:
    with pytest.raises(ValueError, match=r"model\.kernels=triton can't be: the device is cpu; model\.kernels=auto takes"):
        use_kernels(tiny(), "triton", CPU)


def test_a_layer_without_a_kernel_falls_back_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(van, "unusable", lambda device: None)
    model = tiny()
    model.stages[0].blocks[0].attn.spatial_gating_unit.conv_spatial = DepthwiseConv2d(8, 9, 2)  # type: ignore[union-attr, index]
    assert use_kernels(model, "auto", GPU) == "kernels: Triton for 11 of 12 depth-wise convolutions, and for 8 shortcuts"
    assert chosen(model).count(False) == 1
    with pytest.raises(ValueError, match="1 convolutions have no such kernel"):
        use_kernels(model, "triton", GPU)


def test_old_gpus_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert use_kernels(tiny(), "auto", GPU) == "kernels: PyTorch's, compute capability 7.5 is below 8.0, which bf16 needs"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert "Triton for 12 of 12" in use_kernels(tiny(), "auto", GPU)


def test_all_layers_of_the_published_models_have_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(van, "unusable", lambda device: None)
    for name in ("van_b3", "van_b6"):
        with torch.device("meta"):
            model = timm.create_model(name)
        use_kernels(model, "triton", GPU)
        assert all(chosen(model))


def losses_in_deepspeed(stage: int, fast: bool) -> list[float]:
    """One rank: four steps, with gradient checkpointing in the last stage."""
    from pretrain import config as settings
    from pretrain import engine as engines

    config = settings.from_dict(
        {
            "name": "tiny", "global_batch": 3, "epochs": 1.0, "model": {"name": "van_b0", "classes": 3}, "data": {"train": "unused"},
            "optim": {"lr": 1e-2}, "engine": {"micro_batch": 3, "device": "cpu", "zero_stage": stage},
        }
    )  # fmt: skip
    engines.start(config.engine)
    model = tiny()
    model.set_grad_checkpointing([False, False, False, True])
    for module in model.modules():
        if isinstance(module, DepthwiseConv2d | Block):
            module.triton = fast
    engine = engines.build(config, model, 1)
    engine.train()
    losses = []
    for step in range(4):
        torch.manual_seed(step)
        loss = torch.nn.functional.cross_entropy(engine(IMAGES).float(), torch.tensor([0, 2, 1]))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    engines.stop()
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, pytest.param(3, marks=pytest.mark.full)])
def test_trains_in_deepspeed_as_pytorchs_operators_do(stage: int) -> None:
    """In bf16. Stage 3 takes weights away between forward and backward; the operators find them again."""
    fast, plain = (run_on_ranks(1, losses_in_deepspeed, stage=stage, fast=fast)[0] for fast in (True, False))
    assert fast == pytest.approx(plain, rel=2e-2)
    assert fast != plain  # the kernels round otherwise, so these are others
    assert abs(plain[-1] - plain[0]) > 0.1  # a step's weight updates are seen in the losses


@pytest.mark.slow
def test_a_job_says_at_its_start_that_triton_cant_run(tmp_path: Path, drawn: Path) -> None:
    """Exit code 2, before anything is trained."""
    settings = (
        f"data.train={drawn / 'train'}", "data.val=null", "data.image_size=32", f"run.dir={tmp_path / 'run'}", "steps=1",
        "model.name=van_b0", "model.classes=10", "global_batch=4", "engine.micro_batch=4", "engine.device=cpu", "model.kernels=triton",
    )  # fmt: skip
    command = [sys.executable, "-m", "launch", "configs/van_b3_in22k.yaml", *settings]
    found = subprocess.run(command, env=os.environ | {"RANKS": "1"}, cwd=Path(__file__).parents[3], capture_output=True, text=True)
    assert found.returncode == 2, found.stdout + found.stderr
    assert "model.kernels=triton can't be: the device is cpu" in found.stderr + found.stdout
