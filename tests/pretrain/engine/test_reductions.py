"""Reductions of gradients beside the backward pass: their order, their bits, and the absence of waits and races."""

from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn

from pretrain.engine.reductions import fill_buckets
from tests.support.configs import make_config
from tests.support.ranks import run_on_ranks

pytestmark = pytest.mark.slow

STEPS = 3
WHOLE = 500_000_000  # elements: DeepSpeed's default, and one bucket for the whole model


def build(stage: int) -> tuple[Any, Any]:
    """Returns the engine of one rank, with two micro-batches of two samples a step, and its guard."""
    from pretrain.engine import distributed
    from pretrain.engine.engine import build_engine
    from pretrain.engine.guard import Guard
    from pretrain.model.van import VAN

    config = make_config(8, classes=4, lr=1e-3, engine={"ema_decay": 0.9, "micro_batch": 2, "zero_stage": stage})
    if not dist.is_initialized():
        distributed.start(config.engine)
    torch.manual_seed(0)
    engine = build_engine(config, VAN(num_classes=4, embed_dims=(8, 16, 24, 32), depths=(1, 1, 2, 1)), 2)
    return engine, Guard(engine, clip=1.0, should_scale=False)


def step(engine: Any, guard: Any, number: int) -> None:
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(number))
    for micro_step, own in enumerate(torch.arange(8).view(2, 2, 2)[dist.get_rank()]):
        loss = nn.functional.cross_entropy(engine(images[own]), torch.arange(8)[own] % 4)
        engine.backward(guard.scale_loss(loss))
        if micro_step == 1:
            guard.check()
        engine.step()


# ---------------------------------------------------------------- buckets


def test_buckets_are_filled_from_the_last_parameter_on() -> None:
    parameters = [torch.empty(size) for size in (4, 3, 9, 2, 2)]
    assert [[one.numel() for one in bucket] for bucket in fill_buckets(parameters, 7)] == [[2, 2], [9], [3, 4]]


def without_a_head(stage: int) -> str:
    engine, guard = build(stage)
    engine.module.forward_head = lambda x: x.mean((2, 3))[:, :4]
    try:
        step(engine, guard, 0)
    except RuntimeError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("stage", [0, 1])
def test_a_parameter_without_a_gradient_is_an_error(stage: int) -> None:
    errors = run_on_ranks(2, without_a_head, stage=stage)
    assert all("parameters got no gradient in a step's last backward pass" in error for error in errors)


# ---------------------------------------------------------------- order on a GPU


def ordered() -> dict[str, tuple[int, int, list[str]]]:
    """Returns the number of streams, the waits of the host and the races (streams.py) of three steps, by case."""
    from tests.support.streams import Stream, Streams

    def watched(stage: int, deaf: str = "") -> tuple[int, int, list[str]]:
        streams, wait_stream = Streams(), Stream.wait_stream
        engine, guard = build(stage)

        def heard(stream: Stream, other: Stream) -> None:
            if deaf != ("main" if stream is streams.main else "reductions"):
                wait_stream(stream, other)

        with streams.watched(), patch.object(Stream, "wait_stream", heard):
            for number in range(STEPS):
                step(engine, guard, number)
        return len(streams.used), streams.host_waits, streams.races

    found = {f"ZeRO-{stage}": watched(stage) for stage in (0, 1, 2)}
    return found | {f"{stage}, deaf {stream}": watched(stage, stream) for stage in (0, 1) for stream in ("main", "reductions")}


def test_streams_order_the_reductions_without_a_wait_of_the_host() -> None:
    for found in run_on_ranks(2, ordered):
        assert found["ZeRO-0"] == found["ZeRO-1"] == (2, 0, [])
        assert found["ZeRO-2"] == (2, 2 * STEPS, [])  # by DeepSpeed, whose host waits in each backward pass
        for stage in (0, 1):  # the controls: one of both streams never waits for the other
            assert any("reads" in race or "copy_" in race for race in found[f"{stage}, deaf main"][2])
            assert any("cat" in race or "copy_" in race or "div_" in race for race in found[f"{stage}, deaf reductions"][2])


# ---------------------------------------------------------------- bits


def trained() -> dict[int, list[tuple[int, list[float]]]]:
    """Returns by stage the bucket size and this rank's weights: in buckets, in one bucket, and after one more step."""
    from pretrain.engine import engine as engine_module
    from pretrain.engine import zero_state

    def weights(stage: int, steps: int = STEPS) -> tuple[int, list[float]]:
        engine, guard = build(stage)
        for number in range(steps):
            step(engine, guard, number)
        pieces = [piece.tensors["weight"] for piece in zero_state.list_pieces(engine)]
        return engine.zero_reduce_bucket_size(), torch.cat(pieces).tolist()

    found = {}
    for stage in range(4):
        with patch.object(engine_module, "choose_bucket_size", lambda model: WHOLE):
            one = weights(stage)
        found[stage] = [weights(stage), one, weights(stage, STEPS + 1)]
    return found


@pytest.mark.long
def test_buckets_change_no_bit() -> None:
    for found in run_on_ranks(2, trained):
        for (size, weights), (whole, expected), (_, control) in found.values():
            assert size < len(weights) < whole == WHOLE
            assert weights == expected
            assert weights != control


# ---------------------------------------------------------------- beside the backward pass


def counted() -> dict[tuple[int, bool], list[int]]:
    """Returns the parameters without a gradient at each reduction of a step, by stage and whether there are buckets."""
    from pretrain.engine import engine as engine_module

    def missing(stage: int) -> list[int]:
        engine, guard = build(stage)
        found, reduce = [], engine.reductions._reduce

        def count(number: int) -> None:
            found.append(sum(engine.reductions.missing))
            reduce(number)

        engine.reductions._reduce = count
        step(engine, guard, 0)
        return found

    found = {}
    for stage in (0, 1):
        found[stage, True] = missing(stage)
        with patch.object(engine_module, "choose_bucket_size", lambda model: WHOLE):
            found[stage, False] = missing(stage)
    return found


def test_reductions_begin_within_the_backward_pass() -> None:
    found = run_on_ranks(2, counted)[0]
    for stage in (0, 1):
        assert sum(missing > 0 for missing in found[stage, True]) >= 5
        assert found[stage, False] == [0]  # the control
