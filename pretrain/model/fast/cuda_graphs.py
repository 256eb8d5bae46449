"""CUDA graphs for the forward and backward passes of VAN's stages: a few host calls per training step instead of thousands.

    message = graph_stages(model, ready, images, partial(CudaGraph, torch.cuda.graph_pool_handle()))   # before the first step

A VAN launches about four thousand kernels per micro-step, most of them short. A graph is the work that one pass of a stage launches,
recorded once and launched as a whole: the same kernels in the same order on the same memory. Each of the four stages has two graphs, so the
gradients of a stage are reduced while earlier stages still compute theirs. Gradients accumulate in static tensors, which become the
parameters' `grad` in a step's first pass. Other input shapes and evaluation use the stage's usual forward.

Stochastic depth draws new numbers in each replay from the device's seeded generator, as without graphs (torch.cuda.graph registers the
generator).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from pretrain.model import van
from pretrain.model.fast import triton

WARM_UP = 3  # passes before recording, in which libraries choose their kernels and compilers compile
TOLERANCE = 0.01  # of the gradients' norm. Some cuDNN weight gradients differ in the last bits between runs; a wrong graph is far off

Pass = Callable[[], tuple[Tensor, ...]]


class CudaGraph:
    """A recorded pass. `replay` recomputes its `results` in place, from the tensors that the pass read.

    Graphs that are replayed in the order in which they were recorded may share a memory `pool`.
    """

    def __init__(self, pool: Any, function: Pass):
        self._graph = torch.cuda.CUDAGraph()
        # thread_local: other threads, such as DALI's, may use the device during the capture.
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self.results = tuple(result.detach() for result in function())

    def replay(self) -> None:
        """Launches the recorded work."""
        self._graph.replay()


class PlainStage(nn.Module):
    """A stage with its original forward, even after the stage's `forward` is replaced."""

    def __init__(self, stage: van.VANStage):
        super().__init__()
        self.stage, self.compute = stage, stage.forward

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, in_chans, H, W) to (N, dim, H / stride, W / stride), rounded up."""
        return self.compute(x)


class GraphedStage:
    """Replaces a stage's `forward` by graphs.

    Args:
        ready: called with the parameters after a backward pass has added to their gradients.
    """

    def __init__(self, stage: van.VANStage, ready: Callable[..., None]):
        self.stage, self.plain, self.ready = stage, PlainStage(stage), ready
        self.parameters = list(stage.parameters())
        self.gradients = [torch.zeros_like(parameter) for parameter in self.parameters]
        # The graphs compute with separate leaves for two reasons. Hooks keep the parameters' autograd nodes alive, with the stream of their
        # first use, and autograd would wait for that stream. And all parameters that autocast casts are cast in one operator.
        casts = _parameters_cast_by_autocast(self.plain, self.parameters[0].device.type)
        self.leaves = {
            name: (torch.empty_like(parameter, dtype=casts[name]) if name in casts else parameter.detach()).requires_grad_()
            for name, parameter in self.plain.named_parameters()
        }
        self.needs_backward = torch.empty(0, device=self.parameters[0].device, requires_grad=True)
        self.cast = [position for position, name in enumerate(self.leaves) if name in casts]

    def compute(self, x: Tensor) -> Tensor:
        """Returns the stage's output, computed from the leaves instead of its parameters."""
        leaves = list(self.leaves.values())
        if self.cast:
            with torch.no_grad():
                torch._foreach_copy_([leaves[i] for i in self.cast], [self.parameters[i] for i in self.cast])
        return cast(Tensor, functional_call(self.plain, self.leaves, (x,)))

    def add(self, leaf_gradients: Sequence[Tensor]) -> None:
        """Adds the gradients of the leaves to `gradients`."""
        added = [gradient.reshape(-1) for gradient in leaf_gradients]  # contiguous: cuDNN returns other layouts
        if self.cast:
            wide = [torch.empty_like(added[i], dtype=self.gradients[i].dtype) for i in self.cast]
            torch._foreach_copy_(wide, [added[i] for i in self.cast])
            for i, gradient in zip(self.cast, wide, strict=True):
                added[i] = gradient
        torch._foreach_add_([gradient.view(-1) for gradient in self.gradients], added)

    def record(self, x: Tensor, needs_gradient: bool, graph: Callable[[Pass], Any]) -> Tensor:
        """Records the forward pass on `x`, which later passes overwrite with their input; returns its output."""
        self.input = x.detach().requires_grad_(needs_gradient)
        self._recorded: Tensor | None = None

        def forward() -> tuple[Tensor]:
            self._recorded = self.compute(self.input)
            return (self._recorded,)

        self._forward = graph(forward)
        self.output: Tensor = self._forward.results[0]
        return self.output

    def record_backward(self, output_gradient: Tensor, graph: Callable[[Pass], Any]) -> Tensor | None:
        """Records the backward pass; returns the input's gradient, or None if the input needs none."""
        self.output_gradient = output_gradient
        leaves = [*([self.input] if self.input.requires_grad else []), *self.leaves.values()]

        def backward() -> tuple[Tensor, ...]:
            gradients = _backward(cast(Tensor, self._recorded), leaves, self.output_gradient)
            self.add(gradients[-len(self.parameters) :])
            return gradients[: len(gradients) - len(self.parameters)]

        self._backward = graph(backward)
        self._recorded = None
        self.input_gradient = next(iter(self._backward.results), None)
        return self.input_gradient

    def __call__(self, x: Tensor) -> Tensor:
        """Maps (N, in_chans, H, W) to (N, dim, H / stride, W / stride), rounded up."""
        if not (self.stage.training and torch.is_grad_enabled() and x.shape == self.input.shape):
            return self.plain.compute(x)
        if self.parameters[0].grad is None:
            torch._foreach_zero_(self.gradients)
            for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
                parameter.grad = gradient
        return cast(Tensor, _Replay.apply(x, self.needs_backward, self))

    def forward_pass(self, x: Tensor) -> Tensor:
        """Replays the forward pass on `x`."""
        _copy(self.input, x)
        self._forward.replay()
        return self.output.detach()

    def backward_pass(self, output_gradient: Tensor) -> Tensor | None:
        """Replays the backward pass; returns the input's gradient."""
        _copy(self.output_gradient, output_gradient)
        self._backward.replay()
        self.ready(*self.parameters)
        return self.input_gradient


class _Replay(torch.autograd.Function):
    """Replays a stage's graphs.

    The leaf `needs_backward` makes autograd call backward even for the first stage, whose input needs no gradient. A parameter can't serve
    as the leaf: autograd would call its hooks, which count gradients.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, needs_backward: Tensor, stage: GraphedStage) -> Tensor:
        ctx.stage = stage
        return stage.forward_pass(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, output_gradient: Tensor) -> tuple[Tensor | None, None, None]:
        return ctx.stage.backward_pass(output_gradient), None, None


def graph_stages(model: van.VAN, ready: Callable[..., None], images: Tensor, graph: Callable[[Pass], Any]) -> str:
    """Records the stages' passes and replaces the stages' forward by the graphs, if they compute the same gradients.

    Call this last: the graphs fix the model's operators and the addresses of its parameters and buffers.

    Args:
        ready: see `GraphedStage`.
        images: (N, 3, H, W), a micro-batch; overwritten here and by every later pass.
        graph: records a pass, as CudaGraph does.

    Returns:
        A line for the log.
    """
    stages = [GraphedStage(cast(van.VANStage, stage), lambda *_: None) for stage in model.stages]
    with _keep(model.buffers()):
        for _ in range(WARM_UP):
            _gradients(stages, images.normal_(), use_leaves=True)
    with _keep(model.buffers()):
        expected = _gradients(stages, images, use_leaves=False)
    with _keep(model.buffers()):
        _record(stages, images, graph)
    with _keep(model.buffers()):
        distance = _distance(stages, images, expected)
    if not distance <= TOLERANCE:  # also if the distance is NaN
        return f"CUDA graphs: none, as their gradients differ by {distance:.1%} from those without"
    for graphed in stages:
        graphed.ready = ready
        graphed.stage.forward = graphed  # type: ignore[method-assign]
    return f"CUDA graphs: {len(stages)} stages, forward and backward"


def remove_graphs(model: van.VAN) -> None:
    """Undoes `graph_stages`; the parameters keep their gradients."""
    for stage in model.stages:
        vars(stage).pop("forward", None)


def _gradients(stages: Sequence[GraphedStage], x: Tensor, *, use_leaves: bool) -> list[Tensor]:
    """Returns the gradients of all leaves or all parameters, computed without graphs for a random output gradient."""
    torch.manual_seed(0)
    for graphed in stages:
        x = graphed.compute(x) if use_leaves else graphed.plain.compute(x)
    leaves = [tensor for graphed in stages for tensor in (graphed.leaves.values() if use_leaves else graphed.parameters)]
    return list(_backward(x, leaves, _draw_gradient(x)))


def _backward(output: Tensor, leaves: Sequence[Tensor], gradient: Tensor) -> tuple[Tensor, ...]:
    """Returns the leaves' gradients, computed without autocast, as in a training step: autocast would cast sums of gradients."""
    with torch.autocast(output.device.type, enabled=False):
        return torch.autograd.grad([output], leaves, [gradient])


def _record(stages: Sequence[GraphedStage], x: Tensor, graph: Callable[[Pass], Any]) -> None:
    for graphed in stages:
        x = graphed.record(x, graphed is not stages[0], graph)
    gradient: Tensor | None = torch.empty_like(x)
    for graphed in reversed(stages):
        assert gradient is not None
        gradient = graphed.record_backward(gradient, graph)


def _distance(stages: Sequence[GraphedStage], x: Tensor, expected: list[Tensor]) -> float:
    """Returns the norm of the difference between the graphs' gradients and `expected`, relative to the norm of the graphs' gradients."""
    torch.manual_seed(0)
    torch._foreach_zero_([gradient for graphed in stages for gradient in graphed.gradients])
    for graphed in stages:
        x = graphed.forward_pass(x)
    gradient: Tensor | None = _draw_gradient(x)
    for graphed in reversed(stages):
        assert gradient is not None
        gradient = graphed.backward_pass(gradient)
    gradients = [gradient for graphed in stages for gradient in graphed.gradients]
    torch._foreach_sub_(expected, gradients)
    return float(torch.nn.utils.get_total_norm(expected) / torch.nn.utils.get_total_norm(gradients))


def _draw_gradient(y: Tensor) -> Tensor:
    return torch.randn(y.shape, generator=torch.Generator(y.device).manual_seed(1), device=y.device).to(y.dtype)


@contextmanager
def _keep(tensors: Iterator[Tensor]) -> Iterator[None]:
    """Restores the values of these tensors on exit."""
    before = [(tensor, tensor.clone()) for tensor in tensors]
    yield
    for tensor, values in before:
        tensor.copy_(values)


def _copy(to: Tensor, tensor: Tensor) -> None:
    """Copies `tensor` to `to`, unless they share memory, as the output of one stage and the input of the next do."""
    if to.data_ptr() != tensor.data_ptr():
        with torch.no_grad():
            to.copy_(tensor)


def _parameters_cast_by_autocast(module: nn.Module, device_type: str) -> dict[str, torch.dtype]:
    """Returns the type to which autocast casts parameters, by name: convolutions', and in Triton blocks the matrix weights'."""
    if not torch.is_autocast_enabled(device_type):
        return {}
    dtype = torch.get_autocast_dtype(device_type)
    casts: dict[str, torch.dtype] = {}
    kernel_blocks = {name: block for name, block in module.named_modules() if isinstance(block, triton.Block)}
    for name, block in kernel_blocks.items():
        casts |= {f"{name}.{weight}": dtype for weight in block.matrix_weights}
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Conv2d) and not name.startswith(tuple(f"{block}." for block in kernel_blocks)):
            casts |= {f"{name}.weight": dtype, f"{name}.bias": dtype}
    return casts
