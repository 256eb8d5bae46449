"""Compiled blocks: one graph for all blocks of a shape, whatever their stochastic depth, and the reference back again."""

import pytest
import torch
from timm.layers import DropPath
from torch._dynamo.testing import CompileCounter

from pretrain.model import van
from pretrain.model.fast.compiled import CompilableDropPath, compile_blocks, restore_reference
from tests.pretrain.model.test_van import small_model

pytestmark = pytest.mark.slow


def test_stochastic_depth_keeps_samples_at_its_rate() -> None:
    path = CompilableDropPath(0.25).train()
    torch.manual_seed(0)
    y = path(torch.ones(4000, 2, 1, 1))
    assert y.unique().tolist() == pytest.approx([0, 4 / 3])
    assert (y[:, 0] == y[:, 1]).all()
    assert y.mean().item() == pytest.approx(1, abs=0.05)
    assert torch.equal(path.eval()(torch.ones(2)), torch.ones(2))


@pytest.mark.long
def test_blocks_with_different_stochastic_depth_share_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph for each block would exceed the compiler's limit, and the remaining blocks would not be compiled."""
    counter = CompileCounter()
    monkeypatch.setattr(van.Block, "compile", lambda block: torch.nn.Module.compile(block, backend=counter))
    model = small_model(depths=(3, 3, 9, 3), drop_path_rate=0.3).train()
    compile_blocks(model)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        model(torch.randn(2, 3, 64, 64)).sum().backward()
    assert 0 < counter.frame_count <= 8


def test_the_reference_comes_back() -> None:
    model = small_model(drop_path_rate=0.3)
    compile_blocks(model)
    assert any(isinstance(module, CompilableDropPath) for module in model.modules())
    restore_reference(model)
    assert {type(module) for module in model.modules() if isinstance(module, DropPath)} == {DropPath}
    assert all(module._compiled_call_impl is None for module in model.modules())
