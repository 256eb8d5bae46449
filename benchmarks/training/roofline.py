"""Roofline of a training step, computed from shapes: an upper bound on images per second by a GPU's data sheet.

    attainable("van_b3", 224, FUSED, Device(4.8e12, 790e12, 67e12))      # images/s

A kernel takes as long as the slowest of its memory traffic, its matrix products on the tensor cores, and its other multiply-adds on the
fp32 cores; kernels run one after the other. A block is divided into kernels in one of three ways, its cut:

- EAGER: one kernel per operator of the authors' code, and its gradients. Their two `x.clone()`s are copies, and the gradient of a bias is
  a separate sum.
- FUSED: the best cut. Pointwise operators and BatchNorm's normalization are fused into the loads or stores of a neighbor, statistics into
  the kernel that computes their tensor; the input and weight gradients of a depthwise convolution share a kernel; each activation is
  stored once. The gradient of a BatchNorm is a separate kernel, as it first needs sums over the whole gradient.
- BUILT: the kernels of `pretrain.model.fast.triton` between PyTorch's BatchNorms. The block's shortcut, its gradient and the maps of
  BatchNorm take 4 bytes per value, as under autocast.

Other activations and their gradients take 2 bytes per value. Weights, patch embeddings, the LayerNorms of the stages, the head, the
optimizer and the reduction of gradients are not counted.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from pretrain.model.van import VARIANTS

BYTES = 2  # per value
STRIDES, MLP_RATIOS = (4, 8, 16, 32), (8, 8, 4, 4)  # of the stages, in all variants


@dataclass(frozen=True)
class Device:
    """A GPU's limits: bytes/s of its memory, FLOP/s of large 16-bit matrix products, FLOP/s of its fp32 cores."""

    bytes_per_s: float
    tensor_flops: float
    core_flops: float


# By CUDA's device names. Memory and fp32 rates are from NVIDIA's data sheets; tensor_flops is the rate of large matrix products, about four
# fifths of the data sheet's (assumed for B200).
DEVICES = {
    r"(NVIDIA )?A100-(SXM4|PCIE)-80GB|NVIDIA A100 80GB PCIe": Device(2.04e12, 270e12, 19.5e12),
    r"NVIDIA H100 80GB HBM3": Device(3.35e12, 750e12, 67e12),
    r"NVIDIA H200": Device(4.8e12, 790e12, 67e12),
    r"NVIDIA B200": Device(8.0e12, 1800e12, 75e12),
}


@dataclass(frozen=True)
class Kernel:
    """Work of a kernel per position of a block's map.

    Attributes:
        maps: values read and written per channel.
        wide: values read and written per channel of the MLP's hidden map.
        products: matrix products of channels by channels.
        mlp_products: matrix products of channels by hidden channels.
        taps, wide_taps: multiply-adds of a depthwise convolution, per value of the map and of the hidden map.
    """

    name: str
    maps: float = 0
    wide: float = 0
    products: int = 0
    mlp_products: int = 0
    taps: int = 0
    wide_taps: int = 0


def _branch_end(branch: str) -> list[Kernel]:
    return [Kernel(f"{branch}: layer scale", 2), Kernel(f"{branch}: drop path", 2), Kernel(f"{branch}: shortcut", 3)]


def _branch_end_gradient(branch: str) -> list[Kernel]:
    ends = [("drop path", 2), ("layer scale", 2), ("layer scale's gradient, product", 3), ("layer scale's gradient, sum", 1)]
    return [Kernel(f"{branch}: gradient of {end}", maps) for end, maps in ends]


def _products_gradients(name: str) -> list[Kernel]:
    return [Kernel(f"{name}: {of} gradient", 2, products=1) for of in ("input", "weight")]


def _convolution_gradients(name: str, taps: int = 0) -> list[Kernel]:
    by_taps = [Kernel(f"{name}: {of} gradient", 2, taps=taps) for of in ("input", "weight")]
    return [*(by_taps if taps else _products_gradients(name)), Kernel(f"{name}: bias gradient", 1)]


# u is LKA's input, as in the authors' code; the inner shortcut is the one inside the attention.
EAGER = [
    # Forward. A norm reads its input for the statistics, and again to apply them.
    Kernel("norm1", 3), Kernel("clone", 2), Kernel("proj_1", 2, products=1), Kernel("GELU", 2), Kernel("clone", 2),
    Kernel("conv0", 2, taps=25), Kernel("conv_spatial", 2, taps=49), Kernel("conv1", 2, products=1), Kernel("gate", 3),
    Kernel("proj_2", 2, products=1), Kernel("attention's inner shortcut", 3), *_branch_end("attention"),
    Kernel("norm2", 3), Kernel("fc1", 1, 1, mlp_products=1), Kernel("dwconv", wide=2, wide_taps=9), Kernel("GELU", wide=2),
    Kernel("fc2", 1, 1, mlp_products=1), *_branch_end("MLP"),
    # Backward through the MLP; a kernel adds the gradients of a tensor with two uses.
    *_branch_end_gradient("MLP"),
    *(Kernel(f"fc2: {of} gradient", 1, 1, mlp_products=1) for of in ("input", "weight")), Kernel("fc2: bias gradient", 1),
    Kernel("gradient of GELU", wide=3),
    *(Kernel(f"dwconv: {of} gradient", wide=2, wide_taps=9) for of in ("input", "weight")), Kernel("dwconv: bias gradient", wide=1),
    *(Kernel(f"fc1: {of} gradient", 1, 1, mlp_products=1) for of in ("input", "weight")), Kernel("fc1: bias gradient", wide=1),
    Kernel("gradient of norm2", 5), Kernel("sum at the MLP's shortcut", 3),
    # Through the attention
    *_branch_end_gradient("attention"), *_convolution_gradients("proj_2"),
    Kernel("gradient of the gate to u", 3), Kernel("gradient of the gate to the attention map", 3),
    *_convolution_gradients("conv1"), *_convolution_gradients("conv_spatial", 49), *_convolution_gradients("conv0", 25),
    Kernel("sum at u", 3), Kernel("gradient of GELU", 3), *_convolution_gradients("proj_1"),
    Kernel("sum at attention's inner shortcut", 3), Kernel("gradient of norm1", 5), Kernel("sum at attention's shortcut", 3),
]  # fmt: skip

FUSED = [
    Kernel("norm1, proj_1", 2, products=1),
    Kernel("GELU, conv0", 2, taps=25),
    Kernel("conv_spatial", 2, taps=49),
    Kernel("conv1", 2, products=1),
    # reads the attention map, u's source and the block's input; writes the branch, which the layer scale's gradient needs, and the sum
    Kernel("gate, proj_2, both shortcuts", 5, products=1),
    Kernel("norm2, fc1", 1, 1, mlp_products=1),
    Kernel("dwconv", wide=2, wide_taps=9),
    Kernel("GELU, fc2, shortcut", 3, 1, mlp_products=1),
    # reads the gradient, the branch for the layer scale's, and GELU's input
    Kernel("fc2: input gradient, with GELU's and the layer scale's", 2, 2, mlp_products=1),
    Kernel("fc2: weight gradient", 1, 1, mlp_products=1),
    Kernel("dwconv: both gradients", wide=3, wide_taps=18),
    Kernel("fc1: input gradient, norm2's sums", 2, 1, mlp_products=1),
    Kernel("fc1: weight gradient", 1, 1, mlp_products=1),
    Kernel("gradient of norm2, sum at the shortcut", 4),
    # reads the gradient, the branch, the attention map and u's source; writes the gradients of these two
    Kernel("proj_2: input gradient, with the gate's and the layer scale's", 6, products=1),
    Kernel("proj_2: weight gradient", 3, products=1),
    Kernel("conv1: input gradient", 2, products=1),
    Kernel("conv1: weight gradient", 2, products=1),
    Kernel("conv_spatial: both gradients", 3, taps=98),
    Kernel("conv0: both gradients, sum at u, GELU's gradient", 4, taps=50),
    Kernel("proj_1: input gradient, sum at the inner shortcut, norm1's sums", 4, products=1),
    Kernel("proj_1: weight gradient", 2, products=1),
    Kernel("gradient of norm1, sum at the shortcut", 4),
]

# A map with 4 bytes per value counts twice.
BUILT = [
    # A BatchNorm reads its input for the statistics, and again to normalize it; autocast casts its output for the matrix product.
    Kernel("norm1", 6), Kernel("cast", 3), Kernel("proj_1", 2, products=1), Kernel("GELU", 2), Kernel("conv0", 2, taps=25),
    Kernel("conv_spatial", 2, taps=49), Kernel("conv1", 2, products=1), Kernel("gate", 3), Kernel("proj_2", 2, products=1),
    Kernel("attention: residual add with the inner shortcut", 7),
    Kernel("norm2", 6), Kernel("cast", 3), Kernel("fc1", 1, 1, mlp_products=1), Kernel("dwconv, GELU", wide=2, wide_taps=9),
    Kernel("fc2", 1, 1, mlp_products=1), Kernel("MLP: residual add", 5),
    # Backward through the MLP
    Kernel("MLP: gradient of the residual add", 4),
    *(Kernel(f"fc2: {of} gradient", 1, 1, mlp_products=1) for of in ("input", "weight")),
    Kernel("gradient of GELU, dwconv again", wide=3, wide_taps=9),
    *(Kernel(f"dwconv: {of} gradient", wide=2, wide_taps=9) for of in ("input", "weight")),
    *(Kernel(f"fc1: {of} gradient", 1, 1, mlp_products=1) for of in ("input", "weight")),
    Kernel("gradient of the cast", 3), Kernel("gradient of norm2", 10), Kernel("sum at the MLP's shortcut", 6),
    # Through the attention
    Kernel("attention: gradient of the residual add", 6), Kernel("cast of the inner shortcut's gradient", 3),
    *_products_gradients("proj_2"), Kernel("gradients of the gate", 5), *_products_gradients("conv1"),
    *(Kernel(f"conv_spatial: {of} gradient", 2, taps=49) for of in ("input", "weight")),
    Kernel("conv0: input gradient, sum at u, GELU's gradient", 4, taps=25), Kernel("conv0: weight gradient", 2, taps=25),
    *_products_gradients("proj_1"),
    Kernel("gradient of the cast", 3), Kernel("sum at attention's inner shortcut", 6), Kernel("gradient of norm1", 10),
    Kernel("sum at attention's shortcut", 6),
]  # fmt: skip


@dataclass(frozen=True)
class Work:
    """Work of a kernel for one image, in all blocks of a stage."""

    bytes: float
    tensor_flops: float
    core_flops: float

    def seconds(self, device: Device) -> float:
        return max(self.bytes / device.bytes_per_s, self.tensor_flops / device.tensor_flops, self.core_flops / device.core_flops)


def work(model_name: str, image_size: int, kernels: Sequence[Kernel]) -> list[Work]:
    """Returns the work of each kernel in each stage for one image; a multiply-add counts as two FLOPs."""
    result = []
    shape = VARIANTS[model_name]
    for dim, depth, ratio, stride in zip(shape["embed_dims"], shape["depths"], MLP_RATIOS, STRIDES, strict=True):
        hidden, positions = ratio * dim, depth * (-(-image_size // stride)) ** 2
        for kernel in kernels:
            products = kernel.products * dim * dim + kernel.mlp_products * dim * hidden
            taps = kernel.taps * dim + kernel.wide_taps * hidden
            values = kernel.maps * dim + kernel.wide * hidden
            result.append(Work(BYTES * positions * values, 2 * positions * products, 2 * positions * taps))
    return result


def attainable(model_name: str, image_size: int, kernels: Sequence[Kernel], device: Device) -> float:
    """Returns the images per second."""
    return 1 / sum(part.seconds(device) for part in work(model_name, image_size, kernels))


def image_bytes(model_name: str, image_size: int, kernels: Sequence[Kernel]) -> float:
    """Returns the bytes read and written for one image."""
    return sum(part.bytes for part in work(model_name, image_size, kernels))


def find_device(name: str) -> Device | None:
    """Returns the limits of the GPU with this name, or None if DEVICES lacks it."""
    return next((device for pattern, device in DEVICES.items() if re.fullmatch(pattern, name)), None)
