"""The end of a block's branch in Triton against PyTorch's steps."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from triton import knobs

from pretrain.kernels import scaled_residual

DEVICE = "cpu" if knobs.runtime.interpret else "cuda"


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """Tensors made without values hold NaN, so an element that no program writes shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def drawn(shape: tuple[int, ...], x_type: torch.dtype, branch_type: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, branch, scale, keep (its second sample dropped) and the output's gradient, in fp32."""
    generator = torch.Generator().manual_seed(shape[1])
    x, branch, grad = (torch.randn(shape, generator=generator).to(memory_format=torch.channels_last) for _ in range(3))
    keep = torch.full((shape[0],), 1 / 0.7)
    keep[1:2] = 0
    scale = torch.randn(shape[1], generator=generator)
    return tuple(t.to(DEVICE) for t in (x.to(x_type), branch.to(branch_type), scale, keep, grad))  # type: ignore[return-value]


def by_steps(x: Tensor, branch: Tensor, scale: Tensor, keep: Tensor | None) -> Tensor:
    scaled = scale[:, None, None] * branch
    return x + (scaled if keep is None else scaled * keep[:, None, None, None])


@pytest.mark.parametrize("shape", [(3, 5, 1, 1), (2, 33, 13, 7), (1, 96, 3, 2), (4, 64, 9, 9)])
@pytest.mark.parametrize("types", [(torch.float32, torch.bfloat16), (torch.float32, torch.float32), (torch.bfloat16, torch.float16)])
@pytest.mark.parametrize("dropping", [False, True])
def test_values_and_gradients(shape: tuple[int, ...], types: tuple[torch.dtype, torch.dtype], dropping: bool) -> None:
    x, branch, scale, keep, grad = drawn(shape, *types)
    outcomes = []
    for function in (scaled_residual, by_steps):
        leaves = [t.clone().requires_grad_() for t in (x, branch, scale)]
        y = function(*leaves, keep if dropping else None)
        y.backward(grad)
        outcomes.append([y.detach(), *(leaf.grad for leaf in leaves)])
    for name, one, other in zip(("output", "x", "branch", "scale"), *outcomes, strict=True):
        assert one is not None
        assert other is not None
        # The interpreter cuts bf16 off where PyTorch rounds.
        rtol = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 2**-7}[one.dtype]
        torch.testing.assert_close(one, other, rtol=rtol, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
        assert one.ndim < 4 or one.is_contiguous(memory_format=torch.channels_last)


def test_scales_gradient_is_the_same_to_the_bit_every_time() -> None:
    x, branch, scale, keep, grad = drawn((4, 40, 7, 7), torch.float32, torch.bfloat16)
    found = []
    for _ in range(2):
        leaf = scale.clone().requires_grad_()
        scaled_residual(x, branch, leaf, keep).backward(grad)
        found.append(leaf.grad)
    assert torch.equal(*found)  # type: ignore[arg-type]


@pytest.mark.parametrize("dropping", [False, True])
def test_operator_keeps_pytorchs_rules(dropping: bool) -> None:
    x, branch, scale, keep, _ = drawn((2, 5, 4, 3), torch.float32, torch.bfloat16)
    arguments = (*(t.requires_grad_() for t in (x, branch, scale)), keep if dropping else None)
    torch.library.opcheck(torch.ops.van.scaled_residual.default, arguments)
