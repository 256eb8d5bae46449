"""The faster ways that exist for a model, found by its class.

ways = find_ways(model)        # None: PyTorch's operators are the only way
ways.use_cpu_way(model)
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from pretrain.model.fast import compiled, cpu, triton
from pretrain.model.fast.cuda_graphs import graph_stages
from pretrain.model.van import VAN


@dataclass(frozen=True)
class Ways:
    """The faster ways of a class of models.

    Args:
        why_no_kernels: returns why Triton's kernels can't compute a model on a device, or None if they can.
        use_kernels: makes a model, or one of its blocks, compute by Triton's kernels.
        list_blocks: returns a block of each stage, with the channels and the reduction of its input, to try the kernels on.
        compile_blocks: compiles the blocks of a model.
        use_cpu_way: makes a model compute in the way that is fastest on a CPU.
        graph_stages: records the stages of a model as CUDA graphs; returns a line for the log.
    """

    why_no_kernels: Callable[..., str | None]
    use_kernels: Callable[[nn.Module], None]
    list_blocks: Callable[[Any], list[tuple[nn.Module, int, int]]]
    compile_blocks: Callable[[nn.Module], None]
    use_cpu_way: Callable[[nn.Module], None]
    graph_stages: Callable[..., str]


def _list_van_blocks(model: VAN) -> list[tuple[nn.Module, int, int]]:
    stages: Any = model.stages
    return [(stage.blocks[-1], info["num_chs"], info["reduction"]) for stage, info in zip(stages, model.feature_info, strict=True)]


WAYS: dict[type[nn.Module], Ways] = {
    VAN: Ways(triton.why_unusable, triton.use_triton, _list_van_blocks, compiled.compile_blocks, cpu.use_cpu_way, graph_stages)
}


def find_ways(model: nn.Module) -> Ways | None:
    """Returns the faster ways of a model's class, or None if there are none."""
    return next((ways for kind, ways in WAYS.items() if isinstance(model, kind)), None)
