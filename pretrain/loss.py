"""Computes the loss of training."""

import torch.nn.functional as F
from torch import Tensor


def mixed_cross_entropy(logits: Tensor, targets: Tensor, share: Tensor | None, smoothing: float) -> Tensor:
    """Returns the mean cross-entropy with label smoothing against one label per sample, or a mix of two.

    Cross-entropy is linear in the target, so the loss of a mixed target is the mix of two losses: no dense (batch, classes) target.

    Args:
        logits: (batch, classes).
        targets: int64 (batch, 1), or (batch, 2): each sample's label and that of its partner.
        share: (batch,), weight of each sample's own label in its target; None for one label per sample.
        smoothing: 0 to 1, spread over all classes.
    """
    logits = logits.float()
    if share is None:
        return F.cross_entropy(logits, targets[:, 0], label_smoothing=smoothing)
    first, second = (F.cross_entropy(logits, targets[:, i], label_smoothing=smoothing, reduction="none") for i in (0, 1))
    return (share * first + (1 - share) * second).mean()
