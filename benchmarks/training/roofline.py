"""What memory and arithmetic allow a training step, counted from shapes: an upper bound on images a second, by a GPU's data sheet.

    attainable("van_b3", 224, FUSED, Device(4.8e12, 790e12, 67e12))      # images a second

Each kernel takes as long as the slowest of three would: its bytes through memory, its products on the tensor cores, its other
multiply-adds on the fp32 lanes; kernels run one after the other. Three ways to cut a block into kernels are counted:

- EAGER: one kernel for each operator as the authors wrote it, its gradients included. Their two `x.clone()`s are copies, and a bias's
  gradient is a sum of its own.
- FUSED: what a better cut could do. All pointwise work and the application of BatchNorm happen where a neighbour loads or stores,
  statistics where their tensor is made; the input and weight gradient of a depth-wise convolution share a kernel; each activation is stored
  once. A gradient through BatchNorm stays a kernel of its own, as it needs sums over the whole gradient first.
- BUILT: the cut of `pretrain.model.fast.triton`, whose sum along the blocks and its gradient are 4 bytes a value, as
PyTorch's are under autocast.

Else activations and their gradients are 2 bytes a value. Weights, patch embeddings, the stages' last norms, the head, the optimizer and
the exchange of gradients are left out.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from pretrain.model.van import VARIANTS

BYTES = 2  # a value
STRIDES, MLP_RATIOS = (4, 8, 16, 32), (8, 8, 4, 4)  # of the stages, in all variants


@dataclass(frozen=True)
class Device:
    """What a GPU can do at once: bytes/s of its memory, FLOP/s of large 16-bit matrix products, FLOP/s of its fp32 lanes."""

    bytes_per_s: float
    tensor_flops: float
    core_flops: float


# By the names that CUDA gives. Memory and fp32 are of NVIDIA's data sheets; tensor cores by what large matrix products get out of them,
# about four fifths of the sheet's figure (of a B200: just that, not seen).
DEVICES = {
    r"(NVIDIA )?A100-(SXM4|PCIE)-80GB|NVIDIA A100 80GB PCIe": Device(2.04e12, 270e12, 19.5e12),
    r"NVIDIA H100 80GB HBM3": Device(3.35e12, 750e12, 67e12),
    r"NVIDIA H200": Device(4.8e12, 790e12, 67e12),
    r"NVIDIA B200": Device(8.0e12, 1800e12, 75e12),
}


@dataclass(frozen=True)
class Kernel:
    """Of a block, for each position of its map: `maps` and `wide` are how many values for each channel, and for each channel of the MLP's
    hidden layer, are read and written; `products` multiplies two channels by two, `mlp_products` channels by hidden channels; `taps` and
    `wide_taps` are the multiply-adds of depth-wise convolutions, a value."""

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


EAGER = [
    # Forward. A norm reads its input for the statistics, and again to apply them.
    Kernel("norm1", 3), Kernel("clone", 2), Kernel("proj_1", 2, products=1), Kernel("GELU", 2), Kernel("clone", 2),
    Kernel("conv0", 2, taps=25), Kernel("conv_spatial", 2, taps=49), Kernel("conv1", 2, products=1), Kernel("gate", 3),
    Kernel("proj_2", 2, products=1), Kernel("attention's own shortcut", 3), *_branch_end("attention"),
    Kernel("norm2", 3), Kernel("fc1", 1, 1, mlp_products=1), Kernel("dwconv", wide=2, wide_taps=9), Kernel("GELU", wide=2),
    Kernel("fc2", 1, 1, mlp_products=1), *_branch_end("MLP"),
    # Backward through the MLP; where two gradients of a tensor meet they are added by a kernel.
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
    Kernel("sum at attention's own shortcut", 3), Kernel("gradient of norm1", 5), Kernel("sum at attention's shortcut", 3),
]  # fmt: skip

FUSED = [
    Kernel("norm1, proj_1", 2, products=1),
    Kernel("GELU, conv0", 2, taps=25),
    Kernel("conv_spatial", 2, taps=49),
    Kernel("conv1", 2, products=1),
    # reads the attention map, u's source and the block's input; writes the branch, which the layer scale's gradient wants, and the sum
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
    Kernel("proj_1: input gradient, sum at the own shortcut, norm1's sums", 4, products=1),
    Kernel("proj_1: weight gradient", 2, products=1),
    Kernel("gradient of norm1, sum at the shortcut", 4),
]

# Maps of the sum count twice. From one joint to the next, forward and backward.
BUILT = [
    Kernel("proj_1", 2, products=1), Kernel("GELU", 2), Kernel("conv0", 2, taps=25), Kernel("conv_spatial", 2, taps=49),
    Kernel("conv1", 2, products=1), Kernel("gate", 3), Kernel("proj_2", 2, products=1),
    # reads the sum, the branch and its own shortcut; writes the sum and what is normed
    Kernel("attention's joint, norm2", 7),
    Kernel("fc1", 1, 1, mlp_products=1), Kernel("dwconv, GELU", wide=2, wide_taps=9), Kernel("fc2", 1, 1, mlp_products=1),
    Kernel("MLP's joint, norm1", 6),
    # reads the sum's gradient, those of what is normed, as convolution and shortcut have it, what is normed, and the branch
    Kernel("gradient of the MLP's joint", 9),
    *(Kernel(f"fc2: {of} gradient", 1, 1, mlp_products=1) for of in ("input", "weight")),
    Kernel("gradient of GELU, dwconv again", wide=3, wide_taps=9),
    *(Kernel(f"dwconv: {of} gradient", wide=2, wide_taps=9) for of in ("input", "weight")),
    *(Kernel(f"fc1: {of} gradient", 1, 1, mlp_products=1) for of in ("input", "weight")),
    Kernel("gradient of attention's joint", 9),
    *_products_gradients("proj_2"), Kernel("gradients of the gate", 5), *_products_gradients("conv1"),
    *(Kernel(f"conv_spatial: {of} gradient", 2, taps=49) for of in ("input", "weight")),
    Kernel("conv0: input gradient, sum at u, GELU's gradient", 4, taps=25), Kernel("conv0: weight gradient", 2, taps=25),
    *_products_gradients("proj_1"),
]  # fmt: skip


@dataclass(frozen=True)
class Work:
    """What a kernel does for an image, in all blocks of a stage."""

    bytes: float
    tensor_flops: float
    core_flops: float

    def seconds(self, device: Device) -> float:
        return max(self.bytes / device.bytes_per_s, self.tensor_flops / device.tensor_flops, self.core_flops / device.core_flops)


def work(model_name: str, image_size: int, kernels: Sequence[Kernel]) -> list[Work]:
    """Of each kernel in each stage, for one image. A multiply-add counts as two."""
    found = []
    shape = VARIANTS[model_name]
    for dim, depth, ratio, stride in zip(shape["embed_dims"], shape["depths"], MLP_RATIOS, STRIDES, strict=True):
        hidden, positions = ratio * dim, depth * (-(-image_size // stride)) ** 2
        for kernel in kernels:
            products = kernel.products * dim * dim + kernel.mlp_products * dim * hidden
            taps = kernel.taps * dim + kernel.wide_taps * hidden
            values = kernel.maps * dim + kernel.wide * hidden
            found.append(Work(BYTES * positions * values, 2 * positions * products, 2 * positions * taps))
    return found


def attainable(model_name: str, image_size: int, kernels: Sequence[Kernel], device: Device) -> float:
    """Images a second."""
    return 1 / sum(part.seconds(device) for part in work(model_name, image_size, kernels))


def image_bytes(model_name: str, image_size: int, kernels: Sequence[Kernel]) -> float:
    """Read and written for one image."""
    return sum(part.bytes for part in work(model_name, image_size, kernels))


def by_name(name: str) -> Device | None:
    """What the GPU of that name can do; None for one that is not in the table."""
    return next((device for pattern, device in DEVICES.items() if re.fullmatch(pattern, name)), None)
