"""Registers, spills, shared memory and loads of the Triton kernels, compiled for GPUs that need not be there.

    python -m benchmarks.training.kernel_resources [--model van_b3 …] [--image-size 224] [--type bf16 …] [--capability 80 90 100]

Compiles what every layer of the models takes (VAN-B3 to B6 unless some are named), each shape once, and reads it off the machine code with
the cuobjdump that comes with Triton. The result goes to benchmarks/results/kernel_resources.json.
"""

import argparse
import json
import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass, replace
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

RESULT = Path(__file__).parents[1] / "results" / "kernel_resources.json"
# A line of a listing: address, name behind a predicate, operands.
INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ +)?([A-Z][A-Z0-9_.]*)([^;]*);", re.MULTILINE)
Code = list[tuple[int, str, str]]
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass
class Kernel:
    """One compilation: a kernel with its constants."""

    part: str
    function: Any
    constants: dict[str, Any]
    pointers: dict[str, str]  # of each pointer argument, "*bf16" and the like; "" for None
    options: dict[str, Any]


def kernels(layer: Layer, activations: str) -> list[Kernel]:
    """All that a training step compiles for a layer."""
    x = f"*{activations}"
    if not layer.kernel_size:
        return residual_kernels(x)
    shape, options = (layer.channels, layer.size, layer.size), launch_options(4 if activations == "fp32" else 2)
    pointers = {"x": x, "taps": "*fp32", "bias": "*fp32", "grad": "", "inner": "", "y": x, "partial": ""}

    def conv(part: str, changed: dict[str, str], **how: Any) -> Kernel:
        constants = conv_constants(shape, layer.kernel_size, layer.dilation, **how)
        return Kernel(part, depthwise_device.conv_kernel, constants, pointers | changed, options)

    match layer.gelu:
        case "after":
            found = [conv("forward, GELU", {}, gelu="after"), conv("gradient of GELU", {"grad": x}, gelu="gradient")]
            found.append(conv("input gradient", {"bias": "", "partial": "*fp32"}, flip=True))
        case "before":
            changed = {"bias": "", "grad": x, "inner": x, "partial": "*fp32"}
            found = [conv("forward", {}), conv("input gradient, GELU's", changed, flip=True, gelu="gradient before")]
        case _:
            found = [conv("forward", {}), conv("input gradient", {"bias": ""}, flip=True)]
    constants = weight_gradient_constants(shape, layer.kernel_size, layer.dilation)
    found.append(
        Kernel("weight gradient", depthwise_device.weight_gradient_kernel, constants, {"x": x, "grad": x, "partial": "*fp32"}, options)
    )
    return found


def residual_kernels(x: str) -> list[Kernel]:
    """Returns the kernels whose code is the same for maps of any size: a residual add with a shortcut, and the gate."""
    tile = {name: value for name, value in TILE.items() if name.isupper()}
    vector = sum_ = "*fp32"
    branches = {"branch": x, "shortcut": x, "scale": vector, "keep": vector}
    gate = dict.fromkeys(("grad", "x", "attention", "x_grad", "attention_grad"), x) | {"partial": vector}
    return [
        Kernel(part, function, tile, pointers, {"num_warps": WARPS})
        for part, function, pointers in (
            ("residual add", residual_device.residual_kernel, branches | {"x": sum_, "y": sum_}),
            ("gradients", residual_device.residual_backward_kernel, branches | {"grad": sum_, "branch_grad": x, "partial": vector}),
            ("gate's gradients", attention_device.gate_backward_kernel, gate),
        )
    ]


def resources(kernel: Kernel, capability: int) -> dict[str, Any]:
    """Compiles for a GPU of this compute capability, and counts what is in the machine code."""
    names = kernel.function.arg_names
    constants = kernel.constants | {name: None for name, pointer in kernel.pointers.items() if not pointer}
    signature = {n: "constexpr" if n in constants else kernel.pointers.get(n, "i32") for n in names}
    # What a launch finds too: tensors begin at multiples of 16 bytes, where a kernel asks, and all widths of VAN are multiples of 16.
    of_16 = [n for n in names if signature[n].startswith("*") or n == "channels"]
    unasked = {parameter.name for parameter in kernel.function.params if parameter.do_not_specialize_on_alignment}
    aligned = {(names.index(n),): [["tt.divisibility", 16]] for n in of_16 if n not in unasked}
    source = ASTSource(kernel.function, signature, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=kernel.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage, listing = (_output(CUOBJDUMP, option, cubin.name) for option in ("-res-usage", "-sass"))
    registers, stack = (int(re.search(rf"{what}:(\d+)", usage).group(1)) for what in ("REG", "STACK"))  # type: ignore[union-attr]
    code = [(int(at, 16), name, rest) for at, name, rest in INSTRUCTION.findall(listing)]
    loop = _loop(code)
    return {
        "registers": registers,
        "stack_bytes": stack,
        "shared_bytes": compiled.metadata.shared,
        "spills": _count(code, r"LDL|STL"),
        "atomics": _count(code, r"ATOM|RED"),
        "loads": _count(code, "LDG"),
        "loads_128_bit": _count(code, r"LDG.*\.128"),
        "instructions": len(code),
        "multiply_adds": _multiply_adds(code),
        "loop_instructions": len(loop),
        "loop_multiply_adds": _multiply_adds(loop),
        "instructions_a_value": _per_value(kernel.constants, len(loop), len(code)),
    }


def _per_value(constants: dict[str, Any], loop: int, code: int) -> float | None:
    """Instructions that a convolution runs for a value of the map, on one lane of one warp; eight channels share each.

    The loop runs once for each of the kernel's columns: in one lane, or in the weight gradient, where what stands outside of the loop is
    run once for many strips, on lanes beside each other.
    """
    if "R" not in constants:
        return None
    h, w, k, d, rows = (constants[name] for name in "HWKDR")
    computed = rows * constants["STRIPS"] * d / h  # rows, those beyond the map too
    if "COLUMNS" in constants:
        return computed * loop * constants["COLUMNS"] / (8 * rows)
    columns = 2 * min(k // 2, (w - 1) // d) + 1
    return computed * (loop * columns + code - loop) / (8 * rows)


def _loop(code: Code) -> Code:
    """The instructions of the loop that multiplies and adds most; none where all was unrolled."""
    places = {at: i for i, (at, _, _) in enumerate(code)}
    loops: list[Code] = [[]]
    for i, (_, name, rest) in enumerate(code):
        target = re.search(r"0x([0-9a-f]+)", rest) if name.startswith("BRA") else None
        if target and places.get(int(target.group(1), 16), i) < i:
            loops.append(code[places[int(target.group(1), 16)] : i + 1])
    return max(loops, key=_multiply_adds)


def _count(code: Code, names: str) -> int:
    return sum(re.match(names, name) is not None for _, name, _ in code)


def _multiply_adds(code: Code) -> int:
    return _count(code, "FFMA") + _count(code, "FFMA2")  # the latter, of Blackwell, does two


def _output(*command: object) -> str:
    return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True).stdout


def _line(row: dict[str, Any]) -> str:
    return (
        f"{row['registers']:3} registers  {row['spills']} spills  {row['shared_bytes']:4} B shared  "
        f"{row['loads_128_bit']} of {row['loads']} loads of 16 B  "
        f"{row['loop_multiply_adds']} multiply-adds in the loop's {row['loop_instructions']} instructions"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["van_b3", "van_b4", "van_b5", "van_b6"])
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--type", nargs="+", choices=("bf16", "fp16", "fp32"), default=["bf16"])
    parser.add_argument("--capability", type=int, nargs="+", default=[80, 90, 100])
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    chosen = [replace(layer, count=1) for model in args.model for layer in layers(model, args.image_size)]
    rows = []
    for layer in dict.fromkeys(chosen):
        for activations in args.type:
            for kernel in kernels(layer, activations):
                for capability in args.capability:
                    row = {**asdict(layer), "part": kernel.part, "type": activations, "capability": capability}
                    row |= resources(kernel, capability)
                    rows.append(row)
                    print(f"{layer!s:38} {kernel.part:16} {activations} sm_{capability:3}  {_line(row)}", flush=True)
    lines = ",\n".join(json.dumps(row) for row in rows)
    args.out.write_text(f'{{"triton": "{triton.__version__}", "threads": {32 * WARPS}, "rows": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
