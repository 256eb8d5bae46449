"""The guard on two ranks in every ZeRO stage: skipped steps, clipping and the loss scale.

That no step waits for the device is tested in tests/pretrain/test_on_gpu.py.
"""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.support.configs import make_config
from tests.support.ranks import run_on_ranks

pytestmark = pytest.mark.slow

IMAGES, LABELS = (8, 3, 8, 8), torch.arange(8) % 3


def build_network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 3))


class Rank:
    """One rank of a job with a small network, two micro-batches a step and two samples a micro-batch."""

    def __init__(self, zero_stage: int, clip: float = 0.0, should_scale: bool = False, ema_decay: float = 0.9):
        from pretrain import config as settings
        from pretrain.engine import distributed
        from pretrain.engine.batch_stats import BatchStats
        from pretrain.engine.engine import build_engine
        from pretrain.engine.guard import Guard

        config = make_config(8, engine={"micro_batch": 2, "zero_stage": zero_stage, "ema_decay": ema_decay})
        if not dist.is_initialized():
            distributed.start(config.engine)
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.model = build_network()
        self.engine = build_engine(config, self.model, settings.accumulation(config, self.ranks))
        self.stats = BatchStats(self.model, config.engine.ema_decay)
        self.guard = Guard(self.engine, clip=clip, should_scale=should_scale)

    def step(self, number: int, poison: float | None = None, is_guarded: bool = True) -> Tensor:
        """Makes one update and returns the mean loss. `poison` multiplies the loss of the last rank's first micro-batch."""
        images = torch.randn(IMAGES, generator=torch.Generator().manual_seed(number))
        losses = []
        for micro_step, own in enumerate(torch.arange(8).view(self.ranks, -1, 2)[self.rank]):
            loss = nn.functional.cross_entropy(self.engine(images[own]).float(), LABELS[own])
            if poison is not None and micro_step == 0 and self.rank == self.ranks - 1:
                loss = loss * poison
            self.engine.backward(self.guard.scale_loss(loss))
            losses.append(loss.detach())
            if micro_step == 1:
                self.stats.start_averaging()
                self.guard.check()
                if not is_guarded:
                    self.engine.basic_optimizer.found_inf = None
            self.engine.step()
        self.stats.finish(self.guard.found_inf)
        return torch.stack(losses).mean()

    def copy_state(self) -> dict[str, Tensor]:
        from pretrain.engine import zero_state

        pieces = {f"{key}/{piece.name}": part for piece in zero_state.list_pieces(self.engine) for key, part in piece.tensors.items()}
        pieces |= {"steps": zero_state.get_step_counter(self.engine), "buffers": self.stats.flat, "buffers' average": self.stats.ema}
        return {name: tensor.detach().clone() for name, tensor in pieces.items()}


def list_changes(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    return [name for name, tensor in one.items() if not torch.equal(tensor, other[name])]


# ---------------------------------------------------------------- skipping


def run_poisoned_steps() -> dict[str, Any]:
    results: dict[str, Any] = {}
    for stage in range(4):
        for poison in (float("nan"), float("inf")):
            rank = Rank(stage)
            rank.step(0)
            rank.step(1)
            before = rank.copy_state()
            rank.step(2, poison)
            is_skipped, changed = bool(rank.guard.found_inf), list_changes(before, rank.copy_state())
            rank.step(3)
            after = rank.copy_state()
            is_finite = all(bool(tensor.isfinite().all()) for tensor in after.values())
            results[f"ZeRO-{stage}, {poison}"] = (is_skipped, changed, is_finite, float(after["steps"]))
    rank = Rank(1)
    rank.step(0)
    rank.step(1, float("nan"), is_guarded=False)
    results["unguarded is finite"] = all(bool(tensor.isfinite().all()) for tensor in rank.copy_state().values())
    return results


def test_a_step_that_is_not_finite_changes_nothing_on_any_rank() -> None:
    for results in run_on_ranks(2, run_poisoned_steps):
        assert results.pop("unguarded is finite") is False  # the control
        assert len(results) == 8
        assert results == dict.fromkeys(results, (True, [], True, 3.0))


# ---------------------------------------------------------------- clipping and the norm


def run_clipped_steps() -> dict[str, Any]:
    from pretrain.engine import zero_state

    results = {}
    for stage in range(4):
        for clip in (0.0, 0.05):
            rank = Rank(stage, clip, ema_decay=0.0)
            norms = []
            for number in range(3):
                rank.step(number)
                norms.append(float(rank.guard.norm))
            whole = zero_state.assemble_tensors(rank.engine, "weight")
            results[stage, clip] = (norms, {name: tensor.tolist() for name, tensor in whole.items()})
    return results


def train_with_torch_alone(clip: float) -> tuple[list[float], dict[str, list]]:
    """Trains the same in one process with torch.nn.utils.clip_grad_norm_ and torch's AdamW, on batches of two samples as the ranks do."""
    from pretrain.engine.optim import group_parameters

    model = build_network()
    optimizer, norms = torch.optim.AdamW(group_parameters(model, 0.05), lr=1e-2), []
    for number in range(3):
        images = torch.randn(IMAGES, generator=torch.Generator().manual_seed(number))
        for own in torch.arange(8).view(-1, 2):
            (nn.functional.cross_entropy(model(images[own]), LABELS[own]) / 4).backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), clip or torch.inf).item())
        optimizer.step()
        optimizer.zero_grad()
    return norms, {name: parameter.tolist() for name, parameter in model.named_parameters()}


def test_norm_and_clipping_equal_torchs() -> None:
    expected = {clip: train_with_torch_alone(clip) for clip in (0.0, 0.05)}
    for results in run_on_ranks(2, run_clipped_steps):
        for (stage, clip), (norms, weights) in results.items():
            expected_norms, expected_weights = expected[clip]
            assert norms == pytest.approx(expected_norms, rel=1e-3), (stage, clip)
            for name in weights.keys() - {"0.bias"}:  # BatchNorm cancels this bias, so its gradient is rounding
                weight, expected_weight = torch.tensor(weights[name]), torch.tensor(expected_weights[name])
                torch.testing.assert_close(weight, expected_weight, rtol=1e-3, atol=1e-4, msg=f"ZeRO-{stage}, {clip}: {name}")
    # AdamW hardly depends on the size of gradients, so assert that clipping has an effect here.
    assert expected[0.05][1]["3.bias"] != pytest.approx(expected[0.0][1]["3.bias"], rel=1e-3)


# ---------------------------------------------------------------- fp16's loss scale


def run_scaled_steps() -> dict[str, Any]:
    from pretrain.engine import guard as module

    module.GROWTH_INTERVAL = 3
    rank, plain, other = Rank(1, should_scale=True), Rank(1), Rank(1, should_scale=True)
    scales, skipped = [float(rank.guard.scale)], []
    for number in range(9):
        poison = float("inf") if number in (2, 3) else None
        rank.step(number, poison)
        plain.step(number, poison)
        scales.append(float(rank.guard.scale))
        skipped.append(bool(rank.guard.found_inf))
    state = rank.guard.state_dict()
    other.guard.load_state_dict(state)
    unscaled = plain.copy_state()
    is_close = all(torch.allclose(tensor, unscaled[name], rtol=1e-3, atol=1e-5) for name, tensor in rank.copy_state().items())
    return {"scales": scales, "skipped": skipped, "state": state, "loaded": other.guard.state_dict(), "close": is_close}


def test_an_overflow_halves_the_loss_scale_and_finite_steps_double_it() -> None:
    for results in run_on_ranks(2, run_scaled_steps):
        full = 2.0**16
        assert results["skipped"] == [False, False, True, True, False, False, False, False, False]
        assert results["scales"] == [full, full, full, full / 2, full / 4, full / 4, full / 4, full / 2, full / 2, full / 2]
        assert results["state"] == results["loaded"] == {"scale": full / 2, "growth": 2}
        assert results["close"]  # gradients are unscaled before the update
