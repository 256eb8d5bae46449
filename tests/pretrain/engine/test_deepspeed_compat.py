"""The supported version of DeepSpeed is pinned and checked at the start."""

import re
import tomllib

import pytest
import torch
from torch import nn

from pretrain.engine import deepspeed_compat
from pretrain.engine.deepspeed_compat import SUPPORTED_VERSION
from tests.support import REPOSITORY


def test_the_supported_version_is_the_pinned_one() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert f"deepspeed=={SUPPORTED_VERSION}" in project["dependencies"]
    assert re.findall(r"^deepspeed==(\S+)", (REPOSITORY / "requirements.txt").read_text(), re.MULTILINE) == [SUPPORTED_VERSION]


def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    deepspeed_compat.require_supported_version()
    monkeypatch.setattr(deepspeed_compat, "version", lambda package: "0.20.1")
    with pytest.raises(
        ValueError, match=rf"DeepSpeed 0\.20\.1 is installed, but only DeepSpeed {re.escape(SUPPORTED_VERSION)} is supported"
    ):
        deepspeed_compat.initialize(nn.Identity(), torch.optim.SGD([torch.ones(1)]), {}, torch.device("cpu"))
