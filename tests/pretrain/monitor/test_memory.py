"""The error of a GPU whose memory is too small, with the operators of a CPU; a job that ends with it is in test_starts.py."""

import pytest
import timm
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

import pretrain.model.van  # noqa: F401  registers the family with timm
from pretrain import config as settings
from pretrain.config import Config
from pretrain.engine.precision import autocast
from pretrain.model.build import build_model
from pretrain.monitor.memory import activation_bytes, largest_that_fits, out_of_memory_message

pytestmark = pytest.mark.slow

GB = 10**9


@pytest.mark.parametrize(
    ("fixed", "sample", "sizes", "expected"),
    [
        (8 * GB, GB, [2, 4, 8, 16, 32], 32),  # 40 of 80
        (9 * GB, 2 * GB, [2, 4, 8, 16, 32], 16),
        (8 * GB, 33 * GB, [2, 4], None),
    ],
)
def test_the_largest_micro_batch_leaves_a_tenth_free(fixed: int, sample: int, sizes: list[int], expected: int | None) -> None:
    assert largest_that_fits(fixed, sample, 80 * GB, sizes) == expected


@pytest.mark.parametrize(("name", "precision"), [("van_b0", "bf16"), ("van_b0", "fp32"), ("resnet18", "fp32"), ("convnext_atto", "fp32")])
def test_activation_bytes_are_those_of_a_real_forward_pass(name: str, precision: str) -> None:
    with torch.device("meta"):
        shapes = timm.create_model(name, num_classes=10, drop_path_rate=0.1)
    model = timm.create_model(name, num_classes=10, drop_path_rate=0.1)
    measured = measure_kept(model, 4, precision) - measure_kept(model, 2, precision)
    assert 2 * activation_bytes(shapes, 64, precision, "cpu") == pytest.approx(measured, rel=0.001)


def measure_kept(model: nn.Module, batch: int, precision: str) -> int:
    storages = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor), autocast(torch.device("cpu"), precision):
        model(torch.randn(batch, 3, 64, 64).to(memory_format=torch.channels_last))
    weights = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    return sum(storage.nbytes() for pointer, storage in storages.items() if pointer not in weights)


def job(name: str = "van_b3", stages: tuple[int, ...] = (), **engine: object) -> Config:
    return settings.from_dict(
        {
            "name": "tiny", "global_batch": 8192, "epochs": 90, "data": {"train": "unused"}, "optim": {"lr": 4e-3},
            "model": {"name": name, "classes": 21841, "checkpoint_stages": list(stages)},
            "engine": {"precision": "fp32", "micro_batch": 128, **engine},
        }
    )  # fmt: skip


def test_the_error_names_the_micro_batch_that_fits() -> None:
    text = out_of_memory_message(job(), 64, "cpu", state=GB, total=40 * GB)
    with torch.device("meta"):
        model = build_model(job())
    sample = activation_bytes(model, 224, "fp32", "cpu")
    fits = 64 if 1.3 * GB + 64 * sample < 36 * GB else 32
    assert text == (
        f"out of memory with engine.micro_batch=128: of 40.0 GB the model's state and gradients take 1.2, and each sample's activations "
        f"{sample / GB:.2f}. engine.micro_batch={fits} should fit, by this estimate; the global batch stays 8192 either way. Try "
        f"engine.micro_batch={fits}, or model.checkpoint_stages=[0,1,2,3], or engine.zero_stage=2"
    )


def test_the_error_reports_that_no_smaller_micro_batch_fits() -> None:
    text = out_of_memory_message(job(zero_stage=3, micro_batch=2), 64, "cpu", state=GB, total=2 * GB)
    assert "No smaller engine.micro_batch should fit, by this estimate" in text
    assert text.endswith("Try model.checkpoint_stages=[0,1,2,3]")


@pytest.mark.parametrize(
    ("config", "advice"),
    [
        (job("resnet18"), "Try model.checkpoint_stages=[0,1,2,3], or engine.zero_stage=2"),
        (job("vgg11"), "Try engine.zero_stage=2"),  # can't recompute
        (job(stages=(0, 1, 2, 3), zero_stage=3), "Try more GPUs or GPUs with more memory"),
    ],
)
def test_the_advice_fits_the_model_and_the_settings(config: Config, advice: str) -> None:
    assert out_of_memory_message(config, 64, "cpu", state=GB, total=GB).endswith(advice)
