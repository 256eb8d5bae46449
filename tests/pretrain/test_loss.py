"""The loss of mixed labels."""

import pytest
import torch
import torch.nn.functional as F
from timm.loss import SoftTargetCrossEntropy

from pretrain.loss import mixed_cross_entropy

CLASSES = 11


def one_hot(labels: torch.Tensor, smoothing: float) -> torch.Tensor:
    """Smoothed as F.cross_entropy and timm's Mixup do it: `smoothing` spread over all classes, the label's own included."""
    return F.one_hot(labels, CLASSES) * (1 - smoothing) + smoothing / CLASSES


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("mixed", [False, True])
def test_loss_and_gradients_are_those_of_dense_targets(mixed: bool, smoothing: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, CLASSES, generator=generator).requires_grad_()
    labels = torch.tensor([3, 1, 4, 4, 10, 0])
    partners = labels.view(3, 2).flip(1).reshape(-1)
    share = torch.tensor([0.9, 0.9, 0.5, 0.5, 0.2, 0.2])
    if mixed:
        dense = share[:, None] * one_hot(labels, smoothing) + (1 - share[:, None]) * one_hot(partners, smoothing)
        loss = mixed_cross_entropy(logits, torch.stack([labels, partners], 1), share, smoothing)
    else:
        dense = one_hot(labels, smoothing)
        loss = mixed_cross_entropy(logits, labels[:, None], None, smoothing)
    expected = SoftTargetCrossEntropy()(logits, dense)
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss, logits)
    (expected_gradient,) = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(gradient, expected_gradient)


def test_bf16_logits_are_summed_in_fp32() -> None:
    logits = torch.randn(4, CLASSES, generator=torch.Generator().manual_seed(0)).bfloat16()
    labels = torch.tensor([[1], [2], [3], [4]])
    loss = mixed_cross_entropy(logits, labels, None, 0.1)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, mixed_cross_entropy(logits.float(), labels, None, 0.1))
