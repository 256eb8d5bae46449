"""How well the features of a backbone tell classes apart, without its head: by nearest neighbours, and by a linear classifier.

A feature is the head's input, of the evaluation transform's image. The bank, of training images, is on every rank; each classifies its
own part of the others.

Nearest neighbours are those of DINO (Caron et al., ICCV 2021; eval_knn.py of facebookresearch/dino): the 20 nearest by cosine
similarity s vote for their classes with weights exp(s / 0.07).

The linear probe is logistic regression by L-BFGS on all of the bank, as for CLIP (Radford et al., ICML 2021, section A.3), on features
of mean 0 and variance 1. The penalty of the weights is fixed here where CLIP searches for the best, and so says a little less.
"""

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from data.common.counter_rng import Draw, hash64
from data.dataset.index import Index
from data.loader.loaders import EvalLoader
from pretrain.engine.precision import autocast
from pretrain.evaluation.accuracy import hits

NEIGHBOURS, TEMPERATURE = 20, 0.07
PENALTY = 1e-3  # of the squared weights, beside the mean cross-entropy
ITERATIONS = 200
_AT_ONCE = 1 << 26  # similarities or logits, of 4 bytes


def drawn_samples(index: Index, labels: np.ndarray, per_class: int) -> np.ndarray:
    """The ids of at most so many samples of each of these labels, int64, ascending; the same ones every time, and fewer of a class are
    among more of it."""
    ids = np.flatnonzero(np.isin(index.samples["label"], labels))
    own = index.samples["label"][ids]
    order = np.lexsort((hash64(Draw.PROBE, ids), own))
    first = np.searchsorted(own[order], own[order])
    return np.sort(ids[order[np.arange(len(ids)) - first < per_class]])


def features(model: nn.Module, loader: EvalLoader, precision: str) -> tuple[Tensor, Tensor]:
    """The features, float32 (n, head_hidden_size), and labels, int64 (n,), of this rank's images, on the device."""
    model.eval()
    found = [torch.empty(0, int(model.head_hidden_size), device=loader.device)]  # type: ignore[arg-type]
    labels = [torch.empty(0, dtype=torch.int64, device=loader.device)]
    for batch in loader:
        with torch.inference_mode(), autocast(loader.device, precision):
            own = model.forward_head(model.forward_features(batch.images), pre_logits=True).float()  # type: ignore[operator]
        found.append(own.clone())  # what inference mode made can take no part in a probe's gradient
        labels.append(batch.labels)
    return torch.cat(found), torch.cat(labels)


def knn_hits(bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor, classes: int) -> Tensor:
    """`hits` of this rank's queries, (2,), by their nearest neighbours in the bank; float32 (n, d) with int64 (n,) each. A class without
    a vote is never right, even where fewer than five have one."""
    bank, total = F.normalize(bank), torch.zeros(2, dtype=torch.int64, device=bank.device)
    rows = max(1, _AT_ONCE // max(len(bank), classes))
    for some, wanted in zip(F.normalize(queries).split(rows), labels.split(rows), strict=True):
        nearest = (some @ bank.T).topk(min(NEIGHBOURS, len(bank)), dim=1)
        votes = torch.zeros(len(some), classes, device=bank.device)
        votes.scatter_add_(1, bank_labels[nearest.indices], (nearest.values / TEMPERATURE).exp())
        total += hits(votes.log(), wanted)
    return total


class LinearProbe:
    """Fits logistic regression to a bank, float32 (n, d) and int64 (n,), which must be the same on all ranks. Collective."""

    def __init__(self, bank: Tensor, labels: Tensor, classes: int):
        self.mean, self.deviation = bank.mean(0), bank.std(0, correction=0).clamp_min(1e-6)
        self.weight = torch.zeros(classes, bank.shape[1], device=bank.device, requires_grad=True)
        self.bias = torch.zeros(classes, device=bank.device, requires_grad=True)
        self.rows = max(1, _AT_ONCE // classes)
        rank, ranks = dist.get_rank(), dist.get_world_size()
        own, own_labels = bank[rank::ranks], labels[rank::ranks]
        optimizer = torch.optim.LBFGS([self.weight, self.bias], max_iter=ITERATIONS, tolerance_grad=1e-5, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = torch.zeros((), device=bank.device)
            for part, wanted in zip(own.split(self.rows), own_labels.split(self.rows), strict=True):
                part_loss = F.cross_entropy(self.scores(part), wanted, reduction="sum") / len(bank)
                part_loss.backward()
                loss += part_loss.detach()
            penalty = PENALTY / 2 * self.weight.square().sum() / ranks
            penalty.backward()
            loss += penalty.detach()
            for shared in (loss, self.weight.grad, self.bias.grad):
                dist.all_reduce(shared)
            return loss

        optimizer.step(closure)

    def scores(self, features: Tensor) -> Tensor:
        """Logits (n, classes)."""
        return F.linear((features - self.mean) / self.deviation, self.weight, self.bias)

    @torch.no_grad()
    def hits(self, queries: Tensor, labels: Tensor) -> Tensor:
        """As `knn_hits`."""
        total = torch.zeros(2, dtype=torch.int64, device=queries.device)
        for some, wanted in zip(queries.split(self.rows), labels.split(self.rows), strict=True):
            total += hits(self.scores(some), wanted)
        return total
