"""Activation checkpointing: the same gradients, and BatchNorm statistics that move once a step."""

from typing import Any

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from pretrain.model.recomputation import update_statistics_once
from tests.pretrain.model.test_van import images, small_model

pytestmark = pytest.mark.slow


def train_step(model: nn.Module) -> dict[str, torch.Tensor]:
    """Returns gradients and buffers after one step's forward and backward pass."""
    torch.manual_seed(5)
    model.train()
    F.cross_entropy(model(images(4)), torch.arange(4)).backward()
    gradients = {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return gradients | dict(model.named_buffers())


def check_equal(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        if name.startswith("gradient"):
            torch.testing.assert_close(actual[name], tensor, msg=name)
        else:
            assert torch.equal(actual[name], tensor), name


@pytest.mark.parametrize("stages", [[0, 1, 2, 3], [1, 2]])
def test_recomputation_of_a_van_changes_nothing(stages: list[int]) -> None:
    settings = {"drop_path_rate": 0.3, "proj_drop_rate": 0.1}
    expected = train_step(small_model(**settings))
    model = small_model(**settings)
    for stage in stages:
        model.stages[stage].grad_checkpointing = True
    update_statistics_once(model)
    check_equal(train_step(model), expected)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recomputation_of_another_model_changes_nothing(use_reentrant: bool) -> None:
    def resnet() -> Any:
        torch.manual_seed(0)
        return timm.create_model("resnet10t", num_classes=10)

    expected = train_step(resnet())
    model = resnet()
    model.set_grad_checkpointing()
    update_statistics_once(model)
    before = timm.layers.config.use_reentrant_ckpt()
    timm.layers.set_reentrant_ckpt(use_reentrant)
    try:
        actual = train_step(model)
    finally:
        timm.layers.set_reentrant_ckpt(before)
    check_equal(actual, expected)


def test_without_the_hooks_statistics_move_twice() -> None:
    expected = train_step(small_model())
    model = small_model()
    model.set_grad_checkpointing()
    actual = train_step(model)
    assert not torch.equal(actual["stages.0.blocks.0.norm1.running_mean"], expected["stages.0.blocks.0.norm1.running_mean"])


def test_each_backward_pass_recomputes() -> None:
    model = small_model()
    model.set_grad_checkpointing()
    update_statistics_once(model)
    loss = model(images()).square().mean()
    loss.backward(retain_graph=True)
    first = [p.grad.clone() for p in model.parameters()]
    loss.backward()
    for p, gradient in zip(model.parameters(), first, strict=True):
        torch.testing.assert_close(p.grad, 2 * gradient)
    assert model.stages[0].blocks[0].norm1.num_batches_tracked == 1
