"""Measures top-1, top-5 and loss of a model on a packed dataset. Each image counts once, whatever the number of ranks.

Classes are matched by name. Outputs for classes that the data lacks are excluded from top-k and loss. So weights for ImageNet-22K can be
evaluated on ImageNet-1K, during training and by `python -m pretrain evaluate`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from data.common.text import join_first
from data.dataset.index import Index
from data.loader.loaders import EvalLoader
from pretrain.engine.precision import autocast

_MAX_EXCEPT = 20  # the most classes that an error proposes for data.val_except


@torch.inference_mode()
def evaluate(model: nn.Module, loader: EvalLoader, head: Sequence[str], precision: str) -> dict[str, Any]:
    """Evaluates a model with a head for the classes `head` on the classes of the data. Collective.

    Returns:
        top1 and top5 (0 to 1), loss (mean cross-entropy), images, skipped (bad images), classes (of the data).

    Raises:
        ValueError: the head lacks classes of the data, or no image can be used.
    """
    model.eval()
    outputs, targets = (torch.from_numpy(part).to(loader.device) for part in match_classes(head, loader.index, loader.settings.val_except))
    totals = torch.zeros(4, dtype=torch.float64, device=loader.device)  # images, correct, correct among five, sum of losses
    for batch in loader:
        with autocast(loader.device, precision):
            logits = model(batch.images).float()[:, outputs]
        labels = targets[batch.labels]
        loss = F.cross_entropy(logits, labels, reduction="sum")
        totals += torch.stack([torch.ones_like(loss) * len(labels), *count_correct(logits, labels), loss]).double()
    dist.all_reduce(totals)
    images, top1, top5, loss_sum = totals.tolist()
    if not images:
        raise ValueError(no_usable_image(loader))
    skipped = len(loader.samples) - int(images)
    accuracy = {"top1": top1 / images, "top5": top5 / images, "loss": loss_sum / images}
    return {"images": int(images), "skipped": skipped, "classes": len(outputs), **accuracy}


def format_result(result: dict[str, Any], place: str = "") -> str:
    """Formats a result of `evaluate` as text for one line."""
    skipped = f"; {result['skipped']} bad images skipped" if result["skipped"] else ""
    scores = f"top-1 {result['top1']:.2%}, top-5 {result['top5']:.2%}, loss {result['loss']:.4f}"
    return f"{scores} on {result['images']} images{place}{skipped}"


def count_correct(scores: Tensor, labels: Tensor) -> Tensor:
    """Counts the top-1 and the top-5 correct labels, int64 (n,), by scores (n, classes); returns (2,).

    A score of -inf or NaN is never correct.
    """
    best = scores.topk(min(5, scores.shape[1]), dim=1)
    correct = (best.indices == labels[:, None]) & (best.values > -torch.inf)
    return torch.stack([correct[:, 0].sum(), correct.sum()])


def match_classes(names: Sequence[str], index: Index, without: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Finds the classes of a dataset, except those in `without`, among `names`, the classes of a head or another dataset.

    Returns:
        The k positions in `names`, int64 (k,), in the order of the dataset's classes; and for each label of the dataset its position among
        the k, int64 (classes,).

    Raises:
        ValueError: `names` lacks classes of the dataset.
    """
    position = {name: number for number, name in enumerate(names)}
    kept = [name for name in index.classes if name not in without]
    missing = [name for name in kept if name not in position]
    if missing:
        if len(missing) <= _MAX_EXCEPT:
            remedy = f"leave their images out: data.val_except=[{','.join([*without, *missing])}]"
        else:
            remedy = f"classes are matched by name, and the others are {join_first(list(names))}"
        raise ValueError(
            f"{index.place}: {len(missing):,} of {len(index.classes):,} classes are not among the {len(names):,} that the weights are for: "
            f"{join_first(missing)}; {remedy}"
        )
    targets = np.cumsum([name not in without for name in index.classes]) - 1
    return np.array([position[name] for name in kept], np.int64), targets.astype(np.int64)


def describe_restriction(head: Sequence[str], index: Index, without: Sequence[str]) -> str | None:
    """Returns a line for the log if the data has only some of the head's classes, else None. Raises ValueError like `match_classes`."""
    outputs, _ = match_classes(head, index, without)
    if len(outputs) == len(head):
        return None
    left_out = f", without {join_first(without)}" if without else ""
    return f"head of {len(head):,} classes restricted to the {len(outputs):,} of {index.place}{left_out}"


def no_usable_image(loader: EvalLoader) -> str:
    place = loader.index.place
    return f"{place}: none of {len(loader.samples)} images can be used; `python -m data verify --deep {place}` lists the reasons"
