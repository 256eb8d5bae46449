import json
from mmap import PAGESIZE, mmap
from pathlib import Path

import numpy as np
import pytest

import benchmarks.loader.index_at_scale
from benchmarks.loader.index_at_scale import Figure, bench, bytes_on_disk, main, private_bytes, ranks_of_a_node, simulate, slowest_step
from data.dataset.index import Index, open_index
from data.inspect.shuffle import Quality, Row

PROMISES = [32, 1000, None, 20, 100, None, 0.1, 5]


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("simulated")
    simulate(folder, samples=2_000_000, shards=100)
    return folder


def test_the_dataset_is_real_but_for_its_images(simulated: Path) -> None:
    index = open_index(simulated)
    assert len(index) == 2_000_000
    assert len(index.shards) == 100
    assert len(index.classes) == 21_841
    assert index.samples["label"].max() < 21_841
    ends = index.samples["offset"].astype(int) + index.samples["size"]
    for number in (0, 57, 99):
        first, end = index.shard_start[number : number + 2]
        assert (index.samples["offset"][first + 1 : end] > ends[first : end - 1]).all(), "images do not overlap"
        assert ends[end - 1] <= index.shards[number].bytes
    assert sum(path.stat().st_blocks for path in simulated.glob("*.tar")) == 0, "shards are holes"
    assert 20 < bytes_on_disk(simulated) / 2_000_000 < 32


COPIES: list[np.ndarray] = []


def copies(index: Index, rank: int, ranks: int) -> None:
    """What a rank must not do."""
    COPIES.append(np.array(index.samples))


@pytest.mark.slow
def test_memory_is_private_or_shared(simulated: Path) -> None:
    """The measurement sees a copy of the index for what it is, and pages that all ranks map not at all."""
    shared = ranks_of_a_node(simulated, 2)
    copied = ranks_of_a_node(simulated, 2, use=copies)
    assert len(shared) == 2
    for rank in shared:
        assert 0 < rank.private < 25e6
        assert 0 < rank.opening < 1
    for rank in copied:
        assert rank.private > 40e6


def test_private_bytes() -> None:
    """Of pages mapped for it alone: an array may lie in memory that malloc has kept. Of three looks, as a kernel that
    reclaims pages of files meanwhile can take some away from one."""
    grown = []
    for _ in range(3):
        before = private_bytes()
        with mmap(-1, 40_000_000) as pages:
            pages[::PAGESIZE] = b"x" * len(range(0, len(pages), PAGESIZE))
            grown.append(private_bytes() - before)
    assert 38e6 < sorted(grown)[1] < 45e6


@pytest.mark.slow
def test_the_slowest_step_is_the_slowest(simulated: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from data.loader.order import SampleOrder

    index = open_index(simulated)
    monkeypatch.setattr(benchmarks.loader.index_at_scale, "_ROUNDS", 1)
    steps = []
    real = SampleOrder.batch

    def batch(order: SampleOrder, epoch: int, step: int) -> np.ndarray:
        steps.append((epoch, step))
        return real(order, epoch, step)

    monkeypatch.setattr(SampleOrder, "batch", batch)
    usual = slowest_step(index)
    assert len(set(steps)) > 250
    assert {epoch for epoch, _ in steps} == set(range(90))
    slow = steps[100]

    def one_slow(order: SampleOrder, epoch: int, step: int) -> np.ndarray:
        if (epoch, step) == slow:
            return np.concatenate([real(order, other, step) for other in range(100, 150)])[: order.global_batch]
        return real(order, epoch, step)

    monkeypatch.setattr(SampleOrder, "batch", one_slow)
    assert slowest_step(index) > 3 * usual


def test_a_broken_promise_is_the_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    figures = [Figure("first", 1.0, "s", 2), Figure("second", 3.0, "s")]
    monkeypatch.setattr("benchmarks.loader.index_at_scale.bench", lambda samples, shards: figures)
    rows = [Row(4, 5, Quality(0.3, 0.5, 0.25, 6, 2.5)), Row(None, None, Quality(0.4, 0.0, 0.1, 9, 3.5))]
    monkeypatch.setattr("benchmarks.loader.index_at_scale.sorted_shards", lambda samples, shards: {"sorted": rows})
    command = ["--samples", "50", "--shards", "5", "--out", str(tmp_path)]
    assert main(command) == 0
    assert main(command) == 0
    figures.append(Figure("third", 2.5, "s", 2))
    capsys.readouterr()
    assert main(command) == 1
    first, second, third, *shuffled = capsys.readouterr().out.splitlines()
    assert first.endswith("promised at most 2")
    assert "promised" not in second
    assert third.endswith("promised at most 2: BROKEN")
    (result,) = json.loads((tmp_path / "index_at_scale.json").read_text())
    assert result["command"] == "python -m benchmarks.loader.index_at_scale --samples 50 --shards 5"
    assert [row["measured"] for row in result["rows"]] == [1.0, 3.0, 2.5]
    assert shuffled[:2] == ["", "sorted"]
    assert shuffled[3].split() == ["4", "5", "75.0%", "0.50", "25.0%", "6", "2.50", "bits"]
    assert shuffled[4].split() == ["full", "permutation", "100.0%", "0.00", "10.0%", "9", "3.50", "bits"]
    assert result["shuffle"]["sorted"][0]["quality"]["classes"] == 6


@pytest.mark.slow
def test_small() -> None:
    """Times, which depend on what else the machine does, are for `test_at_the_size_of_imagenet_22k`, on a quiet one."""
    figures = bench(200_000, 60)
    assert [figure.promised for figure in figures] == PROMISES
    assert all(figure.kept for figure in figures if figure.unit != "ms"), "\n".join(map(str, figures))


@pytest.mark.full
def test_at_the_size_of_imagenet_22k() -> None:
    figures = bench()
    assert [figure.promised for figure in figures] == PROMISES
    assert all(figure.kept for figure in figures), "\n".join(map(str, figures))
