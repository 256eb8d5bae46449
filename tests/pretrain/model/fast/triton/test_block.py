"""VAN's blocks by Triton's kernels: a model computes what the reference computes, and the reference can be put back."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from triton import knobs

from pretrain.model import van
from pretrain.model.fast import compiled, triton
from pretrain.model.van import VAN

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("poisoned")]

DEVICE = "cpu" if knobs.runtime.interpret else "cuda"
IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(memory_format=torch.channels_last).to(DEVICE)


def tiny(drop_path_rate: float = 0.5) -> VAN:
    torch.manual_seed(0)
    return VAN(num_classes=3, embed_dims=(8, 12, 16, 8), depths=(1, 1, 2, 1), mlp_ratios=(2, 2, 2, 2), drop_path_rate=drop_path_rate).to(
        DEVICE
    )


def by_kernels(model: VAN) -> VAN:
    model = copy.deepcopy(model)
    triton.use_triton(model)
    return model


def step(model: nn.Module) -> dict[str, Tensor]:
    """Returns the logits, all gradients and all buffers of one step."""
    torch.manual_seed(1)
    logits = model.train()(IMAGES)
    F.cross_entropy(logits, torch.tensor([0, 2, 1], device=DEVICE)).backward()
    return {"logits": logits.detach()} | {name: p.grad for name, p in model.named_parameters()} | dict(model.named_buffers())


def check_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            actual[name], tensor, rtol=1e-3, atol=1e-5 + 1e-4 * float(tensor.abs().max()), msg=lambda t, n=name: f"{n}: {t}"
        )


def test_a_step() -> None:
    """Values, gradients, BatchNorm statistics, and the draws of stochastic depth."""
    model = tiny()
    assert list(by_kernels(model).state_dict()) == list(model.state_dict())
    check_same(step(by_kernels(model)), step(model))


def test_without_stochastic_depth_the_step_differs() -> None:
    """The control: the draws are seen in the results."""
    with pytest.raises(AssertionError):
        check_same(step(by_kernels(tiny(drop_path_rate=0.0))), step(tiny()))


@pytest.mark.long
def test_a_step_with_recomputation() -> None:
    model = tiny()
    swapped = by_kernels(model)
    swapped.set_grad_checkpointing()
    expected = step(model)
    check_same({name: t for name, t in step(swapped).items() if "running" not in name and "num_batches" not in name},
               {name: t for name, t in expected.items() if "running" not in name and "num_batches" not in name})  # fmt: skip


def test_evaluation() -> None:
    model = tiny().eval()
    with torch.inference_mode():
        torch.testing.assert_close(by_kernels(model)(IMAGES), model(IMAGES), rtol=1e-4, atol=1e-5)


def test_the_reference_comes_back() -> None:
    model = tiny()
    swapped = by_kernels(model)
    assert {type(m) for m in swapped.modules() if isinstance(m, van.Block)} == {triton.Block}
    triton.restore_reference(swapped)
    assert [type(m) for m in swapped.modules()] == [type(m) for m in model.modules()]
    assert all(torch.equal(a, b) for a, b in zip(step(swapped).values(), step(model).values(), strict=True))


@pytest.mark.long
def test_compiled_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile takes the operators whole, without a graph break."""
    graphs: list[torch.fx.GraphModule] = []

    def keep_graph(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    model = by_kernels(tiny(drop_path_rate=0.0))
    swapped = copy.deepcopy(model)
    monkeypatch.setattr(van.Block, "compile", lambda block: nn.Module.compile(block, backend=keep_graph, fullgraph=True))
    compiled.compile_blocks(swapped)
    check_same(step(swapped), step(model))
    assert graphs
    assert all(graph.code.count("van.scaled_residual") == 2 for graph in graphs)
    assert all(graph.code.count("van.gelu_conv2d") == graph.code.count("van.gate") == 1 for graph in graphs)


def test_why_the_kernels_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert triton.why_unusable(tiny(), torch.device("cpu")) == "the device is cpu"
    assert triton.why_unusable(tiny(), gpu) == "compute capability 7.5 is below 8.0, which bf16 needs"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert triton.why_unusable(tiny(), gpu) is None
    other = tiny()
    other.stages[1].blocks[0].attn.spatial_gating_unit = van.LKA(12, 28, 4)  # type: ignore[index,union-attr]
    assert triton.why_unusable(other, gpu) == "there is no kernel for a depthwise 7x7 convolution with dilation 4"
    dropping = VAN(embed_dims=(8,), depths=(1,), mlp_ratios=(2,), proj_drop_rate=0.1)
    assert triton.why_unusable(dropping, gpu) == "the kernels have no dropout in the MLP"
