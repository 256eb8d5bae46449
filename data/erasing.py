"""Random erasing on the device: boxes of normalised images become noise, each pixel and channel its own.

    noise = NoiseBank(image_size=224, device=device)
    noise.erase(images, Erased(boxes, starts))        # in place

DALI can only fill a box with a constant, and noise that is a function of the sample must not come from a generator with a state. So
the numbers are drawn once, and a box takes a stretch of them that begins where (seed, epoch, sample id) says: in the step it is a
copy, with nothing to compute.
"""

from dataclasses import dataclass

import numpy as np
import torch

from data.draws import Draw, hash64, standard_normal

STARTS = 1 << 20  # places in the bank at which the noise of a box can begin


def noise_starts(seed: int, epoch: int, ids: np.ndarray, count: int) -> np.ndarray:
    """Where in the bank the noise of each of a sample's `count` boxes begins, int64 (n, count)."""
    return (hash64(seed, Draw.ERASED_NOISE, epoch, ids[:, None], np.arange(count)) % np.uint64(STARTS)).astype(np.int64)


@dataclass(frozen=True, eq=False)
class Erased:
    """Boxes of B samples, int32 (B, count, 4: y, x, height, width), those of no height being none; and where the noise of each begins in
    the bank, int64 (B, count)."""

    boxes: np.ndarray
    starts: np.ndarray


class NoiseBank:
    """Standard normal numbers on a device, the same in every process."""

    def __init__(self, image_size: int, device: torch.device) -> None:
        count = STARTS + 3 * image_size**2
        self._numbers = torch.from_numpy(standard_normal(Draw.ERASED_NOISE, np.arange(count)).astype(np.float32)).to(device)

    def erase(self, images: torch.Tensor, erased: Erased) -> None:
        """Fills the boxes of images (B, 3, H, W) with noise, in place."""
        for sample, box in np.argwhere(erased.boxes[..., 2] > 0):
            y, x, height, width = erased.boxes[sample, box].tolist()
            start = erased.starts[sample, box]
            noise = self._numbers[start : start + 3 * height * width].view(height, width, 3)
            images[sample, :, y : y + height, x : x + width] = noise.permute(2, 0, 1)
