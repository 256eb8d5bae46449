"""Training steps: every case that a CPU can run, on images of a few pixels, and the handling of cases that fail."""

import json
from pathlib import Path

import pytest
import timm
import torch

from benchmarks.training import peer
from benchmarks.training.__main__ import main, shares
from benchmarks.training.step_cases import Case, Job, Step, all_cases, select_cases
from benchmarks.training.steps import best_batch, measure, row, start
from pretrain.model.van import VAN
from tests.support.ranks import run_on_ranks

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
JOB = Job("van_b0", 32, CPU, classes=10, drop_path=0.5)
# A file like the authors': functions with the names of the models, registered with timm, and the names of their weights.
AUTHORS_FILE = """
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
    (folder / "models" / "van.py").write_text(AUTHORS_FILE)
    return folder


def run_command(arguments: list[str]) -> int:
    """Runs the command in a process that is the only rank of a job, which the engine needs."""
    return main(arguments)


def test_all_cases_of_a_cpu_compute_the_same(authors: Path, tmp_path: Path) -> None:
    options = ["--image-size", "32", "--batch", "2", "--rounds", "2", "--out", str(tmp_path / "results")]
    options += ["--model", "van_b0", "van_b0"]  # a process measures several models
    assert run_on_ranks(1, run_command, arguments=["--cpu", "--peer", str(authors), *options]) == [0]
    (result,) = json.loads((tmp_path / "results" / "steps_cpu.json").read_text())
    assert str(authors) not in json.dumps(result)
    assert result["peer_sha256"] == peer.fingerprint(peer.load(authors))
    assert {"commit", "machine", "versions", "instructions", "threads"} <= result.keys()
    rows = {one["case"]: one for one in result["rows"]}
    assert list(rows) == ["peer_fp32", "peer_bf16", "ours_fp32", "ours_bf16", "engine"]
    for name, one in rows.items():
        assert len(one["images_per_s"]) == 2
        assert ("times_peer_bf16" in one) == (not name.startswith("peer"))
        assert 0 < one["share_of_product"] < 1
    # All start from the same weights, images and dropped paths. The engine's loss is that of the bare step, bit for bit.
    assert rows["ours_fp32"]["first_loss"] == pytest.approx(rows["peer_fp32"]["first_loss"], rel=1e-3)
    assert rows["ours_bf16"]["first_loss"] == pytest.approx(rows["ours_fp32"]["first_loss"], rel=1e-2)
    assert rows["engine"]["first_loss"] == rows["ours_bf16"]["first_loss"]


def test_cases_of_a_gpu_compute_the_same(authors: Path) -> None:
    """Only those that need neither Triton nor a compiler."""
    cases = {case.name: case for case in all_cases(torch.device("cuda"), peer.load(authors))}
    assert {case.batch_of for case in cases.values()} <= {None, *cases}
    names = ("peer_fp16", "peer_fp16_nhwc", "ours")
    steps = {name: start(cases[name], JOB, 2) for name in names}
    losses = {}
    for name, running in steps.items():
        torch.manual_seed(2)
        losses[name] = [float(running()) for _ in range(3)]
        assert running.images.is_contiguous(memory_format=torch.channels_last) == (name != "peer_fp16")
    assert losses["peer_fp16"][0] == pytest.approx(losses["ours"][0], rel=1e-2)
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
    assert main(["--cpu", "--cases", "ours_fp23"]) == 2
    assert "no ours_fp23 on this device; there are ours_fp32, ours_bf16, engine" in capsys.readouterr().err


def test_failing_case_does_not_stop_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    losses = iter([0.0, 0.0])

    def fails_in_a_round(job: Job) -> Step:
        return lambda images, labels: torch.tensor(next(losses))

    kernels = next(case for case in all_cases(torch.device("cuda"), None) if case.name == "ours_kernels")  # there is no GPU
    cases = [kernels, Case("late", fails_in_a_round), Case("well", lambda job: lambda images, labels: images.sum())]
    measured = measure(JOB, cases, batch=2, rounds=2)
    rows = [row(one, measured) for one in measured]
    assert "model.kernels=triton can't be" in rows[0]["failed"]
    assert rows[1]["failed"] == "StopIteration: no message"
    assert len(rows[2]["images_per_s"]) == 2
    assert capsys.readouterr().out.count("failed: ") == 2
    assert [sorted(shares(one, JOB, 1.0, 1.0)) for one in rows] == [[], [], ["share_of_product"]]


@pytest.mark.parametrize(
    ("fits", "rates", "first", "best", "sizes"),
    [
        (100, {}, 8, 64, [8, 16, 32, 64, 128]),  # the largest that fits
        (100, {32: 15}, 8, 16, [8, 16, 32]),  # no faster from there on
        (5, {}, 32, 4, [32, 16, 8, 4]),  # the first does not fit; no size is tried twice
    ],
)
def test_best_micro_batch(fits: int, rates: dict[int, float], first: int, best: int, sizes: list[int]) -> None:
    seen = []

    def images_per_s(batch: int) -> float:
        seen.append(batch)
        if batch > fits:
            raise torch.OutOfMemoryError
        return rates.get(batch, batch)

    assert best_batch(images_per_s, first) == best
    assert seen == sizes
    with pytest.raises(torch.OutOfMemoryError):
        best_batch(lambda batch: images_per_s(1000 * batch), first)


def test_case_that_holds_memory_runs_only_where_it_is_named() -> None:
    cases = all_cases(torch.device("cuda"), None)
    assert "engine_graphs" in [case.name for case in cases]
    assert "engine_graphs" not in [case.name for case in select_cases(cases, None)]
    assert [case.name for case in select_cases(cases, ["engine_graphs", "ours"])] == ["ours", "engine_graphs"]
