"""What stands between gradients and weights, on two ranks in every ZeRO stage: skipping, clipping, the loss scale, no waiting."""

import threading
import traceback
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.faults import jobs as faults
from tests.support.ranks import run_on_ranks

pytestmark = pytest.mark.slow

CONFIG = {
    "name": "tiny", "seed": 1, "global_batch": 8, "epochs": 1.0, "model": {"name": "van_b0", "classes": 3}, "data": {"train": "unused"},
    "optim": {"lr": 1e-2}, "engine": {"ema_decay": 0.9, "device": "cpu", "precision": "fp32", "micro_batch": 2},
}  # fmt: skip
ENGINES = [{"zero_stage": stage} for stage in range(4)]
IMAGES, LABELS = (8, 3, 8, 8), torch.arange(8) % 3


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 3))


class Rank:
    """One rank of a job with a small network: two micro-batches a step of two samples each."""

    def __init__(self, clip: float = 0.0, scales: bool = False, **engine: Any):
        from pretrain import config as settings
        from pretrain.engine import distributed
        from pretrain.engine.batch_stats import BatchStats
        from pretrain.engine.engine import build_engine
        from pretrain.engine.guard import Guard

        config = settings.from_dict(CONFIG)
        for key, value in engine.items():
            setattr(config.engine, key, value)
        if not dist.is_initialized():
            distributed.start(config.engine)
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.model = network()
        self.engine = build_engine(config, self.model, settings.accumulation(config, self.ranks))
        self.stats = BatchStats(self.model, config.engine.ema_decay)
        self.guard = Guard(self.engine, clip=clip, should_scale=scales)

    def step(self, number: int, poison: float | None = None, protected: bool = True) -> Tensor:
        """Makes an update. `poison` multiplies the loss of the last rank's first micro-batch."""
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
                if not protected:
                    self.engine.basic_optimizer.found_inf = None
            self.engine.step()
        self.stats.finish(self.guard.found_inf)
        return torch.stack(losses).mean()

    def state(self) -> dict[str, Tensor]:
        from pretrain.engine import zero_state

        pieces = {f"{key}/{one.name}": part for one in zero_state.list_pieces(self.engine) for key, part in one.tensors.items()}
        pieces |= {"steps": zero_state.get_step_counter(self.engine), "buffers": self.stats.flat, "buffers' average": self.stats.ema}
        return {name: tensor.detach().clone() for name, tensor in pieces.items()}


def unequal(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    return [name for name, tensor in one.items() if not torch.equal(tensor, other[name])]


# ---------------------------------------------------------------- skipping


def poisoned() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for engine in ENGINES:
        for poison in (float("nan"), float("inf")):
            rank = Rank(**engine)
            rank.step(0)
            rank.step(1)
            before = rank.state()
            rank.step(2, poison)
            skipped, changed = bool(rank.guard.found_inf), unequal(before, rank.state())
            rank.step(3)
            after = rank.state()
            found[f"{engine}, {poison}"] = {
                "skipped": skipped, "changed": changed, "went on": "steps" in unequal(before, after),
                "finite": all(bool(tensor.isfinite().all()) for tensor in after.values()), "steps": float(after["steps"]),
            }  # fmt: skip
    rank = Rank(zero_stage=1)
    rank.step(0)
    rank.step(1, float("nan"), protected=False)
    found["unprotected"] = all(bool(tensor.isfinite().all()) for tensor in rank.state().values())
    return found


def test_a_step_that_is_not_finite_changes_nothing_on_any_rank() -> None:
    for found in run_on_ranks(2, poisoned):
        assert found.pop("unprotected") is False  # control
        assert len(found) == 2 * len(ENGINES)
        assert found == {case: {"skipped": True, "changed": [], "went on": True, "finite": True, "steps": 3.0} for case in found}


# ---------------------------------------------------------------- clipping and the norm


def clipped() -> dict[str, Any]:
    from pretrain.engine import zero_state

    found = {}
    for engine in ENGINES:
        for clip in (0.0, 0.05):
            rank = Rank(clip, ema_decay=0.0, **engine)
            norms = []
            for number in range(3):
                rank.step(number)
                norms.append(float(rank.guard.norm))
            whole = zero_state.assemble_tensors(rank.engine, "weight")
            found[f"{engine}, {clip}"] = (norms, {name: tensor.tolist() for name, tensor in whole.items()})
    return found


def by_torch_alone(clip: float) -> tuple[list[float], dict[str, list]]:
    """The same in one process, by torch.nn.utils.clip_grad_norm_ and torch's AdamW; statistics are of two samples, as there."""
    from pretrain.engine.optim import group_parameters

    model = network()
    optimizer, norms = torch.optim.AdamW(group_parameters(model, 0.05), lr=1e-2), []
    for number in range(3):
        images = torch.randn(IMAGES, generator=torch.Generator().manual_seed(number))
        for own in torch.arange(8).view(-1, 2):
            (nn.functional.cross_entropy(model(images[own]), LABELS[own]) / 4).backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), clip or torch.inf).item())
        optimizer.step()
        optimizer.zero_grad()
    return norms, {name: parameter.tolist() for name, parameter in model.named_parameters()}


def test_norm_and_clipping_are_torchs() -> None:
    for found in run_on_ranks(2, clipped):
        for case, (norms, weights) in found.items():
            expected_norms, expected = by_torch_alone(0.05 if case.endswith("0.05") else 0.0)
            assert norms == pytest.approx(expected_norms, rel=1e-3), case
            for name, weight in weights.items():
                if name == "0.bias":  # BatchNorm takes it out again: its gradient is rounding
                    continue
                torch.testing.assert_close(torch.tensor(weight), torch.tensor(expected[name]), rtol=1e-3, atol=1e-4, msg=f"{case}: {name}")
    # AdamW hardly minds the size of gradients, so see that clipping matters at all here.
    assert by_torch_alone(0.05)[1]["3.bias"] != pytest.approx(by_torch_alone(0.0)[1]["3.bias"], rel=1e-3)


# ---------------------------------------------------------------- fp16's loss scale


def scaled() -> dict[str, Any]:
    from pretrain.engine import guard as module

    module.GROWTH_INTERVAL = 3
    rank = Rank(scales=True, zero_stage=2)
    plain = Rank(zero_stage=2)
    scales, skipped, growths = [float(rank.guard.scale)], [], []
    for number in range(9):
        poison = float("inf") if number in (2, 3) else None
        rank.step(number, poison)
        plain.step(number, poison)
        scales.append(float(rank.guard.scale))
        skipped.append(bool(rank.guard.found_inf))
    state = rank.guard.state_dict()
    growths.append(state["growth"])
    other = Rank(scales=True, zero_stage=2)
    other.guard.load_state_dict(state)
    close = all(torch.allclose(tensor, plain.state()[name], rtol=1e-3, atol=1e-5) for name, tensor in rank.state().items())
    return {"scales": scales, "skipped": skipped, "state": state, "loaded": other.guard.state_dict(), "close": close}


def test_the_loss_scale_is_halved_by_overflows_and_doubles_when_there_are_none() -> None:
    for found in run_on_ranks(2, scaled):
        full = 2.0**16
        assert found["skipped"] == [False, False, True, True, False, False, False, False, False]
        assert found["scales"] == [full, full, full, full / 2, full / 4, full / 4, full / 4, full / 2, full / 2, full / 2]
        assert found["state"] == found["loaded"] == {"scale": full / 2, "growth": 2}
        assert found["close"]  # and it is taken out of the gradients again


# ---------------------------------------------------------------- nobody waits for the device


class Reads(TorchDispatchMode):
    """While entered, counts what makes this thread wait for a tensor's value: `.item()`, `bool(…)`, `.cpu()`, `.tolist()` and the like,
    and the operators behind them."""

    METHODS = ("cpu", "tolist", "numpy", "item", "__bool__", "__float__", "__int__")
    OPERATORS = ("aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._thread = threading.get_ident()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function._schema.name in self.OPERATORS:
            self._note(function._schema.name)
        return function(*args, **(kwargs or {}))

    def __enter__(self) -> "Reads":
        self._methods = {name: getattr(Tensor, name) for name in self.METHODS}
        for name, method in self._methods.items():
            setattr(Tensor, name, self._noted(name, method))
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        for name, method in self._methods.items():
            setattr(Tensor, name, method)

    def _noted(self, name: str, method: Any) -> Any:
        def call(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            self._note(name)
            return method(tensor, *args, **kwargs)

        return call

    def _note(self, name: str) -> None:
        if threading.get_ident() == self._thread:
            caller = next((f for f in reversed(traceback.extract_stack()) if "/torch/" not in f.filename and __file__ != f.filename), None)
            self.found.append(f"{name} in {caller}")


def read() -> dict[str, list[str]]:
    found = {}
    for engine in ENGINES[:2]:
        for kind in ("plain", "clips and scales"):
            rank = Rank(**engine) if kind == "plain" else Rank(1.0, True, **engine)
            rank.step(0)
            with Reads() as reads:
                rank.step(1)
            found[f"{engine}, {kind}"] = reads.found
    with Reads() as control:
        float(rank.guard.norm)
    return found | {"control": control.found}


def test_an_engines_step_reads_nothing_from_the_device() -> None:
    for found in run_on_ranks(2, read):
        assert found.pop("control") != []
        assert found == {case: [] for case in found}


def count_reads(file: Path, wrong: bool) -> None:
    """In a rank's process: what the loop of train.py reads between the beginnings of its third and its fifth step, to a file; also of a
    loss, if it is `wrong`."""
    from pretrain import train
    from pretrain.monitor.requests import Request, Requests

    rate, loss, answer, reads = train.learning_rate, train.mixed_cross_entropy, Requests.answer, Reads()

    def learning_rate(step: int, *args: Any) -> float:
        if step == 2:
            reads.__enter__()
        if step == 4:
            reads.__exit__(None, None, None)
            file.write_text("\n".join(reads.found))
        return rate(step, *args)

    def mixed_cross_entropy(*args: Any) -> Tensor:
        found = loss(*args)
        if wrong:
            found.item()
        return found

    def host_only(self: Requests) -> Request:
        before = len(reads.found)
        request = answer(self)
        del reads.found[before:]  # requests to stop and to save are on the host
        return request

    train.learning_rate, train.mixed_cross_entropy, Requests.answer = learning_rate, mixed_cross_entropy, host_only


@pytest.mark.parametrize("wrong", [False, True])
def test_the_loop_reads_nothing_from_the_device_between_log_lines(drawn: Path, tmp_path: Path, wrong: bool) -> None:
    quiet = ("model.classes=10", "run.log_every=100", "run.save_every=100", "run.eval_every=10", "guard.spike=2", "optim.clip_grad=1")
    ended = faults.run(tmp_path, drawn, *quiet, change=partial(count_reads, tmp_path / "reads", wrong))
    assert ended.codes == [0, 0], faults.log_of(tmp_path)
    assert ((tmp_path / "reads").read_text() != "") == wrong, (tmp_path / "reads").read_text()
