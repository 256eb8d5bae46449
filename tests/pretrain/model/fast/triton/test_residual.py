"""The end of a block's branch and the BatchNorm behind it, in Triton, against PyTorch's steps."""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from triton import knobs

from pretrain.model.fast.triton import expected_statistics, move_statistics, residual_norm, scaled_residual

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


class Reader(torch.autograd.Function):
    """What a `Normed` is to what reads it, and the gradients that this gives it."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, affine: Tensor) -> Tensor:
        ctx.save_for_backward(values, affine)
        return values * affine[0, :, None, None] + affine[1, :, None, None]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        values, affine = ctx.saved_tensors
        sums, products = (t.double().sum((0, 2, 3)).float() for t in (grad, grad * values))
        values_grad = (affine[0, :, None, None] * grad).to(values.dtype)
        return values_grad, torch.stack([products, sums, affine[0] * sums, affine[0] * products])


def two_joints(
    inputs: list[Tensor], keep: Tensor | None, norms: Sequence[nn.BatchNorm2d], grads: Sequence[Tensor], *, exact: bool
) -> dict[str, Tensor]:
    """Results, gradients and running statistics of two `residual_norm`, of which the second adds what the first has normed; if `exact`,
    by PyTorch's operators in float64. Both sums, and both normed, have gradients of their own."""
    norms = copy.deepcopy(list(norms))
    x, branch, shortcut, scale, bias = leaves = [
        t.to(torch.float64 if exact else t.dtype).clone().requires_grad_() for t in (*inputs, torch.zeros_like(inputs[3]))
    ]
    if exact:
        keep = None if keep is None else keep.double()
        y = by_steps(x, branch, None, scale, keep, bias) + by_steps(torch.zeros_like(x), shortcut, None, scale, keep)
        normed = norms[0].double()(y)
        z = by_steps(y, branch, None, scale, keep, bias) + by_steps(torch.zeros_like(x), normed, None, scale, keep)
        normed_z = norms[1].double()(z)
    else:
        with torch.autocast(DEVICE, branch.dtype, enabled=branch.dtype != torch.float32):
            expected = expected_statistics(norms)
            y, first, found = residual_norm(x, branch, shortcut, scale, keep, norms[0], expected[0], bias)
            z, second, found_too = residual_norm(y, branch, first, scale, keep, norms[1], expected[1], bias)
        assert first.values.is_contiguous(memory_format=torch.channels_last)
        normed, normed_z = (Reader.apply(each.values, each.affine) for each in (first, second))
        move_statistics(norms, [found, found_too])
    results = [y, normed, z, normed_z]
    sum((result * grad).sum() for result, grad in zip(results, grads, strict=True)).backward()  # type: ignore[union-attr]
    names = ("y", "normed", "z", "normed z", "x", "branch", "shortcut", "scale", "branch's bias")
    tensors = [*(t.detach() for t in results), *(leaf.grad for leaf in leaves)]
    found = dict(zip(names, tensors, strict=True))  # type: ignore[arg-type]
    for number, norm in enumerate(norms):
        vectors = {"weight": norm.weight.grad, "bias": norm.bias.grad} | dict(norm.named_buffers())
        found |= {f"{name} of norm {number}": vector for name, vector in vectors.items()}
    return found  # type: ignore[return-value]


def set_off(norms: Sequence[nn.BatchNorm2d], inputs: list[Tensor], keep: Tensor | None, grads: Sequence[Tensor], by: float) -> None:
    """Sets running statistics to what those of the two joints' sums are, and so many deviations beside it."""
    for norm in norms:
        norm.momentum = 1.0
    found = two_joints(inputs, keep, norms, grads, exact=True)
    for number, norm in enumerate(norms):
        mean, variance = (found[f"running_{name} of norm {number}"].float() for name in ("mean", "var"))
        norm.running_mean, norm.running_var, norm.momentum = mean + by * variance.sqrt(), 1.5 * variance, 0.1


@pytest.mark.parametrize("shape", [*SHAPES[1:], (70, 8, 3, 7)])  # the last has several runs of pixels
@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize(("dropping", "offset"), [(False, 100.0), (True, 0.0)])
def test_norm_behind_it(shape: tuple[int, ...], types: tuple[torch.dtype, torch.dtype], dropping: bool, offset: float) -> None:
    """Far from zero too, where a variance by squares of the values themselves would have no digit right in fp32 (the next test)."""
    *inputs, keep, grad = drawn(shape, *types)
    inputs[0] = (inputs[0].float() + offset).to(types[0])
    norms = [nn.BatchNorm2d(shape[1], device=DEVICE) for _ in range(2)]
    with torch.no_grad():
        for norm, weights in zip(norms, ((-1, 2), (1, 0)), strict=True):
            norm.weight.copy_(torch.linspace(*weights, shape[1]))
            norm.bias.copy_(torch.linspace(3, -1, shape[1]))
    grads = [grad.roll(times, 0).contiguous(memory_format=torch.channels_last) * (-1) ** times for times in range(4)]
    keep_ = keep if dropping else None
    # Rounding of what is stored counts by its distance from what was expected; in fp32 that is far from mattering.
    set_off(norms, inputs, keep_, grads, by=10 if types[1] == torch.float32 else 0.5)
    found, expected = (two_joints(inputs, keep_, norms, grads, exact=exact) for exact in (False, True))
    stored = 0.0 if types[1] == torch.float32 else rounding(types[1])  # what is normed is, in the branch's type
    for name, value in expected.items():
        # The variance is that of differences: digits that x lost when it was stored can't be had back.
        scale = max(1.0, offset * 0.1) * float(value.abs().max())
        bound = 1e-5 * scale + (0 if name == "y" else stored * float(value.abs().max()))
        torch.testing.assert_close(
            found[name].double(), value.double(), rtol=rounding(found[name].dtype), atol=bound, msg=lambda t, n=name: f"{n}: {t}"
        )
    assert int(found["num_batches_tracked of norm 1"]) == 1


def test_far_from_zero_plain_squares_would_fail() -> None:
    """The control: what the kernel's pivot is for."""
    values = torch.randn(4096, generator=torch.Generator().manual_seed(0)) * 0.01 + 100
    variance = (values * values).mean() - values.mean() ** 2
    assert abs(float(variance) / float(values.double().var(correction=0)) - 1) > 0.5


def test_the_norm_takes_autocasts_type() -> None:
    """And the sum stays fp32."""
    x, branch, shortcut, scale, keep, _ = drawn((2, 8, 4, 4), torch.float32, torch.bfloat16)
    with torch.autocast(DEVICE, torch.bfloat16):
        norm = nn.BatchNorm2d(8, device=DEVICE)
        y, normed, _ = residual_norm(x, branch, shortcut, scale, keep, norm, expected_statistics([norm])[0])
    assert (y.dtype, normed.values.dtype) == (torch.float32, torch.bfloat16)


def test_one_value_a_channel_has_no_variance() -> None:
    x, branch, shortcut, scale, _, _ = drawn((1, 8, 1, 1), torch.float32, torch.float32)
    with pytest.raises(ValueError, match=r"more than one value a channel in training, got \(1, 8, 1, 1\)"):
        residual_norm(x, branch, shortcut, scale, None, nn.BatchNorm2d(8, device=DEVICE), torch.ones(2, 8, device=DEVICE))


def test_gradients_are_the_same_to_the_bit_every_time() -> None:
    *inputs, keep, grad = drawn((9, 40, 7, 7), torch.float32, torch.bfloat16)
    norms = [nn.BatchNorm2d(40, device=DEVICE) for _ in range(2)]
    once, again = (two_joints(inputs, keep, norms, [grad] * 4, exact=False) for _ in range(2))
    assert all(torch.equal(once[name], again[name]) for name in once)


@pytest.mark.parametrize("dropping", [False, True])
def test_operators_keep_pytorchs_rules(dropping: bool) -> None:
    x, branch, shortcut, scale, keep, _ = drawn((2, 5, 4, 3), torch.float32, torch.bfloat16)
    keep_ = keep if dropping else None
    leaves = [t.requires_grad_() for t in (x, branch, shortcut, scale)]
    weight, bias, branch_bias = (torch.rand(5, device=DEVICE, requires_grad=True) for _ in range(3))
    torch.library.opcheck(torch.ops.van.scaled_residual.default, (*leaves, keep_, branch_bias))
    affine = torch.rand(4, 5, device=DEVICE, requires_grad=True)
    passed = shortcut.detach()[:1, :1, :1, :1].expand_as(shortcut).requires_grad_()
    x_, branch_, shortcut_, scale_ = (t.detach() for t in leaves)
    norm_grad, moments, norm_affine, expected = (torch.rand(rows, 5, device=DEVICE) for rows in (4, 3, 4, 2))
    # Of its outputs three have no gradient, so autograd is tested above.
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    for own in ((shortcut, None, None), (shortcut_, passed, affine)):
        given = (x, branch, *own, scale, keep_, weight, bias, expected, 1e-5, torch.bfloat16, branch_bias)
        torch.library.opcheck(torch.ops.van.residual_norm.default, given, test_utils=tests)
        affine_ = None if own[2] is None else affine.detach()
        behind = (branch_, norm_grad, None if own[2] is None else branch_, branch_, moments, norm_affine)
        torch.library.opcheck(torch.ops.van.residual_norm_backward.default, (x_, *behind, branch_, shortcut_, affine_, scale_, keep_))
