"""A norm's weight and bias in the convolution behind it, in Triton, against PyTorch's steps in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from triton import knobs

from pretrain.model.fast.triton import fold_norm
from pretrain.model.van import VAN

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("poisoned")]

DEVICE = "cpu" if knobs.runtime.interpret else "cuda"
SHAPES = [(1, 1, 1), (5, 33, 3), (70, 8, 40), (300, 96, 7)]  # rows, channels, pixels; several tiles, and no multiple of one
ROUNDING = {torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}  # the interpreter cuts bf16 off where a GPU rounds


def drawn(shape: tuple[int, int, int]) -> list[Tensor]:
    """Values, weight, bias, affine, and the product's gradient."""
    rows, channels, pixels = shape
    generator = torch.Generator().manual_seed(rows)
    shapes = ((pixels, channels), (rows, channels, 1, 1), (rows,), (4, channels), (pixels, rows))
    values, weight, bias, affine, grad = (torch.randn(shape, generator=generator).to(DEVICE) for shape in shapes)
    affine[0, 0] = 0  # a channel of which nothing is let through
    return [values, weight, bias, affine, grad]


def folded(inputs: list[Tensor], dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Product, and gradients of values, weight, bias and affine; and the weight that was multiplied with."""
    values, weight, bias, affine = leaves = [t.clone().requires_grad_() for t in inputs[:4]]
    multiplied, whole_bias, low_bias = fold_norm(weight, bias, affine, dtype)
    assert (multiplied.dtype, whole_bias.dtype, low_bias.dtype) == (dtype, torch.float32, dtype)
    assert not low_bias.requires_grad
    torch.testing.assert_close(low_bias.float(), whole_bias, rtol=ROUNDING[dtype], atol=0)
    z = F.linear(values.to(dtype), multiplied) + whole_bias
    z.backward(inputs[4])
    return [z.detach(), *(leaf.grad for leaf in leaves)], multiplied.detach()  # type: ignore[list-item]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_it_is_the_convolution_of_what_is_normed(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    inputs = drawn(shape)
    found, multiplied = folded(inputs, dtype)
    values, weight, bias, affine = leaves = [t.double().requires_grad_() for t in inputs[:4]]
    z = F.linear(values * affine[0] + affine[1], weight[:, :, 0, 0], bias)
    z.backward(inputs[4].double())
    expected = [z.detach(), *(leaf.grad for leaf in leaves)]
    # The last rows of affine's gradient are sums of the values' gradient, with the weight as it was rounded.
    values_grad = inputs[4].double() @ multiplied.double()
    assert expected[4] is not None
    expected[4][2:] = torch.stack([values_grad.sum(0), (values_grad * inputs[0].double()).sum(0)])
    for name, one, other in zip(("product", "values", "weight", "bias", "affine"), found, expected, strict=True):
        assert other is not None
        error = (one.double() - other).abs().max()
        assert error <= 4 * ROUNDING[dtype] * other.abs().max(), f"{name}: {error:.1e} of {other.abs().max():.1e}"  # false for NaN too


def test_gradients_are_the_same_to_the_bit_every_time() -> None:
    inputs = drawn((300, 40, 9))
    (once, _), (again, _) = (folded(inputs, torch.bfloat16) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(once, again, strict=True))


def test_operators_keep_pytorchs_rules() -> None:
    _, weight, bias, affine, _ = drawn((6, 5, 4))
    torch.library.opcheck(torch.ops.van.fold_norm_backward.default, (weight[:, :, 0, 0].bfloat16(), bias, weight, affine))
    leaves = [t.requires_grad_() for t in (weight, bias, affine)]
    # Of its outputs one has no gradient, so autograd is tested above.
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.van.fold_norm.default, (*leaves, torch.bfloat16), test_utils=tests)


def test_running_statistics_are_near_what_is_found() -> None:
    """Of the sums that are normed by them: from the first step of a training on, through the demo's warm-up and learning rate, no channel's
    mean is a deviation off, so rounding by the distance from it costs less than half a bit. (PyTorch's operators compute it.)"""
    torch.manual_seed(0)
    model = VAN(num_classes=4, embed_dims=(8, 16, 24, 32), depths=(1, 2, 3, 1)).train()
    distances: list[float] = []

    def watch(norm: nn.Module, given: tuple[Tensor]) -> None:
        deviations, means = torch.std_mean(given[0].detach(), (0, 2, 3))
        distances.append(float(((means - norm.running_mean).abs() / deviations).max()))  # type: ignore[operator]

    for stage in model.stages:
        norms = [norm for block in stage.blocks for norm in (block.norm1, block.norm2)]  # type: ignore[union-attr]
        for norm in norms[1:]:
            norm.register_forward_pre_hook(watch)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    losses = []
    for step in range(80):
        optimizer.param_groups[0]["lr"] = 4e-3 * min(1, (step + 1) / 28)
        labels = torch.randint(4, (32,))
        images = torch.randn(32, 3, 32, 32) * (0.5 + labels / 4)[:, None, None, None]
        loss = F.cross_entropy(model(images.to(memory_format=torch.channels_last)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < sum(losses[:10]) / 2  # it trains
    assert 0.05 < max(distances) < 1
