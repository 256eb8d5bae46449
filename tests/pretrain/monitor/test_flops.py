"""The arithmetic of a training image, against published figures, and GPUs by name."""

import pytest
import timm
import torch

import pretrain.model.van  # noqa: F401  registers the family with timm
from pretrain.monitor.flops import mfu, peak_by_name, peak_flops, training_flops

pytestmark = pytest.mark.slow

# Multiply-adds of a forward pass at 224 px with 1,000 classes, in G: arXiv 2202.09741, tables 2 and 5, which call them FLOPs; timm's
# results/benchmark-infer-*.csv for the others, of which one has no BatchNorm.
PUBLISHED = {"van_b0": 0.9, "van_b1": 2.5, "van_b2": 5.0, "van_b3": 9.0, "van_b4": 12.2, "van_b5": 17.2, "van_b6": 38.4}
PUBLISHED |= {"resnet50": 4.11, "convnext_tiny": 4.47}


@pytest.mark.parametrize(("name", "multiply_adds"), PUBLISHED.items())
def test_training_takes_three_times_the_published_forward_pass(name: str, multiply_adds: float) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=1000, drop_path_rate=0.1)
    assert (training_flops(model, 224) or 0) / 6e9 == pytest.approx(multiply_adds, abs=0.05, rel=0.01)


@pytest.mark.parametrize(
    ("name", "precision", "teraflops"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312), ("A100-SXM4-40GB", "fp32", 156), ("NVIDIA H100 80GB HBM3", "fp16", 989),
        ("NVIDIA H100 80GB HBM3", "fp32", 494.5), ("NVIDIA H100 NVL", "bf16", 835.5), ("NVIDIA H200", "bf16", 989),
        ("NVIDIA GH200 480GB", "bf16", 989), ("NVIDIA L40", "bf16", None), ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bf16", None),
    ],
)  # fmt: skip
def test_peak_flops_follow_the_name_of_the_gpu(name: str, precision: str, teraflops: float | None) -> None:
    assert peak_by_name(name, precision) == (None if teraflops is None else teraflops * 1e12)


def test_mfu_of_a_gpu_and_none_on_a_cpu() -> None:
    assert peak_flops(torch.device("cpu"), "bf16") is None
    assert mfu(1000, 53.6e9, 989e12) == pytest.approx(0.0542, abs=1e-4)
