"""Stages as graphs, with graphs that a CPU can have: they compute a pass again, into the tensors that hold the first one's results. That
training is the same bit for bit, with two ranks, accumulation and drop path, is in test_engine.py, and that CUDA could capture the passes,
as far as that can be known without it, in test_on_gpu.py."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain.model import depthwise, lka
from pretrain.model.fast import cuda_graphs as graphs
from pretrain.model.fast import kernel_choice
from pretrain.model.fast.cuda_graphs import CudaGraph, Pass, graph_stages
from pretrain.model.van import VAN


class Rerun:
    def __init__(self, function: Pass):
        self.function = function
        self.results = tuple(result.detach().clone() for result in function())

    def replay(self) -> None:
        with torch.enable_grad():  # a replay is inside of an operator of autograd, where it is off
            made = self.function()
        for result, again in zip(self.results, made, strict=True):
            result.copy_(again.detach())


class Stale(Rerun):
    """What a graph would be that reads from other memory than later passes write to."""

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
    found = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    return found


def graphed(graph: Callable[[Pass], Rerun] = Rerun, model: VAN | None = None) -> tuple[VAN, str, list[Tensor]]:
    """A model with graphs for four images, the line for the log, and the parameters whose gradients were told of."""
    model, told = model or narrow(), list[Tensor]()
    return model, graph_stages(model, lambda *parameters: told.extend(parameters), torch.empty_like(images(4)), graph), told


def test_gradients_add_up_over_micro_steps_and_start_anew_with_each_step() -> None:
    model, _, _ = graphed()
    for batches in ([images(4)], [images(4), images(4) + 1], [images(4) * 2]):
        for recorded, plain in zip(gradients(model, *batches), gradients(narrow(), *batches), strict=True):
            torch.testing.assert_close(recorded, plain, rtol=0, atol=0)


def test_weights_are_cast_as_autocast_casts_them() -> None:
    """In one operator for all. PyTorch's own convolutions then compute the same; the depth-wise ones that a CPU trains by other means take
    the weight's gradient before they round it."""
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        model, line, _ = graphed()
    assert line == "graphs: 4 stages, forward and backward"
    found, plain = gradients(model, images(4), bf16=True), gradients(narrow(), images(4), bf16=True)
    names = [name for name, _ in model.named_parameters()]
    assert {one.dtype for one in found} == {torch.float32}
    for name, recorded, expected in zip(names, found, plain, strict=True):
        others = any(layer in name for layer in ("conv0", "conv_spatial", "dwconv"))
        torch.testing.assert_close(recorded, expected, rtol=0.01 * others, atol=0.01 * others * float(expected.abs().max()), msg=name)


@pytest.mark.full
def test_with_kernels_they_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, in the interpreter: sums that kernels make in fp32 stay fp32."""
    monkeypatch.setattr(kernel_choice, "unusable", lambda device: None)
    for module, name in ((depthwise, "convolution_fault"), (lka, "attention_fault"), (kernel_choice, "joint_fault")):
        monkeypatch.setattr(module, name, lambda *_: None)  # too slow in the interpreter
    monkeypatch.setattr(graphs, "WARM_UP", 1)

    def fast() -> VAN:
        torch.manual_seed(0)
        model = VAN(num_classes=4, embed_dims=(8,), depths=(2,), mlp_ratios=(2,), drop_path_rate=0.3).train()
        kernel_choice.use_kernels(model, "triton", torch.device("cpu"), 32, torch.bfloat16)
        assert all(stage.joins for stage in model.stages)
        return model

    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        model, line, _ = graphed(model=fast())
    assert line == "graphs: 1 stages, forward and backward"
    found, expected = gradients(model, images(4), bf16=True), gradients(fast(), images(4), bf16=True)
    for (name, _), one, other in zip(model.named_parameters(), found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, msg=name)


def test_backward_passes_are_recorded_outside_of_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a step's are."""
    within, grad = [], torch.autograd.grad

    def watched(*arguments: Any) -> tuple[Tensor, ...]:
        within.append(torch.is_autocast_enabled("cpu"))
        return grad(*arguments)

    monkeypatch.setattr(torch.autograd, "grad", watched)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        graphed()
    assert within == [False] * (3 + 1 + 4 + 4)  # to warm up, without graphs, recorded, and again


def test_batches_of_other_sizes_and_evaluation_go_the_ordinary_way() -> None:
    model, _, _ = graphed()
    batches = [images(4), images(3), images(4) + 1]
    for recorded, plain in zip(gradients(model, *batches), gradients(narrow(), *batches), strict=True):
        torch.testing.assert_close(recorded, plain, rtol=0, atol=0)
    model, plain_model = graphed()[0].eval(), narrow().eval()
    with torch.no_grad():
        assert torch.equal(model(images(4)), plain_model(images(4)))


def test_each_gradient_of_the_stages_is_told_of_once_a_pass_from_the_last_stage_on() -> None:
    model, _, told = graphed()
    gradients(model, images(4))
    stages = [list(map(id, stage.parameters())) for stage in model.stages]
    assert list(map(id, told)) == [parameter for stage in reversed(stages) for parameter in stage]


def test_recording_leaves_the_model_as_it_was() -> None:
    model, line, told = graphed()
    assert line == "graphs: 4 stages, forward and backward"
    assert not told
    for (name, tensor), other in zip(model.state_dict().items(), narrow().state_dict().values(), strict=True):
        assert torch.equal(tensor, other), name
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_graph_that_computes_something_else_is_not_used() -> None:
    model, line, _ = graphed(Stale)
    assert line.startswith("graphs: none, as their gradients differ from those without by ")
    for found, plain in zip(gradients(model, images(4)), gradients(narrow(), images(4)), strict=True):
        assert torch.equal(found, plain)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_cuda_graphs_give_the_same_gradients() -> None:
    model, plain, batches = narrow().cuda(), narrow().cuda(), [images(4).cuda(), images(4).cuda() + 1]
    with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
        graph = partial(CudaGraph, torch.cuda.graph_pool_handle())
        assert graph_stages(model, lambda *_: None, torch.empty_like(batches[0]), graph) == "graphs: 4 stages, forward and backward"
    for _ in range(3):  # drop path draws the same on both sides
        for found, expected in zip(gradients(model, *batches, bf16=True), gradients(plain, *batches, bf16=True), strict=True):
            torch.testing.assert_close(found, expected, rtol=0.01, atol=0.01 * float(expected.abs().max()))
