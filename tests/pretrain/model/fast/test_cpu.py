"""What trains on a CPU otherwise than by PyTorch's operators has their values."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.model.depthwise import DepthwiseConv2d
from pretrain.model.fast import cpu as on_cpu
from pretrain.model.van import Mlp

# kernel, dilation; height, width: maps of 1, smaller than the kernel's reach, prime sizes, no multiple of the dilation
LAYERS = [(1, 1), (3, 1), (5, 1), (7, 3), (3, 2), (9, 1), (11, 1)]
MAPS = [(1, 1), (2, 5), (5, 2), (7, 7), (13, 4), (4, 13), (23, 20)]


def by_pytorch(layer: DepthwiseConv2d | Mlp, x: Tensor) -> Tensor:
    """What the layer computes, by PyTorch's operators alone."""
    if isinstance(layer, Mlp):
        return layer.fc2(F.gelu(by_pytorch(layer.dwconv, layer.fc1(x))))
    return F.conv2d(x, layer.weight, layer.bias, padding=layer.padding, dilation=layer.dilation, groups=x.shape[1])


def outcome(layer: DepthwiseConv2d | Mlp, x: Tensor, own: bool) -> list[Tensor]:
    """Output, then gradients of the input and of each parameter."""
    layer.zero_grad()
    x = x.detach().requires_grad_()
    y = layer(x) if own else by_pytorch(layer, x)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
    gradients = [x.grad, *(p.grad for p in layer.parameters())]
    return [y.detach(), *(gradient.clone() for gradient in gradients if gradient is not None)]


def errors(layer: DepthwiseConv2d | Mlp, x: Tensor) -> tuple[list[float], list[float]]:
    """How far each of `outcome` under autocast is from what float64 gives, relative: ours and PyTorch's."""
    exact = outcome(layer.double(), x.double(), own=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mine, theirs = (outcome(layer.float(), x.bfloat16(), own) for own in (True, False))
    assert [t.dtype for t in mine] == [t.dtype for t in theirs]
    assert mine[0].is_contiguous(memory_format=torch.channels_last)
    assert mine[1].is_contiguous(memory_format=torch.channels_last)
    return tuple([((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True)] for found in (mine, theirs))


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(memory_format=torch.channels_last)


@pytest.mark.parametrize(("kernel_size", "dilation"), LAYERS)
@pytest.mark.parametrize("size", MAPS)
def test_convolutions_and_their_gradients_are_pytorchs(kernel_size: int, dilation: int, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    layer = DepthwiseConv2d(5, kernel_size, dilation).double()
    x = normal(3, 5, *size)
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
def test_gradients_of_convolutions_under_autocast_are_as_close_to_exact_as_pytorchs(kernel_size: int, dilation: int) -> None:
    torch.manual_seed(0)
    mine, theirs = errors(DepthwiseConv2d(8, kernel_size, dilation), normal(4, 8, 14, 14))
    for my_error, their_error in zip(mine, theirs, strict=True):
        assert my_error <= 1.01 * their_error


@pytest.mark.parametrize("at_once", [1, 2, 3, 7])
@pytest.mark.parametrize("size", MAPS)
def test_the_mlp_and_its_gradients_are_pytorchs_a_few_images_at_a_time(
    monkeypatch: pytest.MonkeyPatch, at_once: int, size: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    layer, x = Mlp(4, 12).double(), normal(3, 4, *size)
    monkeypatch.setattr(on_cpu, "_AT_ONCE", at_once * 12 * size[0] * size[1] * x.element_size())
    for mine, theirs in zip(outcome(layer, x, own=True), outcome(layer, x, own=False), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_the_mlp_takes_as_many_images_at_a_time_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    monkeypatch.setattr(on_cpu, "gelu", lambda x: taken.append(len(x)) or F.gelu(x))
    monkeypatch.setattr(on_cpu, "_AT_ONCE", 2 * 12 * 5 * 6 * 4)
    Mlp(4, 12)(torch.ones(5, 4, 5, 6))
    assert taken == [2, 2, 1]


def test_the_mlp_under_autocast_is_as_close_to_exact_as_pytorchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each part's sum is rounded once, as PyTorch's is of all, but not what they are added up in: that would be 3 to 5 times as far."""
    torch.manual_seed(0)
    monkeypatch.setattr(on_cpu, "_AT_ONCE", 1)
    mine, theirs = errors(Mlp(16, 64), normal(32, 16, 14, 14))
    for my_error, their_error in zip(mine, theirs, strict=True):
        assert my_error <= 1.3 * their_error


def test_the_mlp_with_dropout_drops() -> None:
    torch.manual_seed(0)
    layer, x = Mlp(4, 12, drop=0.5), torch.randn(2, 4, 6, 6)
    assert not torch.equal(layer(x), layer(x))


def test_gelu_is_pytorchs() -> None:
    torch.manual_seed(0)
    x = normal(2, 5, 7, 3)
    torch.testing.assert_close(on_cpu.gelu(x), F.gelu(x), rtol=1e-12, atol=1e-12)
    assert on_cpu.gelu(x).is_contiguous(memory_format=torch.channels_last)


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
