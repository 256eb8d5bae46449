"""The stages' forward and backward passes as CUDA graphs, so that a training step costs the host a few calls and not thousands.

    log.line(use_graphs(engine, config))     # before the first step

A VAN launches some four thousand kernels in a micro-step, most of them short (`python -m benchmarks.training.host`). A
graph is what one pass of a
stage launches, recorded once and then started as a whole: same kernels, same order, same memory. Each of the four stages has two, so that
the gradients of a stage are reduced beside the backward pass of those in front of it. Gradients are added up in tensors that stay, which
become the parameters' `grad` at a step's first pass. What is not a micro-batch's training pass goes the ordinary way: other shapes,
evaluation.

Drop path draws anew in each pass, from the generator of the device and its seed, as without graphs (torch.cuda.graph registers it).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from pretrain.config import Config
from pretrain.engine.precision import DTYPES
from pretrain.model.van import VAN, VANStage

WARM_UP = 3  # passes before recording, in which libraries choose their kernels, and compilers compile
TOLERANCE = 0.01  # of the gradients' norm. Some of cuDNN's weight gradients are not the same in every bit twice; a wrong graph is far off

Pass = Callable[[], tuple[Tensor, ...]]


class CudaGraph:
    """Results of a pass, in memory that stays, and what computes them again from what is then in the tensors that it read. Graphs that
    run in the order in which they were recorded may share a `pool` of memory."""

    def __init__(self, pool: Any, function: Pass):
        self._graph = torch.cuda.CUDAGraph()
        # thread_local: what other threads do meanwhile, as DALI's, is not forbidden.
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self.results = tuple(result.detach() for result in function())

    def replay(self) -> None:
        self._graph.replay()


class Plain(nn.Module):
    """A stage's own forward, also where another one stands in its place."""

    def __init__(self, stage: VANStage):
        super().__init__()
        self.stage, self.compute = stage, stage.forward

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_chans, H, W) to (N, dim, H / stride, W / stride), rounded up."""
        return self.compute(x)


class GraphedStage:
    """Takes the place of a stage's `forward`.

    Args:
        ready: to be told of the parameters when a backward pass has added to their gradients.
    """

    def __init__(self, stage: VANStage, ready: Callable[..., None]):
        self.stage, self.plain, self.ready = stage, Plain(stage), ready
        self.parameters = list(stage.parameters())
        self.gradients = [torch.zeros_like(parameter) for parameter in self.parameters]
        # What is computed with. Hooks keep the parameters' own nodes in autograd's graphs alive, with the stream of their first use, which
        # would wait for others; and those that autocast would cast, one by one, are cast all at once.
        casts = _cast_by_autocast(self.plain, self.parameters[0].device.type)
        self.leaves = {
            name: (torch.empty_like(parameter, dtype=casts[name]) if name in casts else parameter.detach()).requires_grad_()
            for name, parameter in self.plain.named_parameters()
        }
        self.wants_gradient = torch.empty(0, device=self.parameters[0].device, requires_grad=True)
        self.cast = [place for place, name in enumerate(self.leaves) if name in casts]

    def compute(self, x: Tensor) -> Tensor:
        """What is recorded: the stage with the leaves for its parameters."""
        leaves = list(self.leaves.values())
        if self.cast:
            with torch.no_grad():
                torch._foreach_copy_([leaves[place] for place in self.cast], [self.parameters[place] for place in self.cast])
        return cast(Tensor, functional_call(self.plain, self.leaves, (x,)))

    def add(self, gradients: Sequence[Tensor]) -> None:
        """To `gradients`, those of the leaves."""
        added = [gradient.reshape(-1) for gradient in gradients]  # in one order, as cuDNN has its own
        if self.cast:
            wide = [torch.empty_like(added[place], dtype=self.gradients[place].dtype) for place in self.cast]
            torch._foreach_copy_(wide, [added[place] for place in self.cast])
            for place, gradient in zip(self.cast, wide, strict=True):
                added[place] = gradient
        torch._foreach_add_([gradient.view(-1) for gradient in self.gradients], added)

    def record(self, x: Tensor, needs_gradient: bool, graph: Callable[[Pass], Any]) -> Tensor:
        """Records the forward pass on `x`, where the inputs of later passes are to be too; returns its output."""
        self.input = x.detach().requires_grad_(needs_gradient)
        self._made: Tensor | None = None

        def forward() -> tuple[Tensor]:
            self._made = self.compute(self.input)
            return (self._made,)

        self._forward = graph(forward)
        self.output: Tensor = self._forward.results[0]
        return self.output

    def record_backward(self, output_gradient: Tensor, graph: Callable[[Pass], Any]) -> Tensor | None:
        """Likewise; returns the input's gradient, where it needs one."""
        self.output_gradient = output_gradient
        leaves = [*([self.input] if self.input.requires_grad else []), *self.leaves.values()]

        def backward() -> tuple[Tensor, ...]:
            found = _backward(cast(Tensor, self._made), leaves, self.output_gradient)
            self.add(found[-len(self.parameters) :])
            return found[: len(found) - len(self.parameters)]

        self._backward = graph(backward)
        self._made = None
        self.input_gradient = next(iter(self._backward.results), None)
        return self.input_gradient

    def __call__(self, x: Tensor) -> Tensor:
        """(N, in_chans, H, W) to (N, dim, H / stride, W / stride), rounded up."""
        if not (self.stage.training and torch.is_grad_enabled() and x.shape == self.input.shape):
            return self.plain.compute(x)
        if self.parameters[0].grad is None:
            torch._foreach_zero_(self.gradients)
            for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
                parameter.grad = gradient
        return cast(Tensor, _Replayed.apply(x, self.wants_gradient, self))

    def forward_pass(self, x: Tensor) -> Tensor:
        _copy(self.input, x)
        self._forward.replay()
        return self.output.detach()

    def backward_pass(self, output_gradient: Tensor) -> Tensor | None:
        _copy(self.output_gradient, output_gradient)
        self._backward.replay()
        self.ready(*self.parameters)
        return self.input_gradient


class _Replayed(torch.autograd.Function):
    """Takes a tensor that wants a gradient, so that there is a backward pass where the input, as the first stage's, wants none. It is none
    of the parameters, as of these autograd would tell their hooks, which count."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, wants_gradient: Tensor, stage: GraphedStage) -> Tensor:
        ctx.stage = stage
        return stage.forward_pass(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, output_gradient: Tensor) -> tuple[Tensor | None, None, None]:
        return ctx.stage.backward_pass(output_gradient), None, None


def _cast_by_autocast(module: nn.Module, device_type: str) -> dict[str, torch.dtype]:
    """To which type autocast, if it is on, casts which parameters: those of convolutions that no kernel reads as they are. A bias whose
    gradient kernels sum is left to autocast, so that the sum stays fp32."""
    if not torch.is_autocast_enabled(device_type):
        return {}
    dtype = torch.get_autocast_dtype(device_type)
    casts: dict[str, torch.dtype] = {}
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Conv2d) and not getattr(layer, "triton", False):
            kinds = ("weight",) if getattr(layer, "by_linear", False) else ("weight", "bias")
            casts |= {f"{name}.{kind}": dtype for kind in kinds}
    return casts


def _copy(to: Tensor, tensor: Tensor) -> None:
    """Unless it lies there already, as what the stage beside this one has made does."""
    if to.data_ptr() != tensor.data_ptr():
        with torch.no_grad():
            to.copy_(tensor)


def use_graphs(engine: Any, config: Config) -> str:
    """Records the stages of an engine's model and puts the graphs in their place; returns a line for the log. To be called when all else is
    decided of how the model computes, and where its parameters and buffers lie."""
    if engine.device.type != "cuda":
        return f"graphs: none on a {engine.device.type}"
    size, precision = config.data.image_size, DTYPES[config.engine.precision]
    images = torch.empty(config.engine.micro_batch, 3, size, size, device=engine.device).to(memory_format=torch.channels_last)
    # The weights that autocast keeps once it has cast them would not be cast again by a graph.
    with torch.autocast("cuda", precision, enabled=precision is not torch.float32, cache_enabled=False):
        return graph_stages(engine.module, engine.reductions.mark_ready, images, partial(CudaGraph, torch.cuda.graph_pool_handle()))


def graph_stages(model: VAN, ready: Callable[..., None], images: Tensor, graph: Callable[[Pass], Any]) -> str:
    """`use_graphs` with the parts of an engine: `images` (N, 3, H, W) are overwritten, and hold those of all later passes. What the graphs
    compute is compared with what the stages do; where that differs, the model is left as it was."""
    stages = [GraphedStage(cast(VANStage, stage), lambda *_: None) for stage in model.stages]
    with _kept(model.buffers()):
        for _ in range(WARM_UP):
            _gradients(stages, images.normal_(), recorded=True)
    # Each from the same running statistics: Triton's kernels norm by them, and round what they have normed.
    with _kept(model.buffers()):
        expected = _gradients(stages, images, recorded=False)
    with _kept(model.buffers()):
        _record(stages, images, graph)
    with _kept(model.buffers()):
        distance = _distance(stages, images, expected)
    if not distance <= TOLERANCE:  # what is not a number is wrong
        return f"graphs: none, as their gradients differ from those without by {distance:.1%}"
    for one in stages:
        one.ready = ready
        one.stage.forward = one  # type: ignore[method-assign]
    return f"graphs: {len(stages)} stages, forward and backward"


def _gradients(stages: Sequence[GraphedStage], x: Tensor, *, recorded: bool) -> list[Tensor]:
    """Of all parameters, from a drawn gradient of the last output, without graphs: by what is `recorded`, or by the stages' own forward."""
    torch.manual_seed(0)
    for one in stages:
        x = one.compute(x) if recorded else one.plain.compute(x)
    parameters = [tensor for one in stages for tensor in (one.leaves.values() if recorded else one.parameters)]
    return list(_backward(x, parameters, _drawn(x)))


def _backward(output: Tensor, leaves: Sequence[Tensor], gradient: Tensor) -> tuple[Tensor, ...]:
    """The leaves' gradients. Outside of autocast, as a step's backward pass is: within, sums of gradients would be cast."""
    with torch.autocast(output.device.type, enabled=False):
        return torch.autograd.grad([output], leaves, [gradient])


def _record(stages: Sequence[GraphedStage], x: Tensor, graph: Callable[[Pass], Any]) -> None:
    for one in stages:
        x = one.record(x, one is not stages[0], graph)
    gradient: Tensor | None = torch.empty_like(x)
    for one in reversed(stages):
        assert gradient is not None
        gradient = one.record_backward(gradient, graph)


def _distance(stages: Sequence[GraphedStage], x: Tensor, expected: list[Tensor]) -> float:
    """Between the gradients of the graphs and others, of the latter's norm."""
    torch.manual_seed(0)
    torch._foreach_zero_([gradient for one in stages for gradient in one.gradients])
    for one in stages:
        x = one.forward_pass(x)
    gradient: Tensor | None = _drawn(x)
    for one in reversed(stages):
        assert gradient is not None
        gradient = one.backward_pass(gradient)
    torch._foreach_sub_(expected, [gradient for one in stages for gradient in one.gradients])
    return float(torch.nn.utils.get_total_norm(expected) / torch.nn.utils.get_total_norm([g for one in stages for g in one.gradients]))


def _drawn(y: Tensor) -> Tensor:
    return torch.randn(y.shape, generator=torch.Generator(y.device).manual_seed(1), device=y.device).to(y.dtype)


@contextmanager
def _kept(tensors: Iterator[Tensor]) -> Iterator[None]:
    """What these hold is the same afterwards."""
    before = [(tensor, tensor.clone()) for tensor in tensors]
    yield
    for tensor, values in before:
        tensor.copy_(values)
