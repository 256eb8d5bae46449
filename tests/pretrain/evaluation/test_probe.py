"""k-NN and linear-probe evaluation: against brute force and SciPy, on several ranks, and on a model that learns."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from data.common.placement import Placement
from data.dataset.index import Index, open_index
from data.loader.loaders import EvalLoader
from data.settings import DataConfig
from pretrain.engine import distributed
from pretrain.evaluation import probe
from pretrain.evaluation.probe import NEIGHBORS, PENALTY, TEMPERATURE, LinearProbe, extract_features, knn_correct, select_samples
from tests.support.ranks import run_on_ranks
from tests.support.tiny_runs import new_model

CPU = torch.device("cpu")


@pytest.fixture
def alone() -> Iterator[None]:
    """Makes this process a job of one rank."""
    distributed.join()
    yield
    distributed.stop()


def clouds(count: int, seed: int, classes: int = 7, width: int = 12, spread: float = 2.5) -> tuple[Tensor, Tensor]:
    """Draws features around a center for each class: overlapping, with a different scale in each dimension."""
    centers = torch.randn(classes, width, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    scale = torch.logspace(-1, 2, width)
    return (centers[labels] + spread * torch.randn(count, width, generator=generator)) * scale + 5, labels


# ---------------------------------------------------------------- selection


def test_the_selection_is_balanced_fixed_and_nested(drawn: Path) -> None:
    index = open_index(drawn / "train")  # twelve of each of ten classes
    labels = index.samples["label"]
    before: set[int] = set()
    for per_class in (1, 5, 12, 100):
        ids = select_samples(index, np.array([7, 2, 4]), per_class)
        assert ids.tolist() == sorted(set(ids.tolist()))
        assert np.bincount(labels[ids], minlength=10).tolist() == [min(per_class, 12) * (label in (7, 2, 4)) for label in range(10)]
        assert before < set(ids.tolist()) or per_class == 100
        before = set(ids.tolist())
    few = select_samples(index, np.arange(10), 3)
    assert few.tolist() == select_samples(open_index(drawn / "train"), np.arange(10), 3).tolist()
    assert len(set((few // 10).tolist())) > 6  # from the whole dataset, not the first of each class


# ---------------------------------------------------------------- k-NN


def brute_force(bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor, classes: int) -> list[int]:
    """Classifies one query at a time, in float64."""
    right = [0, 0]
    rows = bank.double().numpy() / np.linalg.norm(bank.double().numpy(), axis=1, keepdims=True)
    for query, label in zip(queries.double().numpy(), labels.tolist(), strict=True):
        similarity = rows @ (query / np.linalg.norm(query))
        votes = dict.fromkeys(range(classes), 0.0)
        for nearest in sorted(range(len(rows)), key=lambda row: -similarity[row])[:NEIGHBORS]:
            votes[int(bank_labels[nearest])] += np.exp(similarity[nearest] / TEMPERATURE)
        voted = [name for name in sorted(votes, key=lambda name: -votes[name]) if votes[name]]
        right[0] += label == voted[0]
        right[1] += label in voted[:5]
    return right


@pytest.mark.parametrize("at_once", [1 << 26, 1000])
def test_knn_is_that_of_brute_force(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(probe, "_CHUNK", at_once)  # 1000: three queries at a time
    bank, bank_labels = clouds(300, 1, classes=9)
    queries, labels = clouds(100, 2, classes=9)
    correct = knn_correct(bank, bank_labels, queries, labels, 9).tolist()
    assert correct == brute_force(bank, bank_labels, queries, labels, 9)
    assert 20 < correct[0] < correct[1] < 100


def test_knn_with_a_small_bank() -> None:
    """A class without a vote is not among the five best, though only two classes have votes."""
    bank, bank_labels = torch.eye(2), torch.tensor([3, 4])
    queries = torch.tensor([[1.0, 0.5]] * 10)
    assert [knn_correct(bank, bank_labels, queries[:1], torch.tensor([label]), 10).tolist() for label in range(10)] == [
        [0, 0], [0, 0], [0, 0], [1, 1], [0, 1], [0, 0], [0, 0], [0, 0], [0, 0], [0, 0],
    ]  # fmt: skip


# ---------------------------------------------------------------- the linear probe


def scipy_weights(bank: Tensor, labels: Tensor, classes: int) -> np.ndarray:
    """Returns the weights, (classes, d), that SciPy finds to minimize the penalized cross-entropy of standardized features, in float64."""
    x = bank.double().numpy()
    x = (x - x.mean(0)) / x.std(0)
    target = np.eye(classes)[labels.numpy()]

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weight, bias = flat[:-classes].reshape(classes, -1), flat[-classes:]
        logits = x @ weight.T + bias
        logits -= logits.max(1, keepdims=True)
        shares = np.exp(logits)
        shares /= shares.sum(1, keepdims=True)
        slope = (shares - target) / len(x)
        value = -np.log((shares * target).sum(1)).mean() + PENALTY / 2 * (weight**2).sum()
        return value, np.concatenate([(slope.T @ x + PENALTY * weight).ravel(), slope.sum(0)])

    start = np.zeros(classes * (x.shape[1] + 1))
    return minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 5000, "ftol": 1e-15}).x[:-classes].reshape(classes, -1)


@pytest.mark.usefixtures("alone")
def test_the_linear_probe_is_at_the_minimum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_CHUNK", 700)  # in pieces of a hundred rows
    bank, labels = clouds(400, 1)
    linear = LinearProbe(bank, labels, 7)
    expected = scipy_weights(bank, labels, 7)
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(linear.weight.detach().numpy(), expected, atol=5e-3)
    queries, target = clouds(150, 2)
    best = linear.scores(queries).detach().argsort(dim=1, descending=True)
    expected_hits = [int((best[:, 0] == target).sum()), int((best[:, :5] == target[:, None]).sum())]
    assert linear.correct(queries, target).tolist() == expected_hits
    assert 50 < expected_hits[0] < expected_hits[1] < 150
    assert torch.equal(LinearProbe(bank, labels, 7).weight, linear.weight)


# ---------------------------------------------------------------- on several ranks


def probing(skip: list[int]) -> dict[str, list]:
    """Probes as one rank, with its share of the queries and of the bank; the ranks in `skip` hold none of the bank."""
    distributed.join()
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    bank, bank_labels = clouds(101, 1)
    queries, labels = (part[rank::ranks] for part in clouds(50, 2))
    holding = [number for number in range(ranks) if number not in skip]
    share = slice(holding.index(rank), None, len(holding)) if rank in holding else slice(0, 0)
    bank, bank_labels = distributed.all_gather_rows(bank[share]), distributed.all_gather_rows(bank_labels[share])
    linear = LinearProbe(bank, bank_labels, 7)
    correct = torch.stack([knn_correct(bank, bank_labels, queries, labels, 7), linear.correct(queries, labels)])
    torch.distributed.all_reduce(correct)
    distributed.stop()
    return {"bank": sorted(bank[:, 0].tolist()), "hits": correct.tolist(), "weight": linear.weight.tolist()}


@pytest.mark.slow
def test_the_result_does_not_depend_on_the_number_of_ranks() -> None:
    expected = probing(skip=[])
    assert len(expected["bank"]) == 101
    results = run_on_ranks(3, probing, skip=[1])
    assert all(result["hits"] == expected["hits"] and result["bank"] == expected["bank"] for result in results)
    assert all(result["weight"] == results[0]["weight"] for result in results)
    np.testing.assert_allclose(results[0]["weight"], expected["weight"], atol=1e-3)


# ---------------------------------------------------------------- images


SETTINGS = DataConfig(image_size=32, decode_threads=1, read_threads=1)


def images_of(index: Index) -> tuple[Tensor, Tensor]:
    with EvalLoader(index, SETTINGS, Placement(CPU, micro_batch=64)) as loader:
        batches = list(loader)
    return torch.cat([batch.images for batch in batches]), torch.cat([batch.labels for batch in batches])


def test_features_are_the_input_of_the_head(drawn: Path) -> None:
    model, index = new_model(10), open_index(drawn / "val")
    with EvalLoader(index, SETTINGS, Placement(CPU, micro_batch=6), samples=np.array([1, 3, 17])) as loader:
        features, labels = extract_features(model, loader, "fp32")
    images, all_labels = images_of(index)
    with torch.no_grad():
        torch.testing.assert_close(model.head(features), model(images[[1, 3, 17]]), rtol=1e-4, atol=1e-5)  # type: ignore[operator]
    assert labels.tolist() == all_labels[[1, 3, 17]].tolist()
