"""What updates the weights: timm's schedule and torch's AdamW to the bit, the moving average by its formula."""

from typing import Any

import pytest
import timm
import torch
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn

import pretrain.van  # noqa: F401  registers the family with timm
from pretrain.config import OptimConfig
from pretrain.optim import AdamW, learning_rate, parameter_groups


@pytest.mark.parametrize(("warmup_epochs", "total"), [(2, 35), (1, 7), (0, 21)])
def test_learning_rate_is_timms(warmup_epochs: int, total: int) -> None:
    per_epoch = 7
    optim = OptimConfig(lr=4e-3, min_lr=1e-5, warmup_lr=1e-6, warmup_epochs=warmup_epochs)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=optim.lr)
    warmup = {"warmup_t": warmup_epochs * per_epoch, "warmup_lr_init": optim.warmup_lr, "warmup_prefix": False}
    schedule = CosineLRScheduler(optimizer, t_initial=total, lr_min=optim.min_lr, t_in_epochs=False, **warmup)
    for step in range(total):
        schedule.step_update(step)
        assert learning_rate(step, total, per_epoch, optim) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12), step


def test_learning_rate_at_the_corners() -> None:
    optim = OptimConfig(lr=1.0, min_lr=0.1, warmup_lr=0.2, warmup_epochs=0.5)
    assert learning_rate(0, 100, 10, optim) == 0.2
    assert learning_rate(4, 100, 10, optim) == pytest.approx(0.2 + 0.8 * 4 / 5)
    assert learning_rate(50, 100, 10, optim) == pytest.approx(0.55)  # half-way down, however long the warm-up was
    assert learning_rate(100, 100, 10, optim) == pytest.approx(0.1)
    assert learning_rate(0, 100, 10, OptimConfig(lr=1.0)) == 1.0


def test_decay_is_on_kernels_and_matrices_alone() -> None:
    model = timm.create_model("van_b0", num_classes=7)
    names = {parameter: name for name, parameter in model.named_parameters()}
    decayed, free = parameter_groups(model, 0.05)
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.05, 0.0)
    norms = {f"{name}." for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d | nn.LayerNorm)}

    def is_free(name: str) -> bool:
        return name.endswith((".bias", "layer_scale_1", "layer_scale_2")) or f"{name.rpartition('.')[0]}." in norms

    assert {names[p] for p in free["params"]} == {name for name in names.values() if is_free(name)}
    assert {names[p] for p in decayed["params"]} == {name for name in names.values() if not is_free(name)}
    assert any("norm" in names[p] for p in free["params"])
    # What is frozen is in no group.
    model.head.requires_grad_(False)
    left = [names[p] for group in parameter_groups(model, 0.05) for p in group["params"]]
    assert len(left) == len(names) - 2
    assert not [name for name in left if name.startswith("head.")]


def steps(optimizer: torch.optim.Optimizer, weights: list[nn.Parameter], count: int = 5) -> list[list[Tensor]]:
    """Updates with made-up gradients; returns the weights after each."""
    generator = torch.Generator().manual_seed(1)
    after = []
    for number in range(count):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (number + 1)
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator)
        optimizer.step()
        after.append([weight.detach().clone() for weight in weights])
    return after


def made_up() -> tuple[list[nn.Parameter], list[dict[str, Any]], dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    weights = [nn.Parameter(torch.randn(5, 3, generator=generator)), nn.Parameter(torch.randn(7, generator=generator))]
    groups = [{"params": weights[:1], "weight_decay": 0.3}, {"params": weights[1:], "weight_decay": 0.0}]
    return weights, groups, {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6}


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_updates_are_those_of_torchs_adamw_to_the_bit(ema_decay: float) -> None:
    weights, groups, kwargs = made_up()
    expected = steps(torch.optim.AdamW(groups, **kwargs, fused=True), weights)
    weights, groups, kwargs = made_up()
    optimizer = AdamW(groups, **kwargs, ema_decay=ema_decay)
    optimizer.start_states(weights)
    actual = steps(optimizer, weights)
    assert all(torch.equal(ours, theirs) for i in range(5) for ours, theirs in zip(actual[i], expected[i], strict=True))
    assert not torch.equal(actual[0][0], actual[1][0])


def test_the_average_follows_its_formula() -> None:
    weights, groups, kwargs = made_up()
    optimizer = AdamW(groups, **kwargs, ema_decay=0.9)
    optimizer.start_states(weights)
    averages = [weight.detach().double() for weight in weights]
    for after in steps(optimizer, weights):
        averages = [0.9 * average + 0.1 * weight.double() for average, weight in zip(averages, after, strict=True)]
    for weight, average in zip(weights, averages, strict=True):
        torch.testing.assert_close(optimizer.state[weight]["ema"].double(), average, rtol=1e-6, atol=1e-7)
        assert not torch.allclose(weight.double(), average, rtol=1e-3)


@pytest.mark.parametrize(("ema_decay", "keys"), [(0.0, ("exp_avg", "exp_avg_sq")), (0.9, ("exp_avg", "exp_avg_sq", "ema"))])
def test_state_keys_name_what_has_a_weights_shape(ema_decay: float, keys: tuple[str, ...]) -> None:
    weights, groups, kwargs = made_up()
    optimizer = AdamW(groups, **kwargs, ema_decay=ema_decay)
    optimizer.start_states(weights)
    for when in ("before the first update", "after it"):
        for weight in weights:
            state = optimizer.state[weight]
            assert tuple(key for key in state if state[key].shape == weight.shape) == optimizer.state_keys == keys, when
        steps(optimizer, weights, 1)
