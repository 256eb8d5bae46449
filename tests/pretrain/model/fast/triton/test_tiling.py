"""How the convolutions' work is cut: nothing is left out, nothing is done twice."""

import itertools

import pytest
import torch
import triton
import triton.language as tl

from pretrain.model.fast.triton.depthwise_device import _place
from pretrain.model.fast.triton.tiling import (
    CHANNELS,
    LANES,
    MOST_ROWS,
    MOST_ROWS_WEIGHT_GRADIENT,
    Strips,
    column_lanes,
    splits,
    strips,
)


@pytest.mark.parametrize("most", [1, 2, 5, 7])
@pytest.mark.parametrize("dilation", [1, 3])
def test_strips_cover_every_row_once(most: int, dilation: int) -> None:
    for height in range(1, 100):
        cut = strips(height, dilation, most)
        assert cut.rows <= most
        places = itertools.product(range(cut.strips), range(dilation), range(cut.rows))
        rows = [strip * cut.rows * dilation + phase + r * dilation for strip, phase, r in places]
        assert sorted(row for row in rows if row < height) == list(range(height))
        # Strips are as few as can be, and none lies outside of a phase wholly.
        assert (cut.strips - 1) * most < -(-height // dilation)
        assert (cut.strips - 1) * cut.rows < -(-height // dilation)


def test_maps_smaller_than_the_kernels_reach_are_one_strip_to_a_phase() -> None:
    assert [strips(size, 3, MOST_ROWS[7]) for size in (56, 28, 14, 7)] == [Strips(5, 4), Strips(5, 2), Strips(5, 1), Strips(3, 1)]
    assert [strips(size, 3, MOST_ROWS_WEIGHT_GRADIENT[7]).strips for size in (56, 28, 14, 7)] == [3, 2, 1, 1]
    # All maps of 224 px under plain kernels are cut without a row to spare.
    for k, size in itertools.product((3, 5), (56, 28, 14, 7)):
        cut = strips(size, 1, MOST_ROWS[k])
        assert cut.rows * cut.strips == size


@pytest.mark.parametrize("k", [3, 5, 7])
def test_splits_cover_all_strips_in_one_wave_of_programs(k: int) -> None:
    for total, channels, at_once in itertools.product((1, 7, 100, 1344, 64512, 10**7), (3, 64, 96, 320, 3072), (12, 216, 396)):
        runs, per_run = splits(total, channels, k, at_once)
        assert (runs - 1) * per_run < total <= runs * per_run
        programs = runs * -(-channels // CHANNELS)
        assert runs == 1 or programs <= at_once
        assert per_run % (LANES // column_lanes(k)) == 0
    # The first stage of VAN-B3 at a micro-batch of 64 fills a GPU that runs 396.
    assert splits(64 * 3 * 3 * 56, 64, 7, 396)[0] * 2 > 0.9 * 396


@triton.jit
def _places(found, strip, H: tl.constexpr, W: tl.constexpr, D: tl.constexpr, R: tl.constexpr, STRIPS: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, 16)
    pixel, top, column = _place(strip + at, H, W, D, R, STRIPS)
    tl.store(found + at, pixel)
    tl.store(found + 16 + at, top.to(tl.int64))
    tl.store(found + 32 + at, column.to(tl.int64))


@pytest.mark.parametrize("image", [0, 3, 900_000])  # the last lies beyond 2**31 pixels, and its values further yet
def test_places_of_strips(image: int) -> None:
    height, width, dilation = 56, 50, 3
    cut = strips(height, dilation, MOST_ROWS[7])
    first = (image * cut.strips * dilation) * width + 160
    device = "cpu" if triton.knobs.runtime.interpret else "cuda"
    found = torch.zeros(3, 16, dtype=torch.int64, device=device)
    _places[(1,)](found, first, H=height, W=width, D=dilation, R=cut.rows, STRIPS=cut.strips)
    for i in range(16):
        rest, column = divmod(first + i, width)
        rest, phase = divmod(rest, dilation)
        image_found, strip = divmod(rest, cut.strips)
        top = strip * cut.rows * dilation + phase
        assert found[:, i].tolist() == [(image_found * height + top) * width + column, top, column]
