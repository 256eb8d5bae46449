"""Depth-wise convolution in Triton against PyTorch in float64: values, gradients, and every element written.

The kernels run in Triton's interpreter, which cuts bf16 off where a GPU rounds: so the bound for bf16 is a whole unit in the last place.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from triton import knobs

from pretrain.model.fast.triton.depthwise import by_taps, depthwise_conv2d, weight_gradient

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("poisoned")]

DEVICE = "cpu" if knobs.runtime.interpret else "cuda"
ROUNDING = {torch.float32: 2**-23, torch.float16: 2**-10, torch.bfloat16: 2**-7}  # of a value stored in this type; sums are fp32
LAYERS = [(3, 1), (5, 1), (7, 3)]  # VAN's kernel sizes and dilations
# N, C, H, W: a map of one pixel; prime sizes, C no multiple of a tile; one row; several strips to a phase; VAN-B3's last stage
SHAPES = [(3, 5, 1, 1), (1, 33, 13, 7), (1, 1, 1, 23), (1, 8, 37, 5), (2, 64, 7, 7)]


def test_fresh_memory_is_poisoned() -> None:
    """The control of the fixture."""
    assert torch.empty(3).isnan().all()
    assert torch.empty_like(torch.ones(1, 2, 3, 3), memory_format=torch.channels_last).isnan().all()


def drawn(shape: tuple[int, ...], k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Input, weight and bias, and the output's gradient; weight and bias are fp32, as the model's are."""
    generator = torch.Generator().manual_seed(k * shape[1] + shape[2])
    x, grad = (torch.randn(shape, generator=generator).to(dtype).to(memory_format=torch.channels_last) for _ in range(2))
    weight = torch.randn(shape[1], 1, k, k, generator=generator) / k
    return tuple(t.to(DEVICE) for t in (x, weight, torch.randn(shape[1], generator=generator), grad))  # type: ignore[return-value]


def outcome(inputs: tuple[Tensor, ...], dilation: int, gelu: bool, exact: bool) -> list[Tensor]:
    """Output, then gradients of input, weight, bias, and of a bias that is in the input; in float64 by PyTorch's operators if `exact`."""
    *arguments, grad = (t.double() if exact else t for t in inputs)
    x, weight, bias = (t.clone().requires_grad_() for t in arguments)
    x_bias = torch.zeros_like(bias, requires_grad=True)
    if exact:
        given = x + x_bias[:, None, None]
        y = F.conv2d(given, weight, bias, padding=dilation * (weight.shape[-1] // 2), dilation=dilation, groups=x.shape[1])
        y = F.gelu(y) if gelu else y
    else:
        y = depthwise_conv2d(x, weight, bias, dilation, gelu, x_bias)
    y.backward(grad)
    return [y.detach(), *(t.grad for t in (x, weight, bias, x_bias))]  # type: ignore[list-item]


def check(shape: tuple[int, ...], k: int, dilation: int, dtype: torch.dtype, gelu: bool) -> None:
    inputs = drawn(shape, k, dtype)
    found, exact = (outcome(inputs, dilation, gelu, exact) for exact in (False, True))
    assert [t.dtype for t in found] == [dtype, dtype, *[torch.float32] * 3]
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in found[:2])
    # Sums may cancel out: their rounding is measured by the same sums of absolute values.
    magnitudes = outcome(tuple(t.abs() for t in inputs), dilation, gelu=False, exact=True)
    # How often a value is rounded to the activations' type. The gradient behind GELU is, before it is summed over.
    roundings = [1, 2, 1, 1, 1] if gelu else [1, 1, 0, 0, 0]
    names = ("output", "input gradient", "weight gradient", "bias gradient", "gradient of the input's bias")
    for name, one, other, magnitude, times in zip(names, found, exact, magnitudes, roundings, strict=True):
        error = (one.double() - other).abs().max()
        bound = times * ROUNDING[dtype] * other.abs().max() + 1e-6 * magnitude.max()
        assert error <= bound, f"{name}: {error:.1e} of {other.abs().max():.1e}"  # false for NaN too


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("k", "dilation"), LAYERS)
def test_values_and_gradients(shape: tuple[int, ...], k: int, dilation: int) -> None:
    check(shape, k, dilation, torch.float32, gelu=k == 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("k", "dilation", "gelu"), [(3, 1, True), (3, 1, False), (5, 1, False), (7, 3, False)])
def test_values_and_gradients_in_16_bits(dtype: torch.dtype, k: int, dilation: int, gelu: bool) -> None:
    check((3, 40, 11, 6), k, dilation, dtype, gelu)


@pytest.mark.full
@pytest.mark.parametrize(("dtype", "channels"), [(torch.float32, 1), (torch.bfloat16, 24), (torch.float16, 130)])
@pytest.mark.parametrize("size", [(1, 1), (2, 5), (5, 2), (7, 7), (14, 14), (23, 9), (29, 10), (56, 4)])
@pytest.mark.parametrize(("k", "dilation", "gelu"), [(3, 1, True), *((k, d, False) for k in (3, 5, 7) for d in (1, 3))])
def test_values_and_gradients_everywhere(
    dtype: torch.dtype, channels: int, size: tuple[int, int], k: int, dilation: int, gelu: bool
) -> None:
    for batch in (1, 3):
        check((batch, channels, *size), k, dilation, dtype, gelu)


def test_without_a_bias() -> None:
    x, weight, _, grad = drawn((1, 6, 5, 4), 3, torch.float32)
    leaves = [t.clone().requires_grad_() for t in (x, weight)]
    depthwise_conv2d(*leaves, None).backward(grad)
    exact = outcome((x, weight, torch.zeros(6, device=DEVICE), grad), 1, gelu=False, exact=True)
    for leaf, expected in zip(leaves, exact[1:3], strict=True):
        torch.testing.assert_close(leaf.grad, expected.float())


def test_any_memory_layout_gives_the_same() -> None:
    inputs = drawn((2, 6, 5, 4), 5, torch.float32)
    contiguous = tuple(t.contiguous() for t in inputs)
    for one, other in zip(outcome(inputs, 1, False, False), outcome(contiguous, 1, False, False), strict=True):
        assert torch.equal(one, other)


def test_weight_gradient_is_the_same_to_the_bit_every_time() -> None:
    x, weight, _, grad = drawn((3, 8, 9, 8), 5, torch.bfloat16)
    runs = [weight_gradient(x, grad, weight, 1) for _ in range(3)]
    for later in runs[1:]:
        assert all(torch.equal(*pair) for pair in zip(runs[0], later, strict=True))


def test_double_is_refused() -> None:
    with pytest.raises(TypeError, match=r"bf16, fp16 or fp32, not torch\.float64; set model\.kernels=torch"):
        depthwise_conv2d(torch.ones(1, 1, 2, 2, dtype=torch.float64), torch.ones(1, 1, 3, 3, dtype=torch.float64), None)


# As operators of PyTorch


@pytest.mark.parametrize("gelu", [False, True])
def test_operator_keeps_pytorchs_rules(gelu: bool) -> None:
    """Schema, autograd registration, shapes without values, and AOTAutograd with dynamic shapes."""
    x, weight, bias, grad = drawn((2, 5, 4, 3), 3, torch.float32)
    for with_sum in (False, True):
        arguments = (grad, x, weight, bias, by_taps(weight), 1, gelu, with_sum)
        torch.library.opcheck(torch.ops.van.depthwise_conv2d_backward.default, arguments)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    torch.library.opcheck(torch.ops.van.depthwise_conv2d.default, (*leaves, 1, gelu, bias.detach().requires_grad_()))


def test_autocast_takes_activations_in_bf16_and_weights_as_they_are() -> None:
    x, weight, bias, grad = drawn((2, 8, 9, 9), 5, torch.float32)
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    with torch.autocast(DEVICE, torch.bfloat16):
        y = depthwise_conv2d(*leaves)
    assert y.dtype == torch.bfloat16
    y.backward(grad.bfloat16())
    assert [leaf.grad.dtype for leaf in leaves if leaf.grad is not None] == [torch.float32] * 3
    exact = outcome((x.bfloat16(), weight, bias, grad.bfloat16()), 1, gelu=False, exact=True)
    assert leaves[1].grad is not None
    torch.testing.assert_close(leaves[1].grad, exact[2].float(), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(DEVICE == "cpu", reason="more than 2**31 values take a GPU")
def test_batches_of_more_than_2_to_the_31_values() -> None:
    x = (
        torch.randn(1, 512, 56, 56, dtype=torch.bfloat16, device=DEVICE)
        .expand(1400, -1, -1, -1)
        .contiguous(memory_format=torch.channels_last)
    )
    weight = torch.randn(512, 1, 3, 3, device=DEVICE)
    y = depthwise_conv2d(x, weight, None)
    assert torch.equal(y[:1].expand_as(y), y)
