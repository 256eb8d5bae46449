"""The depth-wise convolution that trains on a CPU is PyTorch's, value for value."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.depthwise import DepthwiseConv2d

# kernel, dilation; height, width: maps of 1, smaller than the kernel's reach, prime sizes, no multiple of the dilation
LAYERS = [(3, 1), (5, 1), (7, 3), (3, 2)]
MAPS = [(1, 1), (2, 5), (7, 7), (13, 4), (23, 20)]


def outcome(layer: nn.Conv2d, x: Tensor, own: bool) -> list[Tensor]:
    """Output, then gradients of input, weight and bias."""
    layer.zero_grad()
    x = x.detach().requires_grad_()
    y = layer(x) if own else F.conv2d(x, layer.weight, layer.bias, padding=layer.padding, dilation=layer.dilation, groups=x.shape[1])
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
    assert x.grad is not None
    assert layer.weight.grad is not None
    assert layer.bias is not None
    assert layer.bias.grad is not None
    return [y.detach(), x.grad, layer.weight.grad.clone(), layer.bias.grad.clone()]


@pytest.mark.parametrize(("kernel_size", "dilation"), LAYERS)
@pytest.mark.parametrize("size", MAPS)
def test_values_and_gradients_are_pytorchs(kernel_size: int, dilation: int, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    layer = DepthwiseConv2d(5, kernel_size, dilation).double()
    x = torch.randn(3, 5, *size, dtype=torch.float64).to(memory_format=torch.channels_last)
    for mine, theirs in zip(outcome(layer, x, own=True), outcome(layer, x, own=False), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", MAPS)
def test_dilation_by_phases_is_exact(size: tuple[int, int]) -> None:
    """In bf16 too: the same products are summed in the same order, up to the zeros of the padding."""
    torch.manual_seed(0)
    layer = DepthwiseConv2d(16, 7, 3).bfloat16()
    x = torch.randn(2, 16, *size, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    plain = layer.eval()(x)
    with torch.inference_mode():
        assert torch.equal(layer(x), plain)
    assert torch.equal(layer.train()(x), plain)


@pytest.mark.parametrize(("kernel_size", "dilation"), LAYERS)
def test_weight_gradients_under_autocast_are_closer_to_exact_than_pytorchs(kernel_size: int, dilation: int) -> None:
    torch.manual_seed(0)
    layer = DepthwiseConv2d(8, kernel_size, dilation)
    x = torch.randn(4, 8, 14, 14).to(memory_format=torch.channels_last)
    reference = DepthwiseConv2d(8, kernel_size, dilation).double()
    reference.load_state_dict({name: p.double() for name, p in layer.state_dict().items()})
    exact = outcome(reference, x.double(), own=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mine, theirs = (outcome(layer, x.bfloat16(), own) for own in (True, False))
    for part in (2, 3):
        error = [(found[part].double() - exact[part]).norm() / exact[part].norm() for found in (mine, theirs)]
        assert error[0] <= error[1] * 1.01
    assert mine[2].dtype == torch.float32
    assert mine[1].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dilation", [1, 3])
def test_only_training_and_dilation_in_inference_are_done_otherwise(monkeypatch: pytest.MonkeyPatch, dilation: int) -> None:
    called = []
    layer, x = DepthwiseConv2d(4, 5, dilation), torch.ones(1, 4, 9, 9)
    monkeypatch.setattr(nn.Conv2d, "forward", lambda self, x: called.append(x) or x)
    layer.train()(x)
    assert not called
    with torch.inference_mode():
        layer.eval()(x)
    assert len(called) == (dilation == 1)
    with torch.no_grad():  # as exports and traces have it
        layer(x)
    assert len(called) == 1 + (dilation == 1)
