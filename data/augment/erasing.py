"""Random erasing on the device: boxes of normalised images become noise, each pixel and channel its own.

    noise = NoiseBank(image_size=224, device=device)
    noise.erase(images, drawn.erased)        # in place

DALI can only fill a box with a constant, and noise that is a function of the sample must not come from a generator with a state. So
the numbers are drawn once, and a box takes a stretch of them that begins where (seed, epoch, sample id) says: in the step it is a
copy, with nothing to compute.
"""

import numpy as np
import torch

from data.augment.recipe import Erased
from data.augment.sampling import NOISE_STARTS
from data.common.counter_rng import Draw, standard_normal


class NoiseBank:
    """Standard normal numbers on a device, the same in every process."""

    def __init__(self, image_size: int, device: torch.device) -> None:
        count = NOISE_STARTS + 3 * image_size**2
        self._numbers = torch.from_numpy(standard_normal(Draw.ERASED_NOISE, np.arange(count)).astype(np.float32)).to(device)

    def erase(self, images: torch.Tensor, erased: Erased) -> None:
        """Fills the boxes of images (B, 3, H, W) with noise, in place."""
        for sample, box in np.argwhere(erased.boxes[..., 2] > 0):
            y, x, height, width = erased.boxes[sample, box].tolist()
            start = erased.starts[sample, box]
            noise = self._numbers[start : start + 3 * height * width].view(height, width, 3)
            images[sample, :, y : y + height, x : x + width] = noise.permute(2, 0, 1)
