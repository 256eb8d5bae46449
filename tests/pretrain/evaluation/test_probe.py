"""Nearest neighbours and linear classifiers on features."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from torch import Tensor, nn

from data.common.placement import Placement
from data.dataset.index import Index, open_index
from data.loader.loaders import EvalLoader
from data.settings import DataConfig
from data.synthetic.synthesize import synthesize
from pretrain.engine import distributed
from pretrain.evaluation import probe
from pretrain.evaluation.probe import NEIGHBOURS, PENALTY, TEMPERATURE, LinearProbe, drawn_samples, features, knn_hits
from tests.support.ranks import run_on_ranks
from tests.support.tiny_runs import new_model

CPU = torch.device("cpu")


@pytest.fixture
def alone() -> Iterator[None]:
    """This process as a job's only rank."""
    distributed.join()
    yield
    distributed.stop()


def clouds(count: int, seed: int, classes: int = 7, width: int = 12, spread: float = 2.5) -> tuple[Tensor, Tensor]:
    """Features around a centre for each class, overlapping, of different scales in different directions."""
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    scale = torch.logspace(-1, 2, width)
    return (centres[labels] + spread * torch.randn(count, width, generator=generator)) * scale + 5, labels


# ---------------------------------------------------------------- which images


def test_the_images_of_a_bank(drawn: Path) -> None:
    index = open_index(drawn / "train")  # twelve of each of ten classes
    labels = index.samples["label"]
    before: set[int] = set()
    for per_class in (1, 5, 12, 100):
        ids = drawn_samples(index, np.array([7, 2, 4]), per_class)
        assert ids.tolist() == sorted(set(ids.tolist()))
        assert np.bincount(labels[ids], minlength=10).tolist() == [min(per_class, 12) * (label in (7, 2, 4)) for label in range(10)]
        assert before < set(ids.tolist()) or per_class == 100
        before = set(ids.tolist())
    few = drawn_samples(index, np.arange(10), 3)
    assert few.tolist() == drawn_samples(open_index(drawn / "train"), np.arange(10), 3).tolist()
    assert len(set((few // 10).tolist())) > 6  # from all over, not each class's first ones


# ---------------------------------------------------------------- nearest neighbours


def brute_force(bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor, classes: int) -> list[int]:
    """One query at a time, in float64."""
    right = [0, 0]
    rows = bank.double().numpy() / np.linalg.norm(bank.double().numpy(), axis=1, keepdims=True)
    for query, label in zip(queries.double().numpy(), labels.tolist(), strict=True):
        similarity = rows @ (query / np.linalg.norm(query))
        votes = dict.fromkeys(range(classes), 0.0)
        for nearest in sorted(range(len(rows)), key=lambda row: -similarity[row])[:NEIGHBOURS]:
            votes[int(bank_labels[nearest])] += np.exp(similarity[nearest] / TEMPERATURE)
        voted = [name for name in sorted(votes, key=lambda name: -votes[name]) if votes[name]]
        right[0] += label == voted[0]
        right[1] += label in voted[:5]
    return right


@pytest.mark.parametrize("at_once", [1 << 26, 1000])
def test_neighbours_are_those_of_brute_force(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(probe, "_AT_ONCE", at_once)  # the second: three queries at a time
    bank, bank_labels = clouds(300, 1, classes=9)
    queries, labels = clouds(100, 2, classes=9)
    found = knn_hits(bank, bank_labels, queries, labels, 9).tolist()
    assert found == brute_force(bank, bank_labels, queries, labels, 9)
    assert 20 < found[0] < found[1] < 100


def test_neighbours_of_a_small_bank() -> None:
    """Fewer than are asked, of two classes: the others have no vote, and can't be among the five best."""
    bank, bank_labels = torch.eye(2), torch.tensor([3, 4])
    queries = torch.tensor([[1.0, 0.5]] * 10)
    assert [knn_hits(bank, bank_labels, queries[:1], torch.tensor([label]), 10).tolist() for label in range(10)] == [
        [0, 0], [0, 0], [0, 0], [1, 1], [0, 1], [0, 0], [0, 0], [0, 0], [0, 0], [0, 0],
    ]  # fmt: skip


# ---------------------------------------------------------------- the linear probe


def scipys(bank: Tensor, labels: Tensor, classes: int) -> np.ndarray:
    """The weights, (classes, d), where SciPy finds the least penalised cross-entropy of standardised features, in float64."""
    x = bank.double().numpy()
    x = (x - x.mean(0)) / x.std(0)
    wanted = np.eye(classes)[labels.numpy()]

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weight, bias = flat[:-classes].reshape(classes, -1), flat[-classes:]
        logits = x @ weight.T + bias
        logits -= logits.max(1, keepdims=True)
        shares = np.exp(logits)
        shares /= shares.sum(1, keepdims=True)
        slope = (shares - wanted) / len(x)
        value = -np.log((shares * wanted).sum(1)).mean() + PENALTY / 2 * (weight**2).sum()
        return value, np.concatenate([(slope.T @ x + PENALTY * weight).ravel(), slope.sum(0)])

    start = np.zeros(classes * (x.shape[1] + 1))
    return minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 5000, "ftol": 1e-15}).x[:-classes].reshape(classes, -1)


@pytest.mark.usefixtures("alone")
def test_the_linear_probe_is_the_minimum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_AT_ONCE", 700)  # in pieces of a hundred rows
    bank, labels = clouds(400, 1)
    linear = LinearProbe(bank, labels, 7)
    expected = scipys(bank, labels, 7)
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(linear.weight.detach().numpy(), expected, atol=5e-3)
    queries, wanted = clouds(150, 2)
    best = linear.scores(queries).detach().argsort(dim=1, descending=True)
    expected_hits = [int((best[:, 0] == wanted).sum()), int((best[:, :5] == wanted[:, None]).sum())]
    assert linear.hits(queries, wanted).tolist() == expected_hits
    assert 50 < expected_hits[0] < expected_hits[1] < 150
    assert torch.equal(LinearProbe(bank, labels, 7).weight, linear.weight)


# ---------------------------------------------------------------- on several ranks


def probing(skip: list[int]) -> dict[str, list]:
    """One rank, which holds every so-manieth of the images; those that `skip` names hold none of the bank."""
    distributed.join()
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    bank, bank_labels = clouds(101, 1)
    queries, labels = (part[rank::ranks] for part in clouds(50, 2))
    holding = [number for number in range(ranks) if number not in skip]
    own = slice(holding.index(rank), None, len(holding)) if rank in holding else slice(0, 0)
    bank, bank_labels = distributed.all_gather_rows(bank[own]), distributed.all_gather_rows(bank_labels[own])
    linear = LinearProbe(bank, bank_labels, 7)
    found = torch.stack([knn_hits(bank, bank_labels, queries, labels, 7), linear.hits(queries, labels)])
    torch.distributed.all_reduce(found)
    distributed.stop()
    return {"bank": sorted(bank[:, 0].tolist()), "hits": found.tolist(), "weight": linear.weight.tolist()}


@pytest.mark.slow
def test_any_number_of_ranks_finds_the_same() -> None:
    expected = probing(skip=[])
    assert len(expected["bank"]) == 101
    results = run_on_ranks(3, probing, skip=[1])
    assert all(result["hits"] == expected["hits"] and result["bank"] == expected["bank"] for result in results)
    assert all(result["weight"] == results[0]["weight"] for result in results)
    np.testing.assert_allclose(results[0]["weight"], expected["weight"], atol=1e-3)


# ---------------------------------------------------------------- of images


SETTINGS = DataConfig(image_size=32, decode_threads=1, read_threads=1)


def images_of(index: Index) -> tuple[Tensor, Tensor]:
    with EvalLoader(index, SETTINGS, Placement(CPU, micro_batch=64)) as loader:
        batches = list(loader)
    return torch.cat([batch.images for batch in batches]), torch.cat([batch.labels for batch in batches])


def train(model: nn.Module, images: Tensor, labels: Tensor, steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(steps):
        batch = torch.randint(len(images), (16,), generator=torch.Generator().manual_seed(step))
        loss = F.cross_entropy(model.train()(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.usefixtures("alone")
def test_training_makes_features_better(tmp_path: Path) -> None:
    bank, queries = synthesize(tmp_path, classes=4, train=400, val=100)
    model = new_model(4)
    for name, scale in model.named_parameters():
        if "layer_scale" in name:
            scale.data.fill_(0.3)  # blocks that say something from the start, as there are only a hundred steps

    def right() -> tuple[int, int]:
        parts: list[Tensor] = []
        for index in (bank, queries):
            with EvalLoader(index, SETTINGS, Placement(CPU, micro_batch=64)) as loader:
                parts += features(model, loader, "fp32")
        known, known_labels, asked, labels = parts
        nearest = knn_hits(known, known_labels, asked, labels, 4)
        return int(nearest[0]), int(LinearProbe(known, known_labels, 4).hits(asked, labels)[0])

    before = right()
    train(model, *images_of(bank), steps=100)
    after = right()
    assert all(new >= old + 8 for new, old in zip(after, before, strict=True))


def test_features_are_what_the_head_is_given(drawn: Path) -> None:
    model, index = new_model(10), open_index(drawn / "val")
    with EvalLoader(index, SETTINGS, Placement(CPU, micro_batch=6), samples=np.array([1, 3, 17])) as loader:
        found, labels = features(model, loader, "fp32")
    images, all_labels = images_of(index)
    with torch.no_grad():
        torch.testing.assert_close(model.head(found), model(images[[1, 3, 17]]), rtol=1e-4, atol=1e-5)  # type: ignore[operator]
    assert labels.tolist() == all_labels[[1, 3, 17]].tolist()
