"""Mixup and cutmix on the device, in pairs of neighboring samples.

    images, targets, weight = mix_pairs(batch.images, batch.labels, batch.mix)
    logits = model(images)
    loss = (weight * cross_entropy(logits, targets[:, 0], reduction="none")
            + (1 - weight) * cross_entropy(logits, targets[:, 1], reduction="none")).mean()

Two class numbers and a weight represent a mixed target. A one-hot matrix over 21,841 classes would take more memory than the images of a
small batch.
"""

import numpy as np
import torch

from data.augment.sampling import Mix


def mix_pairs(images: torch.Tensor, labels: torch.Tensor, mix: Mix) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mixes slot 2i with slot 2i + 1 and vice versa, without synchronizing with the device.

    `images` are (B, C, H, W) with B even, channels-last in memory; `labels` are int64 (B,). Returns the mixed images in the same layout;
    targets, int64 (B, 2), a sample's label and its partner's; and the weight of the sample's label, float32 (B,).
    """
    batch, channels, height, width = images.shape
    device = images.device
    parameters = torch.from_numpy(np.concatenate([mix.box, mix.lam[:, None]], axis=1, dtype=np.float32))
    if device.type == "cuda":
        parameters = parameters.pin_memory().to(device, non_blocking=True)
    y0, y1, x0, x1, lam = parameters.view(-1, 5, 1, 1).unbind(1)  # (pairs, 1, 1) each

    rows = torch.arange(height, device=device).view(1, height, 1)
    columns = torch.arange(width, device=device).view(1, 1, width)
    swapped = (rows >= y0) & (rows < y1) & (columns >= x0) & (columns < x1)  # (pairs, H, W)
    is_cut = (y1 > y0) & (x1 > x0)
    sample_weight = torch.where(is_cut, (~swapped).float(), lam)  # (pairs, H, W)

    # Pairs are split in the images' memory order, so neither the flip nor the blend changes the layout.
    samples = images.permute(0, 2, 3, 1).view(batch // 2, 2, height, width, channels)
    mixed = torch.lerp(samples.flip(1), samples, sample_weight.to(images.dtype)[:, None, :, :, None])  # exact where the weight is 0 or 1

    targets = torch.stack([labels, labels.view(-1, 2).flip(1).reshape(-1)], dim=1)
    weight = lam.reshape(-1, 1).expand(-1, 2).reshape(-1)
    return mixed.view(batch, height, width, channels).permute(0, 3, 1, 2), targets, weight
