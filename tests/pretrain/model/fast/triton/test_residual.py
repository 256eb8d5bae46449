"""The end of a residual branch in Triton, against PyTorch's operators."""

import pytest
import torch
from torch import Tensor
from triton import knobs

from pretrain.model.fast.triton.residual import scaled_residual

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("poisoned")]

DEVICE = "cpu" if knobs.runtime.interpret else "cuda"
SHAPES = [(3, 5, 1, 1), (2, 33, 13, 7), (1, 96, 3, 2), (4, 64, 9, 9)]
TYPES = [(torch.float32, torch.bfloat16), (torch.float32, torch.float32), (torch.bfloat16, torch.float16)]  # of x, and of the branch
NAMES = ("output", "x", "branch", "shortcut", "scale", "branch bias")


def inputs(shape: tuple[int, ...], x_type: torch.dtype, branch_type: torch.dtype) -> list[Tensor]:
    """Returns x, branch, shortcut, scale, branch bias, keep (its second sample dropped) and the output's gradient."""
    generator = torch.Generator().manual_seed(shape[1])
    x, branch, shortcut, grad = (torch.randn(shape, generator=generator).to(memory_format=torch.channels_last) for _ in range(4))
    keep = torch.full((shape[0],), 1 / 0.7)
    keep[1:2] = 0
    scale = torch.randn(shape[1], generator=generator)
    tensors = (x.to(x_type), branch.to(branch_type), shortcut.to(branch_type), scale, torch.zeros(shape[1]), keep, grad)
    return [t.to(DEVICE) for t in tensors]


def by_pytorch(x: Tensor, branch: Tensor, shortcut: Tensor | None, scale: Tensor, keep: Tensor | None, bias: Tensor) -> Tensor:
    """`bias` is in the branch already: it is added here as zeros, for its gradient."""
    branch = branch + bias[:, None, None]
    scaled = scale[:, None, None] * (branch if shortcut is None else branch.float() + shortcut.float())
    return x + (scaled if keep is None else scaled * keep[:, None, None, None])


def tolerance(dtype: torch.dtype) -> float:
    """The interpreter truncates bf16 where PyTorch rounds."""
    return {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 2**-7}[dtype]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize("has_keep", [False, True])
@pytest.mark.parametrize("has_shortcut", [False, True])
def test_values_and_gradients(shape: tuple[int, ...], types: tuple[torch.dtype, torch.dtype], has_keep: bool, has_shortcut: bool) -> None:
    *tensors, keep, grad = inputs(shape, *types)
    results = []
    for function in (scaled_residual, by_pytorch):
        x, branch, shortcut, scale, bias = leaves = [t.clone().requires_grad_() for t in tensors]
        y = function(x, branch, shortcut if has_shortcut else None, scale, keep if has_keep else None, bias)
        y.backward(grad)
        results.append([y.detach(), *(leaf.grad for leaf in leaves)])
    for name, ours, expected in zip(NAMES, *results, strict=True):
        if name == "shortcut" and not has_shortcut:
            assert ours is expected is None
            continue
        torch.testing.assert_close(ours, expected, rtol=tolerance(ours.dtype), atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")
        assert ours.ndim < 4 or ours.is_contiguous(memory_format=torch.channels_last)


def test_the_operator_is_registered_correctly() -> None:
    *tensors, keep, _ = inputs((2, 33, 5, 4), torch.float32, torch.bfloat16)
    x, branch, shortcut, scale, bias = (t.requires_grad_() for t in tensors)
    torch.library.opcheck(
        torch.ops.van.scaled_residual.default, (x, branch, shortcut, scale, keep, bias), test_utils=("test_schema", "test_faketensor")
    )
