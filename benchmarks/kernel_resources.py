"""Registers, spills, shared memory and loads of the Triton kernels, compiled for GPUs that need not be there.

    python -m benchmarks.kernel_resources [--capability 80 90 100] [--type bf16 fp16 fp32] [--image-size 224 384]

Compiles what every shape of VAN-B3 to B6 takes, and reads it off the machine code with the cuobjdump that comes with
Triton. Shapes that share a kernel are one row. The result goes to benchmarks/results/kernel_resources.json.
"""

import argparse
import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pretrain.kernels import depthwise, device
from pretrain.kernels.residual import TILE
from pretrain.kernels.tiling import WARPS

RESULT = Path(__file__).parent / "results" / "kernel_resources.json"
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
STRIDES = (4, 8, 16, 32)  # of the stages
LAYERS = ((3, 1), (5, 1), (7, 3))  # kernel size and dilation


@dataclass
class Kernel:
    """One compilation: a kernel with its constants, and the layers and maps that take it."""

    function: Any
    constants: dict[str, Any]
    pointers: dict[str, str]  # of each pointer argument, "*bf16" and the like; "" for None
    options: dict[str, Any]
    layers: list[str] = field(default_factory=list)
    maps: list[int] = field(default_factory=list)


def kernels(activations: str, image_sizes: Sequence[int] = (224, 384)) -> list[Kernel]:
    """All that the models take, for activations of one type; each once."""
    found: dict[str, Kernel] = {}
    for layer, size, kernel in _uses(f"*{activations}", image_sizes):
        known = found.setdefault(repr((kernel.function, kernel.constants, kernel.pointers)), kernel)
        known.layers += [layer] * (layer not in known.layers)
        known.maps += [size] * (size not in known.maps)
    return list(found.values())


def _uses(x: str, image_sizes: Sequence[int]) -> Iterator[tuple[str, int, Kernel]]:
    options = depthwise.launch_options(4 if x == "*fp32" else 2)
    for size in sorted((image_size // stride for image_size in image_sizes for stride in STRIDES), reverse=True):
        for k, dilation in LAYERS:
            name = f"{k}x{k}" + (f" dilation {dilation}" if dilation > 1 else "")
            forward = {"x": x, "taps": "*fp32", "bias": "*fp32", "grad": "", "y": x}
            after, derivative = ("after", "derivative") if k == 3 else ("", "")
            for part, changes, pointers in (
                ("forward" + (", GELU" if k == 3 else ""), {"gelu": after}, {}),
                ("input gradient", {"flip": True}, {"bias": ""}),
                ("gradient of GELU", {"gelu": derivative}, {"grad": x}),
            ):
                if part != "gradient of GELU" or derivative:
                    constants = depthwise.conv_constants(size, k, dilation, **changes)  # type: ignore[arg-type]
                    yield f"{name} {part}", size, Kernel(device.conv_kernel, constants, forward | pointers, options)
            constants = depthwise.weight_gradient_constants(size, k, dilation)
            pointers = {"x": x, "grad": x, "partial": "*fp32"}
            yield f"{name} weight gradient", size, Kernel(device.weight_gradient_kernel, constants, pointers, options)
        tile = {name: value for name, value in TILE.items() if name.isupper()}
        both = {"branch": x, "scale": "*fp32", "keep": "*fp32"}
        forward, backward = {"x": "*fp32", "y": "*fp32"}, {"grad": "*fp32", "branch_grad": x, "partial": "*fp32"}
        for part, function, pointers in (
            ("forward", device.residual_kernel, both | forward),
            ("backward", device.residual_backward_kernel, both | backward),
        ):
            yield f"shortcut {part}", size, Kernel(function, tile, pointers, {"num_warps": WARPS})


def resources(kernel: Kernel, capability: int) -> dict[str, Any]:
    """Compiles for a GPU of this compute capability, and counts what is in the machine code."""
    names = kernel.function.arg_names
    constants = kernel.constants | {name: None for name, pointer in kernel.pointers.items() if not pointer}
    signature = {n: "constexpr" if n in constants else kernel.pointers.get(n, "i32") for n in names}
    # What a launch finds too: tensors begin at multiples of 16 bytes, and all widths of VAN are multiples of 16.
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n].startswith("*") or n == "channels"}
    source = ASTSource(kernel.function, signature, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=kernel.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage, code = (_output(CUOBJDUMP, option, cubin.name) for option in ("-res-usage", "-sass"))
    registers, stack = (int(re.search(rf"{what}:(\d+)", usage).group(1)) for what in ("REG", "STACK"))  # type: ignore[union-attr]
    count = Counter(re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][A-Z0-9_.]*)", code, flags=re.MULTILINE))
    loads = {width: sum(n for op, n in count.items() if op.startswith("LDG") and f".{width}" in op) for width in (64, 128)}
    return {
        "registers": registers,
        "stack_bytes": stack,
        "spills": sum(n for op, n in count.items() if op.split(".")[0] in ("LDL", "STL")),
        "atomics": sum(n for op, n in count.items() if op.startswith(("ATOM", "RED"))),
        "shared_bytes": compiled.metadata.shared,
        "loads": sum(n for op, n in count.items() if op.startswith("LDG")),
        "loads_128_bit": loads[128],
        "multiply_adds": sum(n * (2 if op.startswith("FFMA2") else 1) for op, n in count.items() if op.startswith("FFMA")),
        "instructions": sum(count.values()),
    }


def _output(*command: object) -> str:
    return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--capability", type=int, nargs="+", default=[80, 90, 100])
    parser.add_argument("--type", nargs="+", choices=("bf16", "fp16", "fp32"), default=["bf16"])
    parser.add_argument("--image-size", type=int, nargs="+", default=[224, 384])
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    rows = []
    for activations in args.type:
        for kernel in kernels(activations, args.image_size):
            for capability in args.capability:
                found = resources(kernel, capability)
                rows.append({"layers": kernel.layers, "maps": kernel.maps, "type": activations, "capability": capability, **found})
                print(
                    f"sm_{capability} {activations} {' / '.join(kernel.layers):36} {kernel.maps!s:24} {found['registers']:3} registers  "
                    f"{found['spills']} spills  {found['shared_bytes']:5} B shared  "
                    f"{found['loads_128_bit']} of {found['loads']} loads of 16 B",
                    flush=True,
                )
    args.out.write_text(json.dumps({"triton": triton.__version__, "threads": 32 * WARPS, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
