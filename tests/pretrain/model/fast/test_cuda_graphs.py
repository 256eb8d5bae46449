"""Stages as graphs, with a substitute that a CPU can run: it computes a pass again, into the tensors that hold the first results.

test_engine.py holds that training is the same bit for bit, with two ranks, accumulation and stochastic depth; test_on_gpu.py that CUDA
could capture the passes, as far as that can be known without a GPU.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain.model.fast import cuda_graphs as graphs
from pretrain.model.fast import triton
from pretrain.model.fast.cuda_graphs import CudaGraph, Pass, graph_stages, remove_graphs
from pretrain.model.van import VAN


class Rerun:
    def __init__(self, function: Pass):
        self.function = function
        self.results = tuple(result.detach().clone() for result in function())

    def replay(self) -> None:
        with torch.enable_grad():  # a replay runs inside of an autograd function, where it is off
            results = self.function()
        for result, again in zip(self.results, results, strict=True):
            result.copy_(again.detach())


class Stale(Rerun):
    """A graph that reads from other memory than later passes write to."""

    def replay(self) -> None:
        pass


def narrow() -> VAN:
    torch.manual_seed(0)
    return VAN(num_classes=4, embed_dims=(8, 16, 24, 32), depths=(1, 1, 2, 1), drop_path_rate=0.3).train()


def images(count: int) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(count)).to(memory_format=torch.channels_last)


def gradients(model: VAN, *batches: Tensor, bf16: bool = False) -> list[Tensor]:
    torch.manual_seed(3)
    for batch in batches:
        with torch.autocast(batch.device.type, torch.bfloat16, enabled=bf16):
            loss = model(batch).square().mean()
        loss.backward()
    result = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    return result


def graphed(graph: Callable[[Pass], Rerun] = Rerun, model: VAN | None = None) -> tuple[VAN, str, list[Tensor]]:
    """Returns a model with graphs for four images, the log line, and a list of the parameters whose gradients were reported."""
    model, ready = model or narrow(), list[Tensor]()
    return model, graph_stages(model, lambda *parameters: ready.extend(parameters), torch.empty_like(images(4)), graph), ready


def test_gradients_accumulate_over_micro_steps_and_restart_with_each_step() -> None:
    model, _, _ = graphed()
    for batches in ([images(4)], [images(4), images(4) + 1], [images(4) * 2]):
        for recorded, plain in zip(gradients(model, *batches), gradients(narrow(), *batches), strict=True):
            torch.testing.assert_close(recorded, plain, rtol=0, atol=0)


def test_weights_are_cast_as_autocast_casts_them() -> None:
    """All weights in one operator."""
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        model, line, _ = graphed()
    assert line == "CUDA graphs: 4 stages, forward and backward"
    actual, expected = gradients(model, images(4), bf16=True), gradients(narrow(), images(4), bf16=True)
    for (name, _), ours, plain in zip(model.named_parameters(), actual, expected, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, plain, rtol=0, atol=0, msg=name)


@pytest.mark.full
def test_with_kernels_they_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, in the interpreter: sums that kernels compute in fp32 stay fp32."""
    monkeypatch.setattr(graphs, "WARM_UP", 1)

    def by_kernels() -> VAN:
        torch.manual_seed(0)
        model = VAN(num_classes=4, embed_dims=(8,), depths=(2,), mlp_ratios=(2,), drop_path_rate=0.3).train()
        triton.use_triton(model)
        return model

    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        model, line, _ = graphed(model=by_kernels())
    assert line == "CUDA graphs: 1 stages, forward and backward"
    actual, expected = gradients(model, images(4), bf16=True), gradients(by_kernels(), images(4), bf16=True)
    for (name, _), one, other in zip(model.named_parameters(), actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, msg=name)


def test_backward_passes_are_recorded_outside_of_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step's backward passes run there too."""
    within, grad = [], torch.autograd.grad

    def watch(*arguments: Any) -> tuple[Tensor, ...]:
        within.append(torch.is_autocast_enabled("cpu"))
        return grad(*arguments)

    monkeypatch.setattr(torch.autograd, "grad", watch)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        graphed()
    assert within == [False] * (3 + 1 + 4 + 4)  # warm-up, without graphs, recording, replay


def test_batches_of_other_sizes_and_evaluation_use_the_plain_stages() -> None:
    model, _, _ = graphed()
    batches = [images(4), images(3), images(4) + 1]
    for recorded, plain in zip(gradients(model, *batches), gradients(narrow(), *batches), strict=True):
        torch.testing.assert_close(recorded, plain, rtol=0, atol=0)
    model, plain_model = graphed()[0].eval(), narrow().eval()
    with torch.no_grad():
        assert torch.equal(model(images(4)), plain_model(images(4)))


def test_each_gradient_is_reported_once_a_pass_from_the_last_stage_to_the_first() -> None:
    model, _, ready = graphed()
    gradients(model, images(4))
    stages = [list(map(id, stage.parameters())) for stage in model.stages]
    assert list(map(id, ready)) == [parameter for stage in reversed(stages) for parameter in stage]


def test_recording_leaves_the_model_as_it_was() -> None:
    model, line, ready = graphed()
    assert line == "CUDA graphs: 4 stages, forward and backward"
    assert not ready
    for (name, tensor), other in zip(model.state_dict().items(), narrow().state_dict().values(), strict=True):
        assert torch.equal(tensor, other), name
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_graph_that_computes_something_else_is_not_used() -> None:
    model, line, _ = graphed(Stale)
    assert line.startswith("CUDA graphs: none, as their gradients differ by ")
    for actual, plain in zip(gradients(model, images(4)), gradients(narrow(), images(4)), strict=True):
        assert torch.equal(actual, plain)


def test_graphs_can_be_removed() -> None:
    model, _, ready = graphed()
    remove_graphs(model)
    for actual, plain in zip(gradients(model, images(4)), gradients(narrow(), images(4)), strict=True):
        assert torch.equal(actual, plain)
    assert not ready


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_cuda_graphs_give_the_same_gradients() -> None:
    model, plain, batches = narrow().cuda(), narrow().cuda(), [images(4).cuda(), images(4).cuda() + 1]
    with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
        graph = partial(CudaGraph, torch.cuda.graph_pool_handle())
        assert graph_stages(model, lambda *_: None, torch.empty_like(batches[0]), graph) == "CUDA graphs: 4 stages, forward and backward"
    for _ in range(3):  # drop path draws the same on both sides
        for found, expected in zip(gradients(model, *batches, bf16=True), gradients(plain, *batches, bf16=True), strict=True):
            torch.testing.assert_close(found, expected, rtol=0.01, atol=0.01 * float(expected.abs().max()))
