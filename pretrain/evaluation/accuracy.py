"""Accuracy of weights on a packed data set, each image counted once whatever the number of ranks.

Classes are matched by name. Where those of the data are a part of the head's, its other outputs take no part in top-k and loss: so
weights for ImageNet-22K are judged on ImageNet-1K, while they are trained and afterwards (judge.py).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from data.dataset.index import Index
from data.loader.loaders import EvalLoader
from pretrain.engine.precision import autocast
from pretrain.model.formats import some

_NAMED = 20  # classes that an error offers to leave out


@torch.inference_mode()
def evaluate(model: nn.Module, loader: EvalLoader, head: Sequence[str], precision: str) -> dict[str, Any]:
    """Top-1 and top-5 accuracy (0 to 1) and mean cross-entropy among the classes of the data, their number, the number of images and of
    bad ones that were left out. `head` names the classes of the model's outputs. Collective.

    Raises:
        ValueError: the head lacks classes of the data, or no image can be used.
    """
    model.eval()
    rows, targets = (torch.from_numpy(part).to(loader.device) for part in matched(head, loader.index, loader.settings.val_except))
    totals = torch.zeros(4, dtype=torch.float64, device=loader.device)  # images, right, right among five, sum of losses
    for batch in loader:
        with autocast(loader.device, precision):
            logits = model(batch.images).float()[:, rows]
        labels = targets[batch.labels]
        loss = F.cross_entropy(logits, labels, reduction="sum")
        totals += torch.stack([torch.ones_like(loss) * len(labels), *hits(logits, labels), loss]).double()
    dist.all_reduce(totals)
    images, top1, top5, loss_sum = totals.tolist()
    if not images:
        raise ValueError(none_left(loader))
    left_out = len(loader.samples) - int(images)
    accuracy = {"top1": top1 / images, "top5": top5 / images, "loss": loss_sum / images}
    return {"images": int(images), "left_out": left_out, "classes": len(rows), **accuracy}


def hits(scores: Tensor, labels: Tensor) -> Tensor:
    """How many of these labels, int64 (n,), have the highest of their scores (n, classes), and how many one of the five highest; (2,). A
    score of -inf or NaN is never right."""
    best = scores.topk(min(5, scores.shape[1]), dim=1)
    right = (best.indices == labels[:, None]) & (best.values > -torch.inf)
    return torch.stack([right[:, 0].sum(), right.sum()])


def matched(names: Sequence[str], index: Index, without: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Where the classes of a data set, but for those `without`, are among `names`: their places there, int64 (k,), in the data set's
    order; and the place in that of each of its labels, int64 (classes,).

    Raises:
        ValueError: some are not there.
    """
    place = {name: number for number, name in enumerate(names)}
    judged = [name for name in index.classes if name not in without]
    lacking = [name for name in judged if name not in place]
    if lacking:
        if len(lacking) <= _NAMED:
            mend = f"leave their images out: data.val_except=[{','.join([*without, *lacking])}]"
        else:
            mend = f"classes are matched by name, and the others are {some(list(names))}"
        raise ValueError(
            f"{index.place}: {len(lacking):,} of {len(index.classes):,} classes are not among the {len(names):,} that the weights are for: "
            f"{some(lacking)}; {mend}"
        )
    targets = np.cumsum([name not in without for name in index.classes]) - 1
    return np.array([place[name] for name in judged], np.int64), targets.astype(np.int64)


def restriction(head: Sequence[str], index: Index, without: Sequence[str]) -> str | None:
    """What is to be said where not all classes of a head take part. Raises ValueError as `matched`."""
    rows, _ = matched(head, index, without)
    if len(rows) == len(head):
        return None
    left_out = f", without {some(without)}" if without else ""
    return f"head of {len(head):,} classes restricted to the {len(rows):,} of {index.place}{left_out}"


def none_left(loader: EvalLoader) -> str:
    place = loader.index.place
    return f"{place}: none of {len(loader.samples)} images can be used; `python -m data verify --deep {place}` says why"
