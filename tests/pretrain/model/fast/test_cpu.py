"""The CPU path computes what PyTorch's operators compute, and can be taken out again."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.model import van
from pretrain.model.fast import cpu
from tests.pretrain.model.test_van import images, small_model

# kernel size, dilation; height, width: maps of 1, smaller than the kernel's reach, prime sizes, no multiple of the dilation
LAYERS = [(1, 1), (3, 1), (5, 1), (7, 3), (3, 2), (9, 1), (11, 1)]
MAPS = [(1, 1), (2, 5), (5, 2), (7, 7), (13, 4), (4, 13), (23, 20)]


def depthwise(dim: int, kernel_size: int, dilation: int) -> nn.Conv2d:
    return nn.Conv2d(dim, dim, kernel_size, padding=dilation * (kernel_size // 2), dilation=dilation, groups=dim)


def swapped(layer: nn.Module) -> nn.Module:
    """Returns a copy of a layer that computes in the CPU path."""
    layer = copy.deepcopy(layer)
    layer.__class__ = cpu.Mlp if isinstance(layer, van.Mlp) else cpu.DepthwiseConv2d
    return layer


def outputs_and_gradients(layer: nn.Module, x: Tensor) -> list[Tensor]:
    """Returns the output, then the gradients of the input and of each parameter."""
    layer.zero_grad()
    x = x.detach().requires_grad_()
    y = layer(x)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
    return [y.detach(), x.grad, *(p.grad.clone() for p in layer.parameters())]


def errors(layer: nn.Module, x: Tensor) -> tuple[list[float], list[float]]:
    """Returns the relative distances of `outputs_and_gradients` under autocast from float64: the CPU path's and PyTorch's."""
    exact = outputs_and_gradients(layer.double(), x.double())
    layer = layer.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, pytorchs = (outputs_and_gradients(one, x.bfloat16()) for one in (swapped(layer), layer))
    assert [t.dtype for t in ours] == [t.dtype for t in pytorchs]
    assert ours[0].is_contiguous(memory_format=torch.channels_last)
    assert ours[1].is_contiguous(memory_format=torch.channels_last)
    relative = [[((a.double() - b).norm() / b.norm()).item() for a, b in zip(one, exact, strict=True)] for one in (ours, pytorchs)]
    return relative[0], relative[1]


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(memory_format=torch.channels_last)


def check_same(layer: nn.Module, x: Tensor) -> None:
    for ours, pytorchs in zip(outputs_and_gradients(swapped(layer), x), outputs_and_gradients(layer, x), strict=True):
        torch.testing.assert_close(ours, pytorchs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("kernel_size", "dilation"), LAYERS)
@pytest.mark.parametrize("size", MAPS)
def test_convolutions_and_their_gradients(kernel_size: int, dilation: int, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    check_same(depthwise(5, kernel_size, dilation).double(), normal(3, 5, *size))


@pytest.mark.parametrize("size", MAPS)
def test_dilation_by_phases_is_exact(size: tuple[int, int]) -> None:
    """Also in bf16: the same products are summed in the same order, up to the zeros of the padding."""
    torch.manual_seed(0)
    layer = depthwise(16, 7, 3).bfloat16()
    x = torch.randn(2, 16, *size, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    expected = layer(x)
    layer = swapped(layer)
    assert torch.equal(layer.train()(x), expected)
    with torch.inference_mode():
        assert torch.equal(layer.eval()(x), expected)


@pytest.mark.parametrize(("kernel_size", "dilation"), LAYERS)
def test_convolutions_under_autocast_are_as_exact_as_pytorchs(kernel_size: int, dilation: int) -> None:
    torch.manual_seed(0)
    ours, pytorchs = errors(depthwise(8, kernel_size, dilation), normal(4, 8, 14, 14))
    for our_error, pytorchs_error in zip(ours, pytorchs, strict=True):
        assert our_error <= 1.01 * pytorchs_error


@pytest.mark.parametrize("images_at_a_time", [1, 2, 3, 7])
@pytest.mark.parametrize("size", MAPS)
def test_the_mlp_and_its_gradients(monkeypatch: pytest.MonkeyPatch, images_at_a_time: int, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    layer, x = van.Mlp(4, 12).double(), normal(3, 4, *size)
    monkeypatch.setattr(cpu, "_BYTES_AT_A_TIME", images_at_a_time * 12 * size[0] * size[1] * x.element_size())
    check_same(layer, x)


def test_the_mlp_takes_as_many_images_at_a_time_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = []
    monkeypatch.setattr(cpu, "gelu", lambda x: batches.append(len(x)) or F.gelu(x))
    monkeypatch.setattr(cpu, "_BYTES_AT_A_TIME", 2 * 12 * 5 * 6 * 4)
    swapped(van.Mlp(4, 12))(torch.ones(5, 4, 5, 6))
    assert batches == [2, 2, 1]


def test_the_mlp_under_autocast_is_as_exact_as_pytorchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sums of the parts are rounded, but not their total: adding in bf16 would be 3 to 5 times as far from exact."""
    torch.manual_seed(0)
    monkeypatch.setattr(cpu, "_BYTES_AT_A_TIME", 1)
    ours, pytorchs = errors(van.Mlp(16, 64), normal(32, 16, 14, 14))
    for our_error, pytorchs_error in zip(ours, pytorchs, strict=True):
        assert our_error <= 1.3 * pytorchs_error


# ---------------------------------------------------------------- whole models


def step(model: nn.Module, dtype: torch.dtype) -> list[Tensor]:
    """Returns the logits, all gradients and all buffers of one step."""
    torch.manual_seed(3)
    model.train()
    logits = model(images(3).to(dtype))
    F.cross_entropy(logits, torch.arange(3)).backward()
    return [logits, *(p.grad for p in model.parameters()), *model.buffers()]


@pytest.mark.slow
@pytest.mark.parametrize("drop", [0.0, 0.3])
def test_a_step_of_a_model(drop: float) -> None:
    """Values, gradients, BatchNorm statistics, and the draws of dropout and stochastic depth."""
    reference = small_model(drop_path_rate=0.3, proj_drop_rate=drop).double()
    model = copy.deepcopy(reference)
    cpu.use_cpu_path(model)
    assert list(model.state_dict()) == list(reference.state_dict())
    for ours, expected in zip(step(model, torch.float64), step(reference, torch.float64), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.slow
def test_it_can_be_taken_out_again() -> None:
    reference = small_model(drop_path_rate=0.3)
    model = copy.deepcopy(reference)
    cpu.use_cpu_path(model)
    types = [type(module) for module in model.modules()]
    assert {cpu.DepthwiseConv2d, cpu.GELU, cpu.Mlp} <= set(types)
    cpu.restore_reference(model)
    assert [type(module) for module in model.modules()] == [type(module) for module in reference.modules()]
    assert all(torch.equal(a, b) for a, b in zip(step(model, torch.float32), step(reference, torch.float32), strict=True))


@pytest.mark.slow
def test_evaluation_and_traces_run_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Except dilated convolutions in inference mode, which are exact."""
    model = small_model().eval()
    expected = model(images())
    cpu.use_cpu_path(model)
    calls = []
    monkeypatch.setattr(cpu, "depthwise_conv2d", lambda x, *_: calls.append(x) or x)
    monkeypatch.setattr(cpu, "mlp", lambda x, *_: calls.append(x) or x)
    assert torch.equal(model(images()), expected)
    assert not calls
    with torch.inference_mode():
        model(images())
    assert len(calls) == 13  # a dilated convolution a block
