"""Tests, in folders as the packages'. Each process of theirs computes on one thread: several run at once, and sums keep their order."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
