"""The supported version of DeepSpeed: pinned, checked at the start, and with the private names that the project uses."""

import importlib
import inspect
import re
import tomllib

import pytest
import torch
import torch.distributed as dist
from torch import nn

from pretrain.engine import deepspeed_compat
from pretrain.engine.deepspeed_compat import SUPPORTED_VERSION
from tests.support import REPOSITORY
from tests.support.ranks import run_on_ranks


def test_the_supported_version_is_the_pinned_one() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert f"deepspeed=={SUPPORTED_VERSION}" in project["dependencies"]
    assert re.findall(r"^deepspeed==(\S+)", (REPOSITORY / "requirements.txt").read_text(), re.MULTILINE) == [SUPPORTED_VERSION]


def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    deepspeed_compat.require_supported_version()
    monkeypatch.setattr(deepspeed_compat, "version", lambda package: "0.20.1")
    with pytest.raises(ValueError, match=rf"DeepSpeed 0\.20\.1 is installed, .* supports DeepSpeed {re.escape(SUPPORTED_VERSION)} alone"):
        deepspeed_compat.initialize(nn.Identity(), torch.optim.SGD([torch.ones(1)]), {}, torch.device("cpu"))


# Methods that the project calls or replaces, and their parameters after self; DeepSpeed's tracing decorator leaves "kwargs" of some.
METHODS = {
    "runtime.engine:DeepSpeedEngine": {
        "allreduce_gradients": ["kwargs"],
        "is_gradient_accumulation_boundary": [],
        "zero_optimization_stage": [],
    },
    "runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer": {
        "_update_model_bit16_weights": ["group_index"],
        "overlapping_partition_gradients_reduce_epilogue": [],
        "set_gradient_accumulation_boundary": ["is_boundary"],
        "update_lp_params": [],
    },
    "runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3": {
        "_reassign_or_swap_out_partitioned_parameters": ["kwargs"],
        "get_param_id": ["param"],
    },
}


@pytest.mark.slow
def test_private_methods_are_those_that_were_read() -> None:
    for place, methods in METHODS.items():
        module, name = place.split(":")
        owner = getattr(importlib.import_module(f"deepspeed.{module}"), name)
        found = {method: list(inspect.signature(getattr(owner, method)).parameters)[1:] for method in methods}
        assert found == methods, place


PARTITIONED = {"averaged_gradients", "params_in_partition", "single_partition_of_fp32_groups", "parameter._hp_mapping"}
ATTRIBUTES = {
    1: PARTITIONED,
    2: PARTITIONED,
    3: {"averaged_gradients", "fp32_partitioned_groups_flat", "grad_position", "parameter.ds_numel"},
}


def list_attributes() -> dict[int, set[str]]:
    """Returns, by ZeRO stage, the attributes that the optimizer and the parameters have before a step's update."""
    from pretrain import config as settings
    from pretrain.engine import distributed
    from pretrain.engine.engine import build_engine

    attributes = {}
    for stage in ATTRIBUTES:
        config = settings.from_dict(
            {
                "name": "tiny", "seed": 1, "global_batch": 8, "epochs": 1.0, "data": {"train": "unused"}, "optim": {"lr": 1e-2},
                "model": {"name": "van_b0", "classes": 3},
                "engine": {"device": "cpu", "precision": "fp32", "micro_batch": 4, "zero_stage": stage},
            }
        )  # fmt: skip
        if not dist.is_initialized():
            distributed.start(config.engine)
        model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3))
        engine = build_engine(config, model, 1)
        engine.backward(nn.functional.cross_entropy(engine(torch.ones(4, 6)), torch.zeros(4, dtype=torch.int64)))
        attributes[stage] = {*vars(engine.optimizer), *(f"parameter.{name}" for p in model.parameters() for name in vars(p))}
    return attributes


@pytest.mark.slow
def test_private_attributes_are_those_that_were_read() -> None:
    for found in run_on_ranks(2, list_attributes):
        for stage, expected in ATTRIBUTES.items():
            assert expected <= found[stage], stage
