"""The roofline: against a count by others, and by hand."""

import pytest

from benchmarks.training.roofline import BUILT, DEVICES, EAGER, FUSED, Device, Kernel, Work, attainable, find_device, image_bytes, work
from pretrain.monitor.flops import peak_by_name

H200, H100, A100 = (find_device(name) for name in ("NVIDIA H200", "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB"))

# Images a second at 224 px, eager and fused, and GB an image: computed independently by the same method, with patch embeddings.
COUNTED = [
    (H200, "van_b3", 3480, 6060), (H200, "van_b4", 2690, 4680), (H200, "van_b5", 2480, 4140), (H200, "van_b6", 1015, 1740),
    (H100, "van_b3", 2550, 4550), (H100, "van_b6", 760, 1350), (A100, "van_b3", 1390, 2340),
]  # fmt: skip
GIGABYTES = {"van_b3": (1.29, 0.71), "van_b4": (1.66, 0.91), "van_b5": (1.66, 0.91), "van_b6": (4.20, 2.30)}


@pytest.mark.parametrize(("device", "model", "eager", "fused"), COUNTED)
def test_rates_are_those_of_an_independent_count(device: Device, model: str, eager: float, fused: float) -> None:
    assert attainable(model, 224, EAGER, device) == pytest.approx(eager, rel=0.05)
    assert attainable(model, 224, FUSED, device) == pytest.approx(fused, rel=0.05)


@pytest.mark.parametrize(("model", "gigabytes"), GIGABYTES.items())
def test_bytes_are_those_of_an_independent_count(model: str, gigabytes: tuple[float, float]) -> None:
    found = tuple(image_bytes(model, 224, kernels) / 1e9 for kernels in (EAGER, FUSED))
    assert found == pytest.approx(gigabytes, rel=0.03)


@pytest.mark.parametrize(("model", "gigaflops"), [("van_b3", 53.6), ("van_b4", 72.9), ("van_b5", 102.9), ("van_b6", 232.4)])
def test_all_cuts_do_the_arithmetic_of_the_model(model: str, gigaflops: float) -> None:
    """All but patch embeddings and head: a few per cent. What is built computes the 3x3 once more."""
    again = sum(part.core_flops for part in work(model, 224, [Kernel("", wide_taps=9)]))
    sums = [sum(part.tensor_flops + part.core_flops for part in work(model, 224, kernels)) for kernels in (EAGER, FUSED, BUILT)]
    assert sums == pytest.approx([sums[0], sums[0], sums[0] + again])
    assert 0.96 < sums[0] / (gigaflops * 1e9) < 1


def test_a_kernel_by_hand() -> None:
    """The first stage of VAN-B0: 3 blocks, 56 x 56 positions, 32 channels, 256 hidden ones."""
    first = work("van_b0", 224, [Kernel("", maps=1, wide=2, products=1, mlp_products=1, taps=25, wide_taps=9)])[0]
    positions = 3 * 56 * 56
    assert first.bytes == positions * (32 + 2 * 256) * 2
    assert first.tensor_flops == positions * 2 * (32 * 32 + 32 * 256)
    assert first.core_flops == positions * 2 * (25 * 32 + 9 * 256)
    assert work("van_b0", 220, [Kernel("", maps=1)])[3].bytes == 2 * 7 * 7 * 256 * 2  # maps are rounded up


def test_the_slowest_of_three_bounds() -> None:
    one = Work(bytes=6.0, tensor_flops=20.0, core_flops=3.0)
    assert [one.seconds(Device(*rates)) for rates in ((1, 10, 1), (10, 1, 10), (10, 100, 1))] == [6.0, 20.0, 3.0]


def test_devices_are_in_the_table_of_peaks_too() -> None:
    """And matrix products reach less than those."""
    for name in ("NVIDIA H200", "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB", "NVIDIA B200"):
        device, peak = find_device(name), peak_by_name(name, "bf16")
        assert device is not None
        assert peak is not None
        assert 0.75 < device.tensor_flops / peak < 0.9
    assert len(DEVICES) == 4
    assert find_device("NVIDIA GeForce RTX 4090") is None
