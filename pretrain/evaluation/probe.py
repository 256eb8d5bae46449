"""k-NN and linear-probe evaluation on frozen features: how well a backbone separates classes without its head.

A feature is the head's input for an image under the evaluation transform. Every rank holds the whole bank (the features of the training
images) and classifies its share of the queries.

The k-NN classifier is DINO's (Caron et al., ICCV 2021; eval_knn.py of facebookresearch/dino): the 20 nearest neighbors by cosine similarity
s vote for their classes with weights exp(s / 0.07).

The linear probe is logistic regression by L-BFGS on the whole bank, as for CLIP (Radford et al., ICML 2021, section A.3), on features with
mean 0 and variance 1. CLIP searches for the best weight penalty; here it is fixed, so the accuracy may be slightly lower.
"""

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from data.common.counter_rng import Draw, hash64
from data.dataset.index import Index
from data.loader.loaders import EvalLoader
from pretrain.engine.precision import autocast
from pretrain.evaluation.accuracy import count_correct

NEIGHBORS, TEMPERATURE = 20, 0.07
PENALTY = 1e-3  # PENALTY / 2 times the squared weights is added to the mean cross-entropy
ITERATIONS = 200
_CHUNK = 1 << 26  # similarities or logits computed at once, 4 bytes each


def select_samples(index: Index, labels: np.ndarray, per_class: int) -> np.ndarray:
    """Returns the ids of at most `per_class` samples of each label, int64, ascending.

    The selection is deterministic, and a smaller one is a subset of a larger one.
    """
    ids = np.flatnonzero(np.isin(index.samples["label"], labels))
    label = index.samples["label"][ids]
    order = np.lexsort((hash64(Draw.PROBE, ids), label))
    first = np.searchsorted(label[order], label[order])
    return np.sort(ids[order[np.arange(len(ids)) - first < per_class]])


def extract_features(model: nn.Module, loader: EvalLoader, precision: str) -> tuple[Tensor, Tensor]:
    """Returns the features of this rank's images, float32 (n, width of the head's input), and labels, int64 (n,)."""
    model.eval()
    width: Any = getattr(model, "head_hidden_size", model.num_features)
    features = [torch.empty(0, width, device=loader.device)]
    labels = [torch.empty(0, dtype=torch.int64, device=loader.device)]
    for batch in loader:
        with torch.inference_mode(), autocast(loader.device, precision):
            output = model.forward_head(model.forward_features(batch.images), pre_logits=True).float()  # type: ignore[operator]
        features.append(output.clone())  # a tensor of inference mode can't take part in the probe's gradient
        labels.append(batch.labels)
    return torch.cat(features), torch.cat(labels)


def knn_correct(bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Counts the top-1 and top-5 correct predictions of the k-NN classifier, (2,), as `count_correct` does.

    `bank` is float32 (m, d), `queries` (n, d), and the labels of both are int64 from 0 to `classes` - 1. A class without votes never counts
    as correct, even if fewer than five classes have votes.
    """
    bank, total = F.normalize(bank), torch.zeros(2, dtype=torch.int64, device=bank.device)
    rows = max(1, _CHUNK // max(len(bank), classes))
    for chunk, chunk_labels in zip(F.normalize(queries).split(rows), labels.split(rows), strict=True):
        nearest = (chunk @ bank.T).topk(min(NEIGHBORS, len(bank)), dim=1)
        votes = torch.zeros(len(chunk), classes, device=bank.device)
        votes.scatter_add_(1, bank_labels[nearest.indices], (nearest.values / TEMPERATURE).exp())
        total += count_correct(votes.log(), chunk_labels)
    return total


class LinearProbe:
    """Logistic regression, fitted on construction to a bank, float32 (m, d), equal on all ranks, and its labels. Collective."""

    def __init__(self, bank: Tensor, labels: Tensor, classes: int):
        self.mean, self.deviation = bank.mean(0), bank.std(0, correction=0).clamp_min(1e-6)
        self.weight = torch.zeros(classes, bank.shape[1], device=bank.device, requires_grad=True)
        self.bias = torch.zeros(classes, device=bank.device, requires_grad=True)
        self.rows = max(1, _CHUNK // classes)
        rank, ranks = dist.get_rank(), dist.get_world_size()
        share, share_labels = bank[rank::ranks].split(self.rows), labels[rank::ranks].split(self.rows)
        optimizer = torch.optim.LBFGS([self.weight, self.bias], max_iter=ITERATIONS, tolerance_grad=1e-5, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = torch.zeros((), device=bank.device)
            for chunk, chunk_labels in zip(share, share_labels, strict=True):
                chunk_loss = F.cross_entropy(self.scores(chunk), chunk_labels, reduction="sum") / len(bank)
                chunk_loss.backward()
                loss += chunk_loss.detach()
            penalty = PENALTY / 2 * self.weight.square().sum() / ranks
            penalty.backward()
            loss += penalty.detach()
            for tensor in (loss, self.weight.grad, self.bias.grad):
                dist.all_reduce(tensor)
            return loss

        optimizer.step(closure)

    def scores(self, features: Tensor) -> Tensor:
        """Maps features (n, d) to logits (n, classes)."""
        return F.linear((features - self.mean) / self.deviation, self.weight, self.bias)

    @torch.no_grad()
    def correct(self, queries: Tensor, labels: Tensor) -> Tensor:
        """Counts the top-1 and top-5 correct predictions of the probe, (2,), as `count_correct` does."""
        total = torch.zeros(2, dtype=torch.int64, device=queries.device)
        for chunk, chunk_labels in zip(queries.split(self.rows), labels.split(self.rows), strict=True):
            total += count_correct(self.scores(chunk), chunk_labels)
        return total
