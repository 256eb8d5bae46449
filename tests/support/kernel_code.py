"""Registers, spills, shared memory and loads of the Triton kernels, compiled for GPUs that need not be present.

rows = measure(["van_b3"], 224, ["bf16"], [90])      # one for each kernel and shape; read from the machine code by Triton's cuobjdump
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.training.layers import Layer, layers
from pretrain.model.fast.triton import attention_device, depthwise_device, residual_device
from pretrain.model.fast.triton.depthwise import conv_constants, launch_options, weight_gradient_constants
from pretrain.model.fast.triton.residual import TILE
from pretrain.model.fast.triton.tiling import WARPS

INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ +)?([A-Z][A-Z0-9_.]*)[^;]*;", re.MULTILINE)  # its name in a listing
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass
class Kernel:
    """One compilation: a kernel with its constants; `pointers` has the type of each pointer argument ("*bf16"), or "" for None."""

    name: str
    function: Any
    constants: dict[str, Any]
    pointers: dict[str, str]
    options: dict[str, Any]


def kernels(layer: Layer, activations: str) -> list[Kernel]:
    """Returns the kernels that a training step compiles for a layer."""
    x = f"*{activations}"
    if not layer.kernel_size:
        return elementwise_kernels(x)
    shape, options = (layer.channels, layer.size, layer.size), launch_options(4 if activations == "fp32" else 2)
    size = f"{layer.kernel_size}x{layer.kernel_size}"

    def conv(part: str, changed: dict[str, str], **how: Any) -> Kernel:
        constants = conv_constants(shape, layer.kernel_size, layer.dilation, **how)
        pointers = {"x": x, "taps": "*fp32", "bias": "*fp32", "grad": "", "inner": "", "y": x, "partial": ""}
        return Kernel(f"{size} {part}", depthwise_device.conv_kernel, constants, pointers | changed, options)

    match layer.gelu:
        case "after":
            result = [conv("forward, GELU", {}, gelu="after"), conv("gradient of GELU", {"grad": x}, gelu="gradient")]
            result.append(conv("input gradient", {"bias": "", "partial": "*fp32"}, flip=True))
        case "before":
            changed = {"bias": "", "grad": x, "inner": x, "partial": "*fp32"}
            result = [conv("forward", {}), conv("input gradient, GELU's", changed, flip=True, gelu="gradient before")]
        case _:
            result = [conv("forward", {}), conv("input gradient", {"bias": ""}, flip=True)]
    constants, pointers = weight_gradient_constants(shape, layer.kernel_size, layer.dilation), {"x": x, "grad": x, "partial": "*fp32"}
    return [*result, Kernel(f"{size} weight gradient", depthwise_device.weight_gradient_kernel, constants, pointers, options)]


def elementwise_kernels(x: str) -> list[Kernel]:
    """Returns the kernels of residual add and gate, whose code is the same for maps of any size."""
    tile = {name: value for name, value in TILE.items() if name.isupper()}
    branch = {"branch": x, "shortcut": x, "scale": "*fp32", "keep": "*fp32"}
    gate = dict.fromkeys(("grad", "x", "attention", "x_grad", "attention_grad"), x) | {"partial": "*fp32"}
    forward, backward = branch | {"x": "*fp32", "y": "*fp32"}, branch | {"grad": "*fp32", "branch_grad": x, "partial": "*fp32"}
    options = {"num_warps": WARPS}
    return [
        Kernel("residual add", residual_device.residual_kernel, tile, forward, options),
        Kernel("residual add, gradients", residual_device.residual_backward_kernel, tile, backward, options),
        Kernel("gate, gradients", attention_device.gate_backward_kernel, tile, gate, options),
    ]


def resources(kernel: Kernel, capability: int) -> dict[str, Any]:
    """Compiles a kernel for a GPU of this compute capability and counts what its machine code contains."""
    names = kernel.function.arg_names
    constants = kernel.constants | {name: None for name, pointer in kernel.pointers.items() if not pointer}
    signature = {n: "constexpr" if n in constants else kernel.pointers.get(n, "i32") for n in names}
    # As in a launch: tensors begin at multiples of 16 bytes, and all widths of VAN are multiples of 16.
    of_16 = [n for n in names if signature[n].startswith("*") or n == "channels"]
    unspecialized = {parameter.name for parameter in kernel.function.params if parameter.do_not_specialize_on_alignment}
    aligned = {(names.index(n),): [["tt.divisibility", 16]] for n in of_16 if n not in unspecialized}
    source = ASTSource(kernel.function, signature, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=kernel.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage, listing = (_run(CUOBJDUMP, option, cubin.name) for option in ("-res-usage", "-sass"))
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage).group(1)) for name in ("REG", "STACK"))  # type: ignore[union-attr]
    code = INSTRUCTION.findall(listing)
    return {
        "registers": registers,
        "stack_bytes": stack,
        "shared_bytes": compiled.metadata.shared,
        "spills": _count(code, r"LDL|STL"),
        "atomics": _count(code, r"ATOM|RED"),
        "loads": _count(code, "LDG"),
        "loads_128_bit": _count(code, r"LDG.*\.128"),
    }


def _count(code: Sequence[str], names: str) -> int:
    return sum(re.match(names, name) is not None for name in code)


def _run(*command: object) -> str:
    return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True).stdout


def measure(models: Sequence[str], image_size: int, types: Sequence[str], capabilities: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Yields a row for each kernel of each layer of the models, type of activations and compute capability."""
    chosen = [replace(layer, count=1) for model in models for layer in layers(model, image_size)]
    for layer in dict.fromkeys(replace(layer, channels=0, size=0) if not layer.kernel_size else layer for layer in chosen):
        for activations in types:
            for kernel in kernels(layer, activations):
                for capability in capabilities:
                    row = {"kernel": kernel.name, "channels": layer.channels, "size": layer.size, "type": activations}
                    yield row | {"capability": capability} | resources(kernel, capability)
