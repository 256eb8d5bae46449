"""The engine's settings: ZeRO stages, recomputation, compilation, precision and BatchNorm over all ranks."""

import os
import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from pretrain.engine.precision import DTYPES, autocast, resolve_precision
from tests.support.configs import make_config
from tests.support.ranks import run_on_ranks

pytestmark = pytest.mark.slow

STEPS = 50
INDUCTOR, SWITCH = "torch._inductor.compile_fx", "TORCHDYNAMO_DISABLE"


def run(
    steps: int, clip: float = 0.0, lr: float = 2e-3, model: dict[str, Any] | None = None, graphs: bool = False, **engine: Any
) -> dict[str, Any]:
    """Trains a narrow VAN on four classes, with accumulation, drop path and a moving average; returns this rank's losses."""
    from pretrain import config as settings
    from pretrain.engine import distributed
    from pretrain.engine.batch_stats import BatchStats, synchronize_batch_norms
    from pretrain.engine.engine import build_engine
    from pretrain.engine.fast_paths import use_fast_paths
    from pretrain.engine.guard import Guard
    from pretrain.model.fast.channels_last import use_channels_last
    from pretrain.model.fast.cuda_graphs import graph_stages
    from pretrain.model.recomputation import update_statistics_once
    from pretrain.model.van import VAN
    from tests.pretrain.model.fast.test_cuda_graphs import Rerun

    config = make_config(16, classes=4, lr=lr, model=model or {}, engine={"ema_decay": 0.9, "micro_batch": 4} | engine)
    if not dist.is_initialized():
        distributed.start(config.engine)
    rank = dist.get_rank()
    torch.manual_seed(0)
    network = VAN(num_classes=4, embed_dims=(8, 16, 24, 32), depths=(1, 1, 2, 1), drop_path_rate=0.1)
    use_channels_last(network)
    if config.engine.sync_bn:
        synchronize_batch_norms(network)
    for number in config.model.checkpoint_stages:
        network.stages[number].grad_checkpointing = True
    update_statistics_once(network)
    use_fast_paths(network, config, torch.device("cpu"))
    built = build_engine(config, network, settings.accumulation(config, dist.get_world_size()))
    stats, guard, losses = BatchStats(network, 0.9), Guard(built, clip=clip, should_scale=config.engine.precision == "fp16"), []
    if graphs:
        line = graph_stages(network, built.reductions.mark_ready, torch.empty(4, 3, 32, 32).to(memory_format=torch.channels_last), Rerun)
        assert line == "CUDA graphs: 4 stages, forward and backward"
    for step in range(steps):
        drawn = torch.Generator().manual_seed(step)
        labels = torch.arange(16) % 4
        images = torch.randn(16, 3, 32, 32, generator=drawn) + torch.randn(4, 3, 1, 1, generator=torch.Generator().manual_seed(9))[labels]
        torch.manual_seed(100 * step + rank)
        total = torch.zeros(())
        for micro_step, own in enumerate(torch.arange(16).view(2, 2, 4)[rank]):
            loss = nn.functional.cross_entropy(built(images[own].to(memory_format=torch.channels_last)).float(), labels[own])
            built.backward(guard.scale_loss(loss))
            total += loss.detach() / 2
            if micro_step == 1:
                stats.start_averaging()
                guard.check()
            built.step()
        stats.finish(guard.found_inf)
        dist.all_reduce(total)
        losses.append(float(total) / 2)
    counted = {int(buffer) for name, buffer in network.named_buffers() if name.endswith("num_batches_tracked")}
    return {"losses": losses, "statistics": stats.flat.tolist(), "counted": counted}


def every_stage() -> dict[str, list[float]]:
    found = {f"ZeRO-{stage}": run(STEPS, clip=1.0, zero_stage=stage)["losses"] for stage in range(4)}
    found["control"] = run(STEPS, clip=1.0, zero_stage=1, lr=2.02e-3)["losses"]
    return found


@pytest.mark.long
def test_every_zero_stage_equals_plain_data_parallel() -> None:
    for found in run_on_ranks(2, every_stage):
        plain, control = found.pop("ZeRO-0"), found.pop("control")
        assert len(plain) == STEPS
        assert sum(plain[-5:]) < 0.5 * sum(plain[:5])  # the model learns
        for losses in found.values():
            assert losses == pytest.approx(plain, rel=1e-3)
        assert control != pytest.approx(plain, rel=1e-3)


def with_graphs() -> list[dict[str, Any]]:
    return [run(4, clip=1.0, zero_stage=stage, graphs=graphs) for stage in (0, 1) for graphs in (False, True)]


def test_training_with_graphs_equals_training_without() -> None:
    for plain_0, graphs_0, plain_1, graphs_1 in run_on_ranks(2, with_graphs):
        assert graphs_0 == plain_0
        assert graphs_1 == plain_1


def imported() -> tuple[list[bool], str]:
    """Returns whether inductor is imported by an engine, and then by torch.compile, as the control."""
    os.environ[SWITCH] = "0"
    run(1, zero_stage=1)
    before = INDUCTOR in sys.modules
    torch.compile(torch.neg)
    return [before, INDUCTOR in sys.modules], os.environ[SWITCH]


def test_an_engine_does_not_import_inductor() -> None:
    assert run_on_ranks(1, imported) == [([False, True], "0")]


# ---------------------------------------------------------------- memory and compilation


def every_way() -> dict[str, Any]:
    every: dict[str, Any] = {"checkpoint_stages": [0, 1, 2, 3]}
    ways: dict[str, dict[str, Any]] = {
        "plain": {}, "recomputed": {"model": every}, "synchronized": {"sync_bn": True}, "both": {"model": every, "sync_bn": True},
    }  # fmt: skip
    return {name: run(3, **way) for name, way in ways.items()}


def test_recomputation_changes_no_bit_and_updates_statistics_once() -> None:
    for found in run_on_ranks(2, every_way):
        assert found["recomputed"] == found["plain"]
        assert found["plain"]["counted"] == {6}
        assert found["both"] == found["synchronized"]
        assert found["synchronized"]["losses"] != found["plain"]["losses"]


def compiled() -> tuple[list[float], list[float], int]:
    from torch._dynamo.utils import counters

    plain = run(3)["losses"]
    return plain, run(3, model={"compile": True, "checkpoint_stages": [2]})["losses"], counters["stats"]["unique_graphs"]


@pytest.mark.full
def test_compiled_blocks_equal_plain_blocks() -> None:
    for plain, losses, graphs in run_on_ranks(2, compiled):
        assert losses == pytest.approx(plain, rel=1e-3)
        assert graphs >= 4  # at least one for the blocks of each stage


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_lower_precision_is_close_to_fp32(precision: str) -> None:
    one, _ = run_on_ranks(2, run, steps=5, precision=precision)
    exact, _ = run_on_ranks(2, run, steps=5)
    assert one["losses"] == pytest.approx(exact["losses"], rel=3e-2)
    # A CPU without bf16 computes in fp32.
    assert (one["losses"] == exact["losses"]) == (resolve_precision(torch.device("cpu"), precision) == "fp32")


@pytest.mark.parametrize("supported", [True, False])
def test_bf16_becomes_fp32_on_a_cpu_without_bf16(supported: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    used = {(device.type, wish): resolve_precision(device, wish) for device in (cpu, gpu) for wish in DTYPES}
    assert {key: found for key, found in used.items() if found != key[1]} == ({} if supported else {("cpu", "bf16"): "fp32"})
    with autocast(cpu, "bf16"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == (torch.bfloat16 if supported else torch.float32)


# ---------------------------------------------------------------- BatchNorm over all ranks


def norms(dtype: torch.dtype) -> dict[str, Any]:
    """Compares SyncBatchNorm on two ranks' halves of a batch with BatchNorm on the whole batch."""
    from pretrain.engine.batch_stats import synchronize_batch_norms

    dist.init_process_group("gloo")
    rank, generator = dist.get_rank(), torch.Generator().manual_seed(3)
    batch, outer = torch.randn(8, 5, 4, 4, generator=generator) * 3 + 7, torch.randn(8, 5, 4, 4, generator=generator)
    whole, parts = nn.Sequential(nn.BatchNorm2d(5)), nn.Sequential(nn.BatchNorm2d(5))
    for model in (whole, parts):
        nn.init.normal_(model[0].weight, generator=torch.Generator().manual_seed(4))
    synchronize_batch_norms(parts)
    found = []
    for model, own in ((whole, slice(0, 8)), (parts, slice(4 * rank, 4 * rank + 4))):
        x = batch[own].to(dtype).requires_grad_()
        y = model(x)
        (y.float() * outer[own]).sum().backward()
        for parameter in model.parameters():
            if model is parts:
                dist.all_reduce(parameter.grad)  # of a sum over the batch
        state = {name: tensor.float() for name, tensor in model.state_dict().items()}
        found.append((y.detach(), x.grad, [parameter.grad for parameter in model.parameters()], state, model.eval()(x).detach()))
    (y, grad, weights, state, evaluated), (y_part, grad_part, weights_part, state_part, evaluated_part) = found
    own = slice(4 * rank, 4 * rank + 4)
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    assert y_part.dtype == y.dtype == dtype
    torch.testing.assert_close(y_part, y[own], **tolerance)
    torch.testing.assert_close(grad_part, grad[own], **tolerance)
    torch.testing.assert_close(weights_part, weights, **tolerance)
    torch.testing.assert_close(state_part, state, **tolerance)
    torch.testing.assert_close(evaluated_part, evaluated[own], **tolerance)
    alone = nn.BatchNorm2d(5)
    return {
        "alone differs": not torch.allclose(alone(batch[own]), whole[0].train()(batch)[own], rtol=1e-2, atol=1e-2),
        "kind": type(parts[0]).__name__,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_synchronized_statistics_are_those_of_the_whole_batch(dtype: torch.dtype) -> None:
    for found in run_on_ranks(2, norms, dtype=dtype):
        assert found == {"alone differs": True, "kind": "SyncBatchNorm"}
