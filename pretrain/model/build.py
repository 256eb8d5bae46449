"""Builds the model that a job's settings name."""

import timm
from torch import nn

import pretrain.model.van  # noqa: F401  registers the family with timm
from pretrain.config import Config


def build_model(config: Config) -> nn.Module:
    """Returns the model of `config.model` with freshly drawn weights."""
    return timm.create_model(config.model.name, num_classes=config.model.classes, drop_path_rate=config.model.drop_path)
