"""An index of ImageNet-22K's size keeps its limits, and the measurements detect one that does not."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.loader import index_at_scale
from benchmarks.loader.index_at_scale import (
    Figure,
    compare,
    count_bytes_on_disk,
    list_rows,
    main,
    measure,
    measure_mixing,
    run_ranks,
    simulate,
)
from data.dataset.index import Index, open_index
from data.loader.order import SampleOrder

LIMITS = [32, 1000, 20, 100, 0.1, 5]


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("simulated")
    simulate(folder, samples=2_000_000, shards=100)
    return folder


def test_simulated_dataset_lacks_only_images(simulated: Path) -> None:
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
    assert 20 < count_bytes_on_disk(simulated) / 2_000_000 < 32


COPIES: list[np.ndarray] = []


def copy_index(index: Index, rank: int, ranks: int) -> None:
    COPIES.append(np.array(index.samples))


@pytest.mark.slow
def test_private_memory_of_a_rank_excludes_shared_pages(simulated: Path) -> None:
    """The control: a copy of the index counts."""
    for rank in run_ranks(simulated, 2):
        assert 0 < rank.private < 25e6
        assert rank.opening > 0
    for rank in run_ranks(simulated, 2, use=copy_index):
        assert rank.private > 40e6


def test_exceeded_limit_sets_the_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    figures = [Figure("first", 1.0, "s", 2), Figure("second", 3.0, "s")]
    monkeypatch.setattr(index_at_scale, "measure", lambda samples, shards: figures)
    monkeypatch.setattr(index_at_scale, "measure_sorted_shards", lambda samples, shards: {"sorted": [{"order": "full permutation"}]})
    command = ["--samples", "50", "--shards", "5", "--out", str(tmp_path)]
    assert main(command) == 0
    figures.append(Figure("third", 2.5, "s", 2))
    capsys.readouterr()
    assert main(command) == 1
    assert capsys.readouterr().err == "third: 2.5 s exceeds the limit of 2\n"
    (result,) = json.loads((tmp_path / "index_at_scale.json").read_text())
    assert [row["measured"] for row in result["rows"]] == [1.0, 3.0, 2.5]


@pytest.mark.slow
def test_small_index_keeps_its_limits() -> None:
    """Times, which depend on other load of the machine, belong to the test at the size of ImageNet-22K."""
    figures = measure(200_000, 60)
    assert [figure.limit for figure in figures] == LIMITS
    assert all(figure.is_kept for figure in figures if figure.unit != "ms"), "\n".join(map(str, figures))


@pytest.mark.full
def test_index_of_imagenet_22k_keeps_its_limits() -> None:
    figures = measure()
    assert [figure.limit for figure in figures] == LIMITS
    assert all(figure.is_kept for figure in figures), "\n".join(map(str, figures))


# ---------------------------------------------------------------- mixing

SAMPLES, CLASSES, BATCH = 40_000, 400, 256
LABELS = np.arange(SAMPLES) * CLASSES // SAMPLES
SHARD_START = np.arange(0, SAMPLES + 1, 200)


def test_mixing_of_a_known_batch() -> None:
    labels, ids = np.array([0, 0, 0, 0, 1, 1, 2, 3]), np.arange(8)
    measured = measure_mixing(labels, [(0.5, ids)])
    assert (measured.entropy_bits, measured.classes, measured.pairs_of_one_class) == (1.75, 4, 0.75)  # 1/2, 1/4, 1/8, 1/8


def test_full_permutation_mixes_as_expected() -> None:
    full = compare(LABELS, SHARD_START, global_batch=BATCH, choices=[(8, 64)])["full permutation"]
    assert full.displacement == pytest.approx(1 / 3, abs=0.02)
    assert full.pairs_of_one_class == pytest.approx(1 / CLASSES, abs=0.002)
    assert full.classes == pytest.approx(CLASSES * (1 - (1 - 1 / CLASSES) ** BATCH), abs=3)


def test_more_lanes_and_larger_windows_mix_more() -> None:
    one, few, many, wide, full = compare(LABELS, SHARD_START, global_batch=BATCH, choices=[(1, 64), (8, 64), (64, 64), (8, 1024)]).values()
    assert one.classes < few.classes < many.classes
    assert few.classes < wide.classes < full.classes
    assert wide.pairs_of_one_class < few.pairs_of_one_class


def test_unpermuted_shards_have_a_small_displacement(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control of the limit on the displacement."""

    def displacement() -> float:
        return list_rows(compare(LABELS, SHARD_START, global_batch=BATCH, choices=[(64, 64)]))[0]["displacement"]

    assert displacement() > 0.85
    monkeypatch.setattr(SampleOrder, "batch", lambda order, epoch, step: np.arange(step * BATCH, (step + 1) * BATCH))
    assert displacement() < 0.05
