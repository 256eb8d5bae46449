"""Adds image operators to a DALI graph: the resize, and the operators of RandAugment and color jitter.

    images = resize(images, size, linear, resizer)              # inside a pipeline_def with enable_conditionals
    inputs = compute_operator_inputs(layer, mirrored, linear, 224)      # NumPy arrays, the graph's inputs for one layer
    images = apply_layer(images, branch, matrix, value, fill)

Only the resize differs between CPU and GPU. On a CPU it is torch's, which uses vector instructions for uint8, takes less than a third of
the time of DALI's and gives Pillow's pixels (`python -m benchmarks.loader.augmentation_cpu`).

DALI's auto_aug lacks some of timm's operators and timm's noise on magnitudes, draws its own random numbers, and on a CPU spends most of
its time in warp_affine. Here each sample takes only the branch of its operator. Operators with the same arithmetic share a branch: all
geometry is one homography, sharpness one 3 x 3 filter, saturation one matrix over the channels. Pixels equal those of Pillow, which timm
uses, except for rounding and, in geometry, the kernel of the bicubic interpolation (tests/data/augment/test_operators.py has the
tolerances).
"""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from nvidia.dali import fn
from nvidia.dali.types import Constant, DALIDataType, DALIImageType, DALIInterpType

from data.augment.randaugment import Layer, Operator


class Branch:
    """The branches of the graph, with the meaning of `matrix` and `value`; plain integers, because DALI compares nodes only with those."""

    NONE = 0
    WARP_CUBIC = 1  # matrix: homography, from pixels of the result to those of the image
    WARP_LINEAR = 2
    SCALE = 3  # value: brightness
    INVERT = 4
    SOLARIZE = 5  # value: lowest intensity that is inverted, at most 255
    SOLARIZE_ADD = 6  # value: added to intensities below 128; at most 128
    POSTERIZE = 7  # value: mask of the bits that are kept
    FILTER = 8  # matrix: weights of a pixel and its neighbors
    COLOR = 9  # matrix: from channels to channels
    CONTRAST = 10  # value: contrast
    AUTO_CONTRAST = 11
    EQUALIZE = 12


_BRANCH = {
    Operator.NONE: Branch.NONE,
    Operator.AUTO_CONTRAST: Branch.AUTO_CONTRAST,
    Operator.EQUALIZE: Branch.EQUALIZE,
    Operator.INVERT: Branch.INVERT,
    Operator.POSTERIZE: Branch.POSTERIZE,
    Operator.SOLARIZE: Branch.SOLARIZE,
    Operator.SOLARIZE_ADD: Branch.SOLARIZE_ADD,
    Operator.COLOR: Branch.COLOR,
    Operator.CONTRAST: Branch.CONTRAST,
    Operator.BRIGHTNESS: Branch.SCALE,
    Operator.SHARPNESS: Branch.FILTER,
}
_BRANCHES = np.array([_BRANCH.get(operator, Branch.WARP_CUBIC) for operator in Operator], np.int32)

_LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R 601, as in Pillow's convert("L")
_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13  # Pillow's ImageFilter.SMOOTH
_CENTER = np.array([[0, 0, 0], [0, 1, 0], [0, 0, 0]])
# Pillow truncates, DALI rounds. Slightly less than a half, because sums that should be integers are slightly smaller.
_TRUNCATE = 0.499
_ALL_BITS = Constant(np.uint8(255))


class CpuResizer:
    """Resizes the images of a batch in a thread pool, with antialiasing; pixels are within 1 of 255 of Pillow's."""

    def __init__(self, threads: int) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="resize")

    def __call__(self, images: list[np.ndarray], sizes: list[np.ndarray], linear: list[np.ndarray]) -> list[np.ndarray]:
        """Resizes images, uint8 (H, W, 3), to (height, width); `linear` is 1 for bilinear interpolation, 0 for bicubic."""
        return list(self._pool.map(_resize_one, images, sizes, linear))

    def close(self) -> None:
        self._pool.shutdown()


def _resize_one(image: np.ndarray, size: np.ndarray, linear: np.ndarray) -> np.ndarray:
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None]
    mode = "bilinear" if linear else "bicubic"
    return F.interpolate(pixels, tuple(size.tolist()), mode=mode, antialias=True, align_corners=False)[0].permute(1, 2, 0).numpy()


def resize(images: Any, size: Any, linear: Any, on_cpu: CpuResizer) -> Any:
    """Adds the resize, with antialiasing, of uint8 HWC images.

    `size` is a node of int32 (height, width); `linear` is a node, 1 for bilinear interpolation and 0 for bicubic.
    """
    if images.device == "cpu":
        return fn.python_function(images, size, linear, function=on_cpu, batch_processing=True, output_layouts="HWC")
    size = fn.cast(size, dtype=DALIDataType.FLOAT)
    if linear == 1:
        result = fn.resize(images, size=size, interp_type=DALIInterpType.INTERP_LINEAR, antialias=True)
    else:
        result = fn.resize(images, size=size, interp_type=DALIInterpType.INTERP_CUBIC, antialias=True)
    return result


def compute_operator_inputs(
    layer: Layer, mirrored: np.ndarray, linear: np.ndarray, image_size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Computes the graph's inputs for one layer over n samples.

    Where `mirrored`, bool (n,), is true, the geometry is that of the mirrored image, because the graph mirrors last. Where `linear`,
    bool (n,), is true, geometry is interpolated bilinearly. Returns Branch int32 (n,), matrix float32 (n, 3, 3) and value float32 (n,).
    """
    operator, argument = layer.operator, layer.argument
    branch = _BRANCHES[operator]
    warped = branch == Branch.WARP_CUBIC
    matrix = np.zeros((len(operator), 3, 3), np.float32)
    matrix[warped] = _compute_homography(operator[warped], argument[warped], mirrored[warped], image_size)
    factor = argument[:, None, None]
    for one, identity, degenerate in ((Operator.COLOR, np.eye(3), np.tile(_LUMA, (3, 1))), (Operator.SHARPNESS, _CENTER, _SMOOTH)):
        selected = operator == one
        matrix[selected] = factor[selected] * identity + (1 - factor[selected]) * degenerate
    value = np.where(operator == Operator.POSTERIZE, 256 - 2 ** np.clip(8 - argument, 0, 8), argument).astype(np.float32)
    branch = np.where(warped & linear, Branch.WARP_LINEAR, branch)
    unchanged = ((operator == Operator.POSTERIZE) & (argument >= 8)) | ((operator == Operator.SOLARIZE) & (argument > 255))
    return np.where(unchanged, Branch.NONE, branch).astype(np.int32), matrix, value


def _compute_homography(operator: np.ndarray, argument: np.ndarray, mirrored: np.ndarray, size: int) -> np.ndarray:
    """Computes matrices from result pixels to image pixels, float64 (n, 3, 3), with the corner as origin, as in Pillow's AFFINE."""
    matrix = np.tile(np.eye(3), (len(operator), 1, 1))
    rotated = operator == Operator.ROTATE
    angle, center = np.deg2rad(argument[rotated]), size / 2
    cos, sin = np.cos(angle), np.sin(angle)
    matrix[rotated, 0] = np.stack([cos, -sin, center * (1 - cos + sin)], axis=1)
    matrix[rotated, 1] = np.stack([sin, cos, center * (1 - cos - sin)], axis=1)
    for one, row, column, unit in (
        (Operator.SHEAR_X, 0, 1, 1),
        (Operator.SHEAR_Y, 1, 0, 1),
        (Operator.TRANSLATE_X, 0, 2, size),
        (Operator.TRANSLATE_Y, 1, 2, size),
    ):
        selected = operator == one
        matrix[selected, row, column] = argument[selected] * unit
    mirror = np.array([[-1, 0, size], [0, 1, 0], [0, 0, 1]])
    matrix[mirrored] = mirror @ matrix[mirrored] @ mirror
    return matrix


def apply_layer(images: Any, branch: Any, matrix: Any, value: Any, fill: list[float]) -> Any:
    """Adds one layer to the graph of uint8 HWC images. `fill` is the color outside of the image, 0 to 255."""
    if branch == Branch.NONE:
        result = images
    elif branch == Branch.WARP_CUBIC:
        result = _warp(images, matrix, fill, DALIInterpType.INTERP_CUBIC)
    elif branch == Branch.WARP_LINEAR:
        result = _warp(images, matrix, fill, DALIInterpType.INTERP_LINEAR)
    elif branch == Branch.SCALE:
        result = fn.brightness_contrast(images, brightness=value, brightness_shift=-_TRUNCATE / 255)
    elif branch == Branch.INVERT:
        result = images ^ _ALL_BITS
    elif branch == Branch.SOLARIZE:
        result = images ^ (_ALL_BITS * (images >= fn.cast(value, dtype=DALIDataType.UINT8)))
    elif branch == Branch.SOLARIZE_ADD:
        result = images + fn.cast(value, dtype=DALIDataType.UINT8) * (images < Constant(np.uint8(128)))  # at most 127 + 128
    elif branch == Branch.POSTERIZE:
        result = images & fn.cast(value, dtype=DALIDataType.UINT8)
    elif branch == Branch.FILTER:
        weights = matrix.gpu() if images.device == "gpu" else matrix  # an input of this operator, but an argument of the others
        result = fn.filter(images, weights, border="clamp")
    elif branch == Branch.COLOR:
        result = fn.coord_transform(images, M=matrix, T=-_TRUNCATE, dtype=DALIDataType.UINT8)
    elif branch == Branch.CONTRAST:
        result = _contrast(images, value)
    elif branch == Branch.AUTO_CONTRAST:
        result = _auto_contrast(images)
    else:
        result = _equalize(images)
    return result


def _warp(images: Any, matrix: Any, fill: list[float], interpolation: DALIInterpType) -> Any:
    # DALI's warp_affine is several times slower on a CPU, and has no bicubic interpolation.
    return fn.experimental.warp_perspective(images, matrix=matrix, fill_value=fill, interp_type=interpolation, pixel_origin="corner")


def _contrast(images: Any, factor: Any) -> Any:
    gray = fn.color_space_conversion(images, image_type=DALIImageType.RGB, output_type=DALIImageType.GRAY)
    mean = fn.reductions.mean(gray, axes=[0, 1], keep_dims=True)
    return fn.cast(images * factor + (mean * (1.0 - factor) - _TRUNCATE), dtype=DALIDataType.UINT8)


def _auto_contrast(images: Any) -> Any:
    """Scales each channel so that its minimum becomes 0 and its maximum 255, unless they are equal."""
    low = fn.cast(fn.reductions.min(images, axes=[0, 1], keep_dims=True), dtype=DALIDataType.FLOAT)
    high = fn.cast(fn.reductions.max(images, axes=[0, 1], keep_dims=True), dtype=DALIDataType.FLOAT)
    flat = high == low
    scale = 255.0 / (high - low + 255.0 * flat)
    return fn.cast(images * scale - (low * scale * (high > low) + _TRUNCATE), dtype=DALIDataType.UINT8)


def _equalize(images: Any) -> Any:
    # Pillow's cumulative histogram begins with 0; that of OpenCV, which DALI uses, begins with the count of the lowest value. On the
    # inverted image the two agree.
    return fn.equalize(images ^ _ALL_BITS) ^ _ALL_BITS
