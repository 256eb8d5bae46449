"""The end of a block's branch and the BatchNorm behind it, in Triton, against PyTorch's steps."""

import copy

import pytest
import torch
from torch import Tensor, nn
from triton import knobs

from pretrain.kernels import move_statistics, residual_norm, scaled_residual

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("poisoned")]

DEVICE = "cpu" if knobs.runtime.interpret else "cuda"


Drawn = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
SHAPES = [(3, 5, 1, 1), (2, 33, 13, 7), (1, 96, 3, 2), (4, 64, 9, 9)]
TYPES = [(torch.float32, torch.bfloat16), (torch.float32, torch.float32), (torch.bfloat16, torch.float16)]  # of x, and of the branch


def drawn(shape: tuple[int, ...], x_type: torch.dtype, branch_type: torch.dtype) -> Drawn:
    """x, branch, shortcut, scale, keep (its second sample dropped) and the output's gradient, in fp32."""
    generator = torch.Generator().manual_seed(shape[1])
    x, branch, shortcut, grad = (torch.randn(shape, generator=generator).to(memory_format=torch.channels_last) for _ in range(4))
    keep = torch.full((shape[0],), 1 / 0.7)
    keep[1:2] = 0
    scale = torch.randn(shape[1], generator=generator)
    tensors = (x.to(x_type), branch.to(branch_type), shortcut.to(branch_type), scale, keep, grad)
    return tuple(t.to(DEVICE) for t in tensors)  # type: ignore[return-value]


def by_steps(x: Tensor, branch: Tensor, shortcut: Tensor | None, scale: Tensor, keep: Tensor | None, bias: Tensor | None = None) -> Tensor:
    """`bias` is in the branch already, so it stands here with zeros."""
    branch = branch if bias is None else branch + bias[:, None, None]
    scaled = scale[:, None, None] * (branch if shortcut is None else branch.float() + shortcut.float())
    return x + (scaled if keep is None else scaled * keep[:, None, None, None])


def rounding(dtype: torch.dtype) -> float:
    """The interpreter cuts bf16 off where PyTorch rounds."""
    return {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 2**-7, torch.int64: 0.0}[dtype]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize("dropping", [False, True])
@pytest.mark.parametrize("with_shortcut", [False, True])
def test_values_and_gradients(shape: tuple[int, ...], types: tuple[torch.dtype, torch.dtype], dropping: bool, with_shortcut: bool) -> None:
    *inputs, keep, grad = drawn(shape, *types)
    outcomes = []
    for function in (scaled_residual, by_steps):
        x, branch, shortcut, scale, bias = leaves = [t.clone().requires_grad_() for t in (*inputs, torch.zeros_like(inputs[3]))]
        y = function(x, branch, shortcut if with_shortcut else None, scale, keep if dropping else None, bias)
        y.backward(grad)
        outcomes.append([y.detach(), *(leaf.grad for leaf in leaves)])
    for name, one, other in zip(("output", "x", "branch", "shortcut", "scale", "bias"), *outcomes, strict=True):
        if name == "shortcut" and not with_shortcut:
            assert one is other is None
            continue
        torch.testing.assert_close(one, other, rtol=rounding(one.dtype), atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")
        assert one.ndim < 4 or one.is_contiguous(memory_format=torch.channels_last)


def normed_outcome(
    inputs: list[Tensor], keep: Tensor | None, norm: nn.BatchNorm2d, grads: tuple[Tensor, Tensor], *, exact: bool
) -> dict[str, Tensor]:
    """Of `residual_norm`, or `exact`, by PyTorch's operators in float64: results, gradients, and the norm's running statistics."""
    norm = copy.deepcopy(norm)
    if exact:
        norm, inputs = norm.double(), [t.double() for t in inputs]
        keep = None if keep is None else keep.double()
    x, branch, shortcut, scale, bias = leaves = [t.clone().requires_grad_() for t in (*inputs, torch.zeros_like(inputs[3]))]
    if exact:
        y = by_steps(x, branch, None, scale, keep, bias) + by_steps(torch.zeros_like(x), shortcut, None, scale, keep)
        normed = norm(y)
    else:
        y, normed, statistics = residual_norm(x, branch, shortcut, scale, keep, norm, bias)
        move_statistics([norm], [statistics])
    ((y * grads[0]).sum() + (normed * grads[1]).sum()).backward()
    names = ("x", "branch", "shortcut", "scale", "branch's bias")
    found = {"y": y.detach(), "normed": normed.detach()} | {name: leaf.grad for name, leaf in zip(names, leaves, strict=True)}
    found |= {"weight": norm.weight.grad, "bias": norm.bias.grad} | dict(norm.named_buffers())
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("shape", [*SHAPES[1:], (70, 8, 3, 7)])  # the last has several runs of pixels
@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize("dropping", [False, True])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_norm_behind_it(shape: tuple[int, ...], types: tuple[torch.dtype, torch.dtype], dropping: bool, offset: float) -> None:
    """Far from zero too, where a variance by squares of the values themselves would have no digit right in fp32 (the next test)."""
    *inputs, keep, grad = drawn(shape, *types)
    inputs[0] = (inputs[0].float() + offset).to(types[0])
    norm = nn.BatchNorm2d(shape[1], device=DEVICE)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(-1, 2, shape[1]))
        norm.bias.copy_(torch.linspace(3, -1, shape[1]))
    grads = grad, grad.flip(0).contiguous(memory_format=torch.channels_last)
    found, expected = (normed_outcome(inputs, keep if dropping else None, norm, grads, exact=exact) for exact in (False, True))
    for name, value in expected.items():
        # The variance is that of differences: digits that x lost when it was stored can't be had back.
        scale = max(1.0, offset * 0.1) * float(value.abs().max())
        torch.testing.assert_close(
            found[name].double(), value.double(), rtol=rounding(found[name].dtype), atol=1e-5 * scale, msg=lambda t, n=name: f"{n}: {t}"
        )
    assert int(found["num_batches_tracked"]) == 1
    assert found["normed"].is_contiguous(memory_format=torch.channels_last)


def test_far_from_zero_plain_squares_would_fail() -> None:
    """The control: what the kernel's pivot is for."""
    values = torch.randn(4096, generator=torch.Generator().manual_seed(0)) * 0.01 + 100
    variance = (values * values).mean() - values.mean() ** 2
    assert abs(float(variance) / float(values.double().var(correction=0)) - 1) > 0.5


def test_the_norm_takes_autocasts_type() -> None:
    """And the sum stays fp32."""
    x, branch, shortcut, scale, keep, _ = drawn((2, 8, 4, 4), torch.float32, torch.bfloat16)
    with torch.autocast(DEVICE, torch.bfloat16):
        y, normed, _ = residual_norm(x, branch, shortcut, scale, keep, nn.BatchNorm2d(8, device=DEVICE))
    assert (y.dtype, normed.dtype) == (torch.float32, torch.bfloat16)


def test_one_value_a_channel_has_no_variance() -> None:
    x, branch, shortcut, scale, _, _ = drawn((1, 8, 1, 1), torch.float32, torch.float32)
    with pytest.raises(ValueError, match=r"more than one value a channel in training, got \(1, 8, 1, 1\)"):
        residual_norm(x, branch, shortcut, scale, None, nn.BatchNorm2d(8, device=DEVICE))


def test_gradients_are_the_same_to_the_bit_every_time() -> None:
    *inputs, keep, grad = drawn((9, 40, 7, 7), torch.float32, torch.bfloat16)
    norm = nn.BatchNorm2d(40, device=DEVICE)
    once, again = (normed_outcome(inputs, keep, norm, (grad, grad), exact=False) for _ in range(2))
    assert all(torch.equal(once[name], again[name]) for name in once)


@pytest.mark.parametrize("dropping", [False, True])
def test_operators_keep_pytorchs_rules(dropping: bool) -> None:
    x, branch, shortcut, scale, keep, grad = drawn((2, 5, 4, 3), torch.float32, torch.bfloat16)
    arguments = (*(t.requires_grad_() for t in (x, branch, shortcut, scale)), keep if dropping else None)
    weight, bias, branch_bias = (torch.rand(5, device=DEVICE, requires_grad=True) for _ in range(3))
    torch.library.opcheck(torch.ops.van.scaled_residual.default, (*arguments, branch_bias))
    # Of its outputs three have no gradient, so autograd is tested above.
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    given = (*arguments, weight, bias, 1e-5, torch.bfloat16, branch_bias)
    torch.library.opcheck(torch.ops.van.residual_norm.default, given, test_utils=tests)
    values = [t.detach() for t in (branch, shortcut, scale)]
    vectors = [torch.rand(5, device=DEVICE) for _ in range(2)]
    torch.library.opcheck(
        torch.ops.van.residual_norm_backward.default,
        (grad, grad.bfloat16(), x.detach(), *vectors, *values, keep if dropping else None, weight.detach(), bias.detach()),
    )
