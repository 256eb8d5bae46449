"""LKA: the sizes it derives from K and d, what it computes, and how far it sees."""

import pytest
import torch
from torch.nn import functional as F

from pretrain.model.van import LKA

# K, d, then the near and the far kernel size that section 3.1 asks for; (10, 3) and (4, 3) need an uneven padding.
SIZES = [(21, 3, 5, 7), (7, 2, 3, 4), (35, 3, 5, 12), (28, 4, 7, 7), (10, 3, 5, 4), (4, 3, 5, 2), (5, 1, 1, 5)]


@pytest.mark.parametrize(("kernel_size", "dilation", "near", "far"), SIZES)
def test_sizes_follow_from_kernel_and_dilation(kernel_size: int, dilation: int, near: int, far: int) -> None:
    lka = LKA(4, kernel_size, dilation)
    shapes = {name: tuple(p.shape) for name, p in lka.named_parameters()}
    assert shapes == {
        "conv0.weight": (4, 1, near, near),
        "conv0.bias": (4,),
        "conv_spatial.weight": (4, 1, far, far),
        "conv_spatial.bias": (4,),
        "conv1.weight": (4, 4, 1, 1),
        "conv1.bias": (4,),
    }
    assert lka.conv_spatial.dilation == (dilation, dilation)


def test_default_is_the_papers_21_by_21() -> None:
    torch.manual_seed(0)
    lka = LKA(6).double()
    p = dict(lka.named_parameters())
    x = torch.randn(2, 6, 24, 20, dtype=torch.float64)
    attention = F.conv2d(x, p["conv0.weight"], p["conv0.bias"], padding=2, groups=6)
    attention = F.conv2d(attention, p["conv_spatial.weight"], p["conv_spatial.bias"], padding=9, dilation=3, groups=6)
    attention = F.conv2d(attention, p["conv1.weight"], p["conv1.bias"])
    torch.testing.assert_close(lka(x), x * attention, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("kernel_size", "dilation", "near", "far"), SIZES)
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_sees_at_least_the_whole_kernel(kernel_size: int, dilation: int, near: int, far: int) -> None:
    """The positions that reach one output are a square without holes, as wide as K at least."""
    lka = LKA(1, kernel_size, dilation)
    for p in lka.parameters():
        torch.nn.init.ones_(p)
    size = 2 * (near + dilation * far) + 1
    x = torch.ones(1, 1, size, size, requires_grad=True)
    lka(x)[0, 0, size // 2, size // 2].backward()
    assert x.grad is not None
    seen = x.grad[0, 0] != 0
    width = near + dilation * (far - 1)
    assert width >= kernel_size
    assert seen.sum() == width**2
    rows = torch.nonzero(seen.any(dim=1)).flatten()
    assert rows.tolist() == list(range(int(rows[0]), int(rows[0]) + width))
