"""Accuracy of weights on a packed data set, each image counted once whatever the number of ranks."""

from typing import Any

import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import pretrain.van  # noqa: F401  registers the family with timm
from data.loader import EvalLoader
from pretrain.config import Config
from pretrain.engine import autocast


def build_model(config: Config) -> nn.Module:
    return timm.create_model(config.model.name, num_classes=config.model.classes, drop_path_rate=config.model.drop_path)


def fill(model: nn.Module, parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> None:
    """Copies weights into a model by parameter name, in the layout that parameters are stored in; flat tensors are given shape."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(parameters[name].view(parameter.shape))
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name].view(buffer.shape))


@torch.inference_mode()
def evaluate(model: nn.Module, loader: EvalLoader, precision: str) -> dict[str, Any]:
    """Top-1 and top-5 accuracy (0 to 1), mean cross-entropy, number of images and of bad ones that were left out. Collective where
    ranks are joined."""
    model.eval()
    totals = torch.zeros(4, dtype=torch.float64, device=loader.device)  # images, right, right among five, sum of losses
    for batch in loader:
        with autocast(loader.device.type, precision):
            logits = model(batch.images).float()
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices == batch.labels[:, None]
        loss = F.cross_entropy(logits, batch.labels, reduction="sum")
        totals += torch.stack([torch.ones_like(loss) * len(logits), best[:, 0].sum(), best.sum(), loss]).double()
    if dist.is_initialized():
        dist.all_reduce(totals)
    images, top1, top5, loss_sum = totals.tolist()
    left_out = len(loader.index) - int(images)
    return {"images": int(images), "left_out": left_out, "top1": top1 / images, "top5": top5 / images, "loss": loss_sum / images}
