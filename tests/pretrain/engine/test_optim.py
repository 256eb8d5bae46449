"""The optimizer: timm's schedule, torch's AdamW to the bit, the moving average by its formula, parameter groups."""

import json
import math
from collections import Counter
from typing import Any

import pytest
import timm
import torch
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import pretrain.model.van  # noqa: F401  registers the family with timm
from pretrain import config as settings
from pretrain.config import OptimConfig
from pretrain.engine.optim import AdamW, group_parameters, learning_rate, set_learning_rate
from tests.support import REFERENCE, REPOSITORY


@pytest.mark.parametrize(("warmup_epochs", "total"), [(2, 35), (1, 7), (0, 21)])
def test_the_learning_rate_equals_timms(warmup_epochs: int, total: int) -> None:
    per_epoch = 7
    optim = OptimConfig(lr=4e-3, min_lr=1e-5, warmup_lr=1e-6, warmup_epochs=warmup_epochs)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=optim.lr)
    warmup = {"warmup_t": warmup_epochs * per_epoch, "warmup_lr_init": optim.warmup_lr, "warmup_prefix": False}
    schedule = CosineLRScheduler(optimizer, t_initial=total, lr_min=optim.min_lr, t_in_epochs=False, **warmup)
    for step in range(total):
        schedule.step_update(step)
        assert learning_rate(step, total, warmup_epochs * per_epoch, optim) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12), (
            step
        )


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, (900, 50)),
        ({"steps": 77, "optim.warmup_steps": 7}, (77, 7)),
        ({"samples": 16_000, "optim.warmup_samples": 1_600}, (1000, 100)),
    ],
)  # fmt: skip
def test_steps_win_over_samples_and_samples_over_epochs(given: dict[str, int], expected: tuple[int, int]) -> None:
    config = load_recipe("van_b3_in22k", "global_batch=16", *(f"{key}={value}" for key, value in given.items()))
    assert settings.lengths(config, 10) == expected


def test_two_lengths_at_once_are_refused() -> None:
    with pytest.raises(settings.ConfigError, match="can't be combined with steps"):
        load_recipe("van_b3_in22k", "steps=3", "samples=5")


def load_recipe(name: str, *overrides: str) -> settings.Config:
    return settings.load(REPOSITORY / "configs" / f"{name}.yaml", overrides, unchecked=("data.train", "data.val"))


# ---------------------------------------------------------------- parameter groups


@pytest.mark.parametrize("variant", ["van_b3", "van_b4", "van_b5", "van_b6"])
def test_the_parameters_with_weight_decay_are_those_of_the_authors_code(variant: str) -> None:
    """Applies the rule of timm's param_groups_weight_decay to the shapes of the authors' state dict."""
    shapes = json.loads((REFERENCE / "van_state_dicts.json").read_text())[variant]["state_dict"]
    authors = [math.prod(shape) for name, shape in shapes.items() if len(shape) > 1]
    bare = [math.prod(shape) for name, shape in shapes.items() if len(shape) == 1 and "running_" not in name]
    with torch.device("meta"):
        decayed, free = group_parameters(timm.create_model(variant), 0.05)
    assert sorted(p.numel() for p in decayed["params"]) == sorted(authors)
    assert sorted(p.numel() for p in free["params"]) == sorted(bare)


def test_layer_decay_falls_towards_the_input() -> None:
    model = timm.create_model("van_b0", num_classes=7)
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = group_parameters(model, 0.05, layer_decay=0.5)
    scale = {names[p]: group["lr_scale"] for group in groups for p in group["params"]}
    assert scale.keys() == set(names.values())
    # 3 + 3 + 5 + 2 blocks and the head; the first patch embedding is a layer of its own.
    assert scale["head.weight"] == scale["head.bias"] == 1.0
    expected = {
        "stages.3.norm.weight": 1, "stages.3.blocks.1.attn.proj_1.weight": 1, "stages.3.blocks.0.mlp.fc1.bias": 2,
        "stages.3.patch_embed.proj.weight": 2, "stages.2.blocks.4.layer_scale_1": 3, "stages.0.blocks.0.norm1.weight": 13,
        "stages.0.patch_embed.proj.weight": 14,
    }  # fmt: skip
    assert {name: scale[name] for name in expected} == {name: 0.5**later for name, later in expected.items()}
    assert all(group["weight_decay"] == (0.05 if all(p.ndim > 1 for p in group["params"]) else 0.0) for group in groups)
    optimizer = AdamW(groups, lr=1.0, ema_decay=0.0)
    set_learning_rate(optimizer, 3.0)
    assert {group["lr"] for group in optimizer.param_groups} == {3.0 * one for one in scale.values()}


def steps(optimizer: torch.optim.Optimizer, weights: list[nn.Parameter], count: int = 5) -> list[list[Tensor]]:
    """Makes updates with random gradients, and returns the weights after each."""
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
def test_updates_equal_torchs_adamw_to_the_bit(ema_decay: float) -> None:
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


class Operators(TorchDispatchMode):
    """Counts the operators that compute something while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not function.is_view:
            self.found[function._schema.name] += 1
        return function(*args, **(kwargs or {}))


def update(kind: type[torch.optim.AdamW], tensors: int, **kwargs: Any) -> Counter[str]:
    """Returns the operators of one update of `tensors` tensors, and of the norm of their gradients, as the guard calls them."""
    weights = [nn.Parameter(torch.ones(5)) for _ in range(tensors)]
    optimizer = kind(weights, lr=1e-3, **kwargs)
    for weight in weights:
        weight.grad = torch.ones(5)
    if isinstance(optimizer, AdamW):
        optimizer.start_states(weights)
    optimizer.step()  # torch's creates its states
    with Operators() as operators:
        norm = nn.utils.get_total_norm([weight.grad for weight in weights if weight.grad is not None])
        if isinstance(optimizer, AdamW):
            optimizer.grad_scale, optimizer.found_inf = norm.clamp(min=1.0), torch.zeros(())
        optimizer.step()
    return operators.found


def test_the_number_of_operators_does_not_grow_with_the_number_of_tensors() -> None:
    few, many = (update(AdamW, tensors, ema_decay=0.9) for tensors in (3, 300))
    assert few == many
    assert {"aten::_fused_adamw_", "aten::_foreach_lerp_", "aten::_foreach_norm"} <= set(few)
    few, many = (update(torch.optim.AdamW, tensors, foreach=False) for tensors in (3, 300))
    assert many.total() > 50 * few.total()  # the control
