"""Runs timm's own model tests on the VAN family. They are not part of this repository: they are in the source archive of timm's release.

    pip download --no-deps --no-binary timm timm==1.0.31 && tar xf timm-1.0.31.tar.gz
    python -m tests.support.timm_suite timm-1.0.31/tests/test_models.py                          # all variants, minutes
    python -m tests.support.timm_suite timm-1.0.31/tests/test_models.py -k "van_b0 and not prune"  # any of pytest's options

Tests that are written for other models by name, and those of published weights, have nothing to run on here.
"""

import sys
from typing import Any

import pytest
import timm

import pretrain.model.van  # noqa: F401  registers the family with timm

every_model = timm.list_models


def van_models(filter: str | list[str] = "", module: str | list[str] = "", **options: Any) -> list[str]:
    """What the suite takes its parameters from: as timm's, except that models outside timm are not in any of its modules."""
    return [name for name in every_model(filter, **options) if name.startswith("van_b")]


def main() -> int:
    path, *options = sys.argv[1:]
    timm.list_models = van_models
    # The suite's package is called tests as well, so it is not imported as one.
    apart = ["--import-mode=importlib", "--noconftest", "--rootdir=/", "-p", "no:cacheprovider", "-W", "ignore"]
    return pytest.main([path, *apart, "-k", "van_b", *options])


if __name__ == "__main__":
    sys.exit(main())
