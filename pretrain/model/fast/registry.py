"""Finds the fast paths of a model by its class.

paths = find_fast_paths(model)        # None: PyTorch's operators only
paths.use_cpu_path(model)
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from pretrain.model.fast import compiled, cpu, triton
from pretrain.model.fast.cuda_graphs import graph_stages
from pretrain.model.van import VAN


@dataclass(frozen=True)
class FastPaths:
    """The fast paths of a class of models.

    Args:
        why_no_kernels: returns why the Triton kernels can't compute a model on a device, or None if they can.
        use_kernels: makes a model, or one of its blocks, compute by the Triton kernels.
        list_blocks: returns a block of each stage to try the kernels on, with its channels and the reduction of its input.
        compile_blocks: compiles the blocks of a model.
        use_cpu_path: makes a model train by the code that is fastest on a CPU.
        graph_stages: records the stages of a model as CUDA graphs; returns a line for the log.
    """

    why_no_kernels: Callable[..., str | None]
    use_kernels: Callable[[nn.Module], None]
    list_blocks: Callable[[Any], list[tuple[nn.Module, int, int]]]
    compile_blocks: Callable[[nn.Module], None]
    use_cpu_path: Callable[[nn.Module], None]
    graph_stages: Callable[..., str]


def _list_van_blocks(model: VAN) -> list[tuple[nn.Module, int, int]]:
    stages: Any = model.stages
    return [(stage.blocks[-1], info["num_chs"], info["reduction"]) for stage, info in zip(stages, model.feature_info, strict=True)]


FAST_PATHS: dict[type[nn.Module], FastPaths] = {
    VAN: FastPaths(triton.why_unusable, triton.use_triton, _list_van_blocks, compiled.compile_blocks, cpu.use_cpu_path, graph_stages)
}


def find_fast_paths(model: nn.Module) -> FastPaths | None:
    """Returns the fast paths of a model's class, or None if there are none."""
    return next((paths for kind, paths in FAST_PATHS.items() if isinstance(model, kind)), None)
