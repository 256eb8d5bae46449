"""GELU in front of a depth-wise convolution and the gate behind, in Triton, against PyTorch's operators in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from triton import knobs

from pretrain.model.fast.triton.attention import gate, gelu_conv2d
from tests.pretrain.model.fast.triton.test_depthwise import ROUNDING, SHAPES

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("poisoned")]

DEVICE = "cpu" if knobs.runtime.interpret else "cuda"
NAMES = ("output", "z", "weight", "bias", "z's bias", "attention", "its bias")


def drawn(shape: tuple[int, ...], k: int, dtype: torch.dtype) -> list[Tensor]:
    """z, weight, bias, z's bias, attention map, its bias, and two gradients of the output: of y and of what the convolution makes."""
    generator = torch.Generator().manual_seed(k * shape[1] + shape[2])
    z, attention, *grads = (torch.randn(shape, generator=generator).to(dtype).to(memory_format=torch.channels_last) for _ in range(4))
    bias = torch.randn(shape[1], generator=generator)
    vectors = (torch.randn(shape[1], 1, k, k, generator=generator) / k, bias, torch.zeros_like(bias))
    return [t.to(DEVICE) for t in (z, *vectors, attention, torch.zeros_like(bias), *grads)]


def outcome(inputs: list[Tensor], *, exact: bool) -> list[Tensor]:
    """y and the convolution, one behind the other, and the gradients of all inputs; in float64 by PyTorch's operators if `exact`."""
    tensors = [t.double() if exact else t for t in inputs]
    z, weight, bias, z_bias, attention, attention_bias = leaves = [t.clone().requires_grad_() for t in tensors[:6]]
    if exact:
        x = F.gelu(z + z_bias[:, None, None])
        near = F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=z.shape[1])
        y = x * (attention + attention_bias[:, None, None])
    else:
        x, near = gelu_conv2d(z, weight, bias, z_bias)
        y = gate(x, attention, attention_bias)
    ((y * tensors[6]).sum() + (near * tensors[7]).sum()).backward()
    return [torch.cat([y, near]).detach(), *(leaf.grad for leaf in leaves)]  # type: ignore[list-item]


def check(shape: tuple[int, ...], k: int, dtype: torch.dtype) -> None:
    inputs = drawn(shape, k, dtype)
    found, exact = (outcome(inputs, exact=exact) for exact in (False, True))
    wide = torch.float32
    assert [t.dtype for t in found] == [dtype, dtype, wide, wide, wide, dtype, wide]
    assert all(found[place].is_contiguous(memory_format=torch.channels_last) for place in (0, 1, 5))
    magnitudes = outcome([t.abs() for t in inputs], exact=True)
    # What is rounded to the activations' type: x, near and y; the gate's gradient of x; x again, as the weight's gradient reads it.
    roundings = [2, 2, 1, 0, 1, 2, 1]
    for name, one, other, magnitude, times in zip(NAMES, found, exact, magnitudes, roundings, strict=True):
        # A sum's rounding follows its parts, which are larger than it where they cancel out.
        size = magnitude.max() if name in ("output", "weight", "z", "z's bias", "its bias") else other.abs().max()
        error = (one.double() - other).abs().max()
        assert error <= times * ROUNDING[dtype] * size + 2e-6 * magnitude.max(), f"{name}: {error:.1e} of {size:.1e}"  # false for NaN too


@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape: tuple[int, ...]) -> None:
    check(shape, 5, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [3, 5])
def test_values_and_gradients_in_16_bits(dtype: torch.dtype, k: int) -> None:
    check((3, 40, 11, 6), k, dtype)


def test_gradients_are_the_same_to_the_bit_every_time() -> None:
    inputs = drawn((9, 8, 9, 8), 5, torch.bfloat16)
    once, again = (outcome(inputs, exact=False) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(once, again, strict=True))


@pytest.mark.parametrize("unused", ["x", "near"])
def test_one_of_two_results_may_be_left_unused(unused: str) -> None:
    z, weight, bias, z_bias, *_, grad = drawn((2, 6, 5, 4), 5, torch.float32)
    gradients = []
    for exact in (False, True):
        leaf = z.clone().requires_grad_()
        x = F.gelu(leaf)
        both = (x, F.conv2d(x, weight, bias, padding=2, groups=6)) if exact else gelu_conv2d(leaf, weight, bias, z_bias)
        (both[unused == "x"] * grad).sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)


def test_operators_keep_pytorchs_rules() -> None:
    """Schema, autograd registration, shapes without values; and AOTAutograd with dynamic shapes where all outputs have gradients."""
    z, weight, bias, z_bias, attention, attention_bias, *grads = drawn((2, 5, 4, 3), 5, torch.float32)
    x, _, taps = torch.ops.van.gelu_conv2d(z, weight, bias, z_bias)
    torch.library.opcheck(torch.ops.van.gelu_conv2d_backward.default, (*grads, z, x, weight, taps))
    torch.library.opcheck(torch.ops.van.gate_backward.default, (grads[0], z, attention))
    leaves = [t.requires_grad_() for t in (z, weight, bias, z_bias)]
    torch.library.opcheck(torch.ops.van.gelu_conv2d.default, tuple(leaves))
    leaves = [t.requires_grad_() for t in (x, attention, attention_bias)]
    torch.library.opcheck(torch.ops.van.gate.default, tuple(leaves))
