"""Runs timm's own model tests on the VAN family. They are not part of this repository; give the path of tests/test_models.py of a timm
checkout:

    python -m tests.timm_suite TIMM/tests/test_models.py [pytest options]

Tests that download pretrained weights, or that are written for one other model, are left out.
"""

import sys

import pytest
import timm

import pretrain.van  # noqa: F401  registers the family with timm

NAMES = ["van_b0", "van_b1"]
# The first three download weights; the last is for regnetx_002.
LEFT_OUT = "not load_pretrained and not features_pretrained and not model_inference and not torchscript_with_features_fx"


def main() -> int:
    path, *options = sys.argv[1:]
    timm.list_models = lambda *args, **kwargs: NAMES  # what the suite takes its parameters from
    return pytest.main([path, "-k", LEFT_OUT, "-p", "no:cacheprovider", "--rootdir", "/", "-W", "ignore", *options])


if __name__ == "__main__":
    sys.exit(main())
