"""Cuts the work of the depthwise convolution kernels: pure functions of the shape, with their reasons.

The unit of work is a strip: some output rows of one column of one image, which lie `dilation` apart. One thread computes a strip for eight
channels (16 bytes of bf16). Each loaded row serves up to `kernel_size` outputs from registers, so for each column of the kernel a strip of
R rows loads (R + kernel_size - 1) / R rows an output instead of `kernel_size`.

Rows of equal remainder by the dilation form a phase, on which the kernel's rows are adjacent; a strip stays in one phase. So a dilated
kernel needs as many loads as a plain one. Columns need no phases: a shift by `dilation` columns only changes the address.

Strips of all images, phases and columns are numbered in one sequence, and a tile takes LANES of them, whatever image they belong to:
maps of 7 px waste no more lanes than those of 56 px.

    sequence number = ((image * strips + strip) * dilation + phase) * width + column
"""

from dataclasses import dataclass

LANES = 32  # strips (weight gradient: strips times kernel columns) in a tile, beside each other in memory where they can be
CHANNELS = 32  # channels in a tile. All widths of VAN are multiples; 64 bytes of bf16, two sectors of a cache line
WARPS = 4  # LANES * CHANNELS / (32 * WARPS) = 8 values a thread: 16 bytes of bf16
# Registers a thread may use, by bytes of a value. 65,536 / (168 * 128 threads) lets three programs share a multiprocessor: twelve warps.
# In fp32 what was loaded takes twice the registers until it is used; 168 would spill, and any number above lets two programs share.
REGISTERS = {2: 168, 4: 255}
PROGRAMS_PER_MULTIPROCESSOR = {2: 3, 4: 2}

# The most rows of a strip for which nothing spills with REGISTERS (tests/pretrain/model/fast/triton/test_resources.py). A thread holds
# a sum for each of its rows and the kernel's column, eight channels of each: 8 * (rows + kernel size) registers.
MOST_ROWS = {3: 7, 5: 7, 7: 5}
# In the weight gradient a sum for each row of the kernel, and the strip's rows of the output's gradient: the same count.
MOST_ROWS_WEIGHT_GRADIENT = {3: 7, 5: 7, 7: 7}


def tiles(count: int, size: int) -> int:
    """Returns count / size, rounded up. (triton.cdiv is for the compiler too, which costs the host time in every launch.)"""
    return -(-count // size)


@dataclass(frozen=True)
class Strips:
    """`strips` strips of `rows` rows cover a phase of a map. A single one meets only padding outside of itself, and kernels skip that."""

    rows: int
    strips: int


def strips(height: int, dilation: int, most_rows: int) -> Strips:
    """Returns the fewest strips that `most_rows` allows, of equal length, so that few rows outside of the map are computed."""
    phase = tiles(height, dilation)
    count = tiles(phase, most_rows)
    return Strips(tiles(phase, count), count)


def column_lanes(kernel_size: int) -> int:
    """Returns the lanes of the weight gradient for the kernel's columns: a power of two, which sums over strips need."""
    return 1 << (kernel_size - 1).bit_length()


def splits(total: int, channels: int, kernel_size: int, programs: int) -> tuple[int, int]:
    """Returns the number of runs into which the weight gradient cuts `total` strips, and the strips of each run.

    One program takes a run and a tile of channels and leaves one partial sum, so the order of sums, and with it every bit, follows from
    the shape and the kind of GPU. `programs` is how many the GPU runs at once; one more would wait for another to end. A run has at least
    eight tiles of strips, so that adding up the partial sums costs little.
    """
    at_once = LANES // column_lanes(kernel_size)
    all_tiles = tiles(total, at_once)
    runs = max(1, min(programs // tiles(channels, CHANNELS), all_tiles // 8))
    per_run = tiles(all_tiles, runs) * at_once
    return tiles(total, per_run), per_run
