"""Settings of small jobs for tests."""

from typing import Any

from pretrain import config as settings
from pretrain.config import Config


def make_config(global_batch: int = 4, classes: int = 3, lr: float = 1e-2, **sections: dict[str, Any]) -> Config:
    """Returns the settings of a job that trains VAN-B0 on the CPU in fp32; `sections` adds settings, such as engine={"zero_stage": 2}."""
    values: dict[str, dict[str, Any]] = {
        "model": {"name": "van_b0", "classes": classes}, "data": {"train": "unused"}, "optim": {"lr": lr},
        "engine": {"device": "cpu", "precision": "fp32"},
    }  # fmt: skip
    return settings.from_dict(
        {
            "name": "tiny", "seed": 1, "global_batch": global_batch, "epochs": 1.0,
            **{section: values.get(section, {}) | sections.get(section, {}) for section in values.keys() | sections.keys()},
        }
    )  # fmt: skip
