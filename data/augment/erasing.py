"""Random erasing on the device: fills boxes of normalized images with noise that differs in each pixel and channel.

    noise = NoiseBank(image_size=224, device=device)
    noise.erase(images, drawn.erased)        # in place

DALI can fill a box only with a constant, and the noise must be a function of (seed, epoch, sample id). So a bank of numbers is drawn
once, and each box copies a slice of the bank that starts at an offset drawn for the sample.
"""

import numpy as np
import torch

from data.augment.recipe import ErasedBoxes
from data.augment.sampling import NOISE_STARTS
from data.common.counter_rng import Draw, standard_normal


class NoiseBank:
    """Standard normal numbers on a device, the same in every process. `image_size` is the side of an image in pixels."""

    def __init__(self, image_size: int, device: torch.device) -> None:
        count = NOISE_STARTS + 3 * image_size**2
        self._numbers = torch.from_numpy(standard_normal(Draw.ERASED_NOISE, np.arange(count)).astype(np.float32)).to(device)

    def erase(self, images: torch.Tensor, erased: ErasedBoxes) -> None:
        """Fills the boxes of images (B, 3, H, W) with noise, in place."""
        for sample, box in np.argwhere(erased.boxes[..., 2] > 0):
            y, x, height, width = erased.boxes[sample, box].tolist()
            start = erased.starts[sample, box]
            noise = self._numbers[start : start + 3 * height * width].view(height, width, 3)
            images[sample, :, y : y + height, x : x + width] = noise.permute(2, 0, 1)
