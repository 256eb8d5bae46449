"""Divides the work of the depthwise convolution kernels: pure functions of the shape, with their reasons.

The unit of work is a strip: output rows of one column of one image, `dilation` apart. One thread computes a strip for eight channels (16
bytes of bf16). Each loaded row is used from registers for up to `kernel_size` outputs. So for each kernel column, a strip of R rows loads
(R + kernel_size - 1) / R rows per output instead of `kernel_size`.

Rows with equal remainder modulo the dilation form a phase, on which the kernel's rows are adjacent; a strip stays within one phase. So a
dilated kernel needs as many loads as a plain one. Columns need no phases: a shift by `dilation` columns only changes the address.

Strips of all images, phases and columns are numbered in one sequence. A tile takes LANES of them, from any images, so maps of 7 px waste no
more lanes than maps of 56 px.

    sequence number = ((image * strips + strip) * dilation + phase) * width + column
"""

from dataclasses import dataclass

LANES = 32  # strips (weight gradient: strips times kernel columns) in a tile, adjacent in memory where possible
CHANNELS = 32  # channels in a tile, which divide all widths of VAN: 64 bytes of bf16, two sectors of a cache line
WARPS = 4  # LANES * CHANNELS / (32 * WARPS) = 8 values per thread: 16 bytes of bf16
# Register limit of a thread, by bytes per value. 65,536 / (168 * 128 threads) lets three programs share a multiprocessor: twelve warps. In
# fp32, loaded values take twice the registers until they are used: 168 would spill, and any higher limit lets two programs share.
REGISTERS = {2: 168, 4: 255}
PROGRAMS_PER_MULTIPROCESSOR = {2: 3, 4: 2}

# The most rows per strip, by kernel size, that do not spill with REGISTERS (tests/pretrain/model/fast/triton/test_resources.py). For each
# of eight channels a thread holds a sum per row and the weights of a kernel column: 8 * (rows + kernel size) registers.
MOST_ROWS = {3: 7, 5: 7, 7: 5}
# In the weight gradient a thread holds a sum per kernel row and the strip's rows of the output gradient: the same count.
MOST_ROWS_WEIGHT_GRADIENT = {3: 7, 5: 7, 7: 7}


def tiles(count: int, size: int) -> int:
    """Returns count / size, rounded up. (triton.cdiv also serves the compiler, which costs host time in every launch.)"""
    return -(-count // size)


@dataclass(frozen=True)
class Strips:
    """`strips` strips of `rows` rows cover a phase of a map. A single strip is surrounded by padding, which kernels skip."""

    rows: int
    strips: int


def strips(height: int, dilation: int, most_rows: int) -> Strips:
    """Returns as few strips as `most_rows` allows, equally long, so that few rows outside of the map are computed."""
    phase = tiles(height, dilation)
    count = tiles(phase, most_rows)
    return Strips(tiles(phase, count), count)


def column_lanes(kernel_size: int) -> int:
    """Returns the weight gradient's lanes per strip: the kernel's columns, rounded up to a power of two for the sums over strips."""
    return 1 << (kernel_size - 1).bit_length()


def splits(total: int, channels: int, kernel_size: int, programs: int) -> tuple[int, int]:
    """Returns the number of runs into which the weight gradient divides `total` strips, and the strips per run.

    One program processes a run and a tile of channels and stores one partial sum, so the order of summation, and every bit of the result,
    depends only on the shape and the GPU model. `programs` is the number that the GPU runs at once; one more would wait for another to end.
    A run has at least eight tiles of strips, so that adding up the partial sums costs little.
    """
    at_once = LANES // column_lanes(kernel_size)
    all_tiles = tiles(total, at_once)
    runs = max(1, min(programs // tiles(channels, CHANNELS), all_tiles // 8))
    per_run = tiles(all_tiles, runs) * at_once
    return tiles(total, per_run), per_run
