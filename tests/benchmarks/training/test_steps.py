"""Whole steps: every way that a CPU can take, at a few pixels, and what is done about those that fail."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from torch import Tensor

from benchmarks.training import peer
from benchmarks.training.__main__ import chosen, judged, main, table
from benchmarks.training.measure import Measured, best_batch, measure, ratios, row, start
from benchmarks.training.ways import Job, Step, Way, ways
from pretrain.model.van import VAN
from tests.support.ranks import run_on_ranks

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
JOB = Job("van_b0", 32, CPU, classes=10, drop_path=0.5)
# What the authors' file is to the benchmark: functions by the models' names, registered, and weights under their own names.
STAND_IN = """
from timm.models.layers import DropPath
from timm.models.registry import register_model
from torch import nn
from pretrain.model.van import VAN, VARIANTS
from pretrain.model.formats import from_format

class Theirs(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.van = VAN(**VARIANTS["van_b0"], **options)
    def forward(self, x):
        return self.van(x)
    def load_state_dict(self, state_dict):
        assert "patch_embed1.proj.weight" in state_dict
        self.van.load_state_dict(from_format(state_dict))

@register_model
def van_b0(pretrained=False, **options):
    return Theirs(**options)
"""


@pytest.fixture(scope="module")
def authors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like a checkout of their code."""
    folder = tmp_path_factory.mktemp("authors")
    (folder / "models").mkdir()
    (folder / "models" / "van.py").write_text(STAND_IN)
    return folder


def every_way(arguments: list[str]) -> int:
    """The command, in a process that is a job's only rank, as the engine wants one."""
    return main(arguments)


def test_every_way_of_a_cpu_in_one_run(authors: Path, tmp_path: Path) -> None:
    options = ["--image-size", "32", "--batch", "2", "--rounds", "2", "--out", str(tmp_path / "results")]
    assert run_on_ranks(1, every_way, arguments=["--cpu", "--peer", str(authors), *options]) == [0]
    (found,) = json.loads((tmp_path / "results" / "steps_cpu.json").read_text())
    assert str(authors) not in json.dumps(found)
    assert found["peer_sha256"] == peer.fingerprint(peer.load(authors))
    assert {"commit", "machine", "versions", "instructions", "threads"} <= found.keys()
    rows = {one["way"]: one for one in found["rows"]}
    assert list(rows) == ["peer_fp32", "peer_bf16", "own_fp32", "own_bf16", "engine"]
    for name, one in rows.items():
        assert len(one["rounds"]) == 2
        assert one["images_per_s"]["tenth"] <= one["images_per_s"]["median"] <= one["images_per_s"]["ninetieth"]
        assert ("times_the" in one) == (not name.startswith("peer"))
        assert 0 < one["share_of_product"] < 1
    # The same weights, images and dropped paths: what is compared computes the same. The engine's numbers are those of the bare step.
    assert rows["own_fp32"]["first_loss"] == pytest.approx(rows["peer_fp32"]["first_loss"], rel=1e-3)
    assert rows["own_bf16"]["first_loss"] == pytest.approx(rows["own_fp32"]["first_loss"], rel=1e-2)
    assert rows["engine"]["first_loss"] == rows["own_bf16"]["first_loss"]


def test_ways_of_a_gpu_take_the_same_step(authors: Path) -> None:
    """Those that need neither its kernels nor a compiler; with another seed the loss would be another."""
    found = {way.name: way for way in ways(torch.device("cuda"), peer.load(authors))}
    assert {way.batch_of for way in found.values()} <= {None, *found}
    names = ("peer_fp16", "peer_fp16_nhwc", "own")
    steps = {name: start(found[name], JOB, 2) for name in names}
    losses = {}
    for name, running in steps.items():
        torch.manual_seed(2)
        losses[name] = [float(running()) for _ in range(3)]
        assert running.images.is_contiguous(memory_format=torch.channels_last) == (name != "peer_fp16")
    assert losses["peer_fp16"][0] == pytest.approx(losses["own"][0], rel=1e-2)
    assert all(loss[2] != loss[0] for loss in losses.values())  # weights move


def test_timms_registry_keeps_our_models(authors: Path, tmp_path: Path) -> None:
    module = peer.load(authors)
    assert type(timm.create_model("van_b0")) is VAN
    assert type(peer.build(module, "van_b0", 10, 0.0)).__name__ == "Theirs"
    with pytest.raises(ValueError, match="has no van_b9"):
        peer.build(module, "van_b9", 10, 0.0)


def test_wrong_peer_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--cpu", "--peer", str(tmp_path)]) == 2
    assert "it has no models/van.py; name a checkout of the authors' VAN-Classification" in capsys.readouterr().err
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "van.py").write_text("import no_such_module")
    with pytest.raises(ValueError, match="can't be imported: No module named 'no_such_module'"):
        peer.load(tmp_path)
    assert main(["--cpu", "--ways", "own_fp23"]) == 2
    assert "no own_fp23 here; there are own_fp32, own_bf16, engine" in capsys.readouterr().err


def test_a_way_that_fails_is_told_and_the_others_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    later = iter([0.0, 0.0])

    def fails_in_a_round(job: Job) -> Step:
        return lambda images, labels: torch.tensor(next(later))

    kernels = next(way for way in ways(torch.device("cuda"), None) if way.name == "own_kernels")  # no GPU here
    tried = [kernels, Way("late", fails_in_a_round), Way("well", lambda job: lambda images, labels: images.sum())]
    rows = [row(one, found) for found in [measure(JOB, tried, batch=2, rounds=2)] for one in found]
    assert "model.kernels=triton can't be" in rows[0]["failed"]
    assert rows[1]["failed"] == "StopIteration: no message"
    assert len(rows[2]["rounds"]) == 2
    assert capsys.readouterr().out.count("failed: ") == 2
    assert sum("failed: " in line for line in table(judged(rows, JOB, 1.0, 1.0))) == 2


@pytest.mark.parametrize(
    ("room", "rates", "first", "best", "tried"),
    [
        (100, {}, 8, 64, [8, 16, 32, 64, 128]),  # as much as there is room for
        (100, {32: 15}, 8, 16, [8, 16, 32]),  # no faster from there on
        (5, {}, 32, 4, [32, 16, 8, 4]),  # the first has no room; what had none is not tried again
    ],
)
def test_the_best_micro_batch(room: int, rates: dict[int, float], first: int, best: int, tried: list[int]) -> None:
    seen = []

    def images_per_s(batch: int) -> float:
        seen.append(batch)
        if batch > room:
            raise torch.OutOfMemoryError
        return rates.get(batch, batch)

    assert best_batch(images_per_s, first) == best
    assert seen == tried
    with pytest.raises(torch.OutOfMemoryError):
        best_batch(lambda batch: images_per_s(1000 * batch), first)


def test_each_way_is_measured_at_its_best_micro_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that take as long whatever their batch, up to one that has no room; by a clock that nothing else moves."""
    now = 0.0
    monkeypatch.setattr("benchmarks.training.measure.time", SimpleNamespace(perf_counter=lambda: now))

    def roomy(room: int) -> Callable[[Job], Step]:
        def step(images: Tensor, labels: Tensor) -> Tensor:
            if len(images) > room:
                raise torch.OutOfMemoryError("no room")
            nonlocal now
            now += 0.01
            return images.sum()

        return lambda job: step

    tried = [Way("small", roomy(3)), Way("large", roomy(8)), Way("as small", roomy(8), batch_of="small")]
    found = measure(JOB, tried, batch=None, rounds=1, first=2)
    assert [one.batch for one in found] == [2, 8, 2]
    assert found[1].images_per_s[0] == pytest.approx(8 / 0.01)


def test_ratios_are_of_rounds() -> None:
    """A machine that slows down meets both alike."""
    one, other = (Measured(Way(name, lambda job: lambda images, labels: images), batch=2) for name in ("own", "peer"))
    one.step_s, other.step_s = [1.0, 10.0, 5.0], [2.0, 20.0, 10.0]
    assert ratios(one, [other]) == {"peer": 2.0}


def test_a_way_that_holds_memory_is_taken_only_where_it_is_named() -> None:
    all_ways = ways(torch.device("cuda"), None)
    assert "engine_graphs" in [way.name for way in all_ways]
    assert "engine_graphs" not in [way.name for way in chosen(all_ways, None)]
    assert [way.name for way in chosen(all_ways, ["engine_graphs", "own"])] == ["own", "engine_graphs"]
