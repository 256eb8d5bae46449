"""Mixup and cutmix mix pairs as a plain loop would, without a change of layout."""

import numpy as np
import pytest
import torch

from data.augment.mixup import mix_pairs
from data.augment.sampling import draw_mix

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


def batch(count: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 3, size, size, generator=generator).to(memory_format=torch.channels_last)
    return images, torch.randint(0, 10, (count,), generator=generator)


@pytest.mark.parametrize("device", DEVICES)
def test_mix_equals_a_plain_loop(device: str) -> None:
    images, labels = batch(40, 24)
    mix = draw_mix(0, 0, np.arange(20), image_size=24, mixup=0.8, cutmix=1.0)
    out, targets, weight = mix_pairs(images.to(device), labels.to(device), mix)
    out, targets, weight = out.cpu(), targets.cpu(), weight.cpu()
    for slot in range(40):
        partner = slot ^ 1
        lam = float(mix.lam[slot // 2])
        y0, y1, x0, x1 = mix.box[slot // 2].tolist()
        if y1 > y0 and x1 > x0:
            expected = images[slot].clone()
            expected[:, y0:y1, x0:x1] = images[partner][:, y0:y1, x0:x1]
            assert torch.equal(out[slot], expected)
        else:
            torch.testing.assert_close(out[slot], lam * images[slot] + (1 - lam) * images[partner])
        assert targets[slot].tolist() == [labels[slot], labels[partner]]
        assert weight[slot] == mix.lam[slot // 2]


@pytest.mark.parametrize("device", DEVICES)
def test_layout_and_input_do_not_change(device: str) -> None:
    images, labels = batch(8, 16)
    images, labels = images.to(device), labels.to(device)
    before = images.clone()
    out, targets, weight = mix_pairs(images, labels, draw_mix(0, 0, np.arange(4), image_size=16, mixup=0.8, cutmix=1.0))
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert out.stride() == images.stride()
    assert torch.equal(images, before)
    assert (out.dtype, targets.dtype, weight.dtype) == (torch.float32, torch.int64, torch.float32)
    assert (targets.shape, weight.shape) == ((8, 2), (8,))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_mixing_does_not_synchronize_with_the_device() -> None:
    images, labels = batch(8, 16)
    images, labels = images.cuda(), labels.cuda()
    mix = draw_mix(0, 0, np.arange(4), image_size=16, mixup=0.8, cutmix=1.0)
    mix_pairs(images, labels, mix)
    torch.cuda.set_sync_debug_mode("error")
    try:
        mix_pairs(images, labels, mix)
    finally:
        torch.cuda.set_sync_debug_mode("default")
