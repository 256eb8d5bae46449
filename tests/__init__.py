"""Tests, in folders as the packages'. Each process of theirs computes on one thread: several run at once, and sums keep their order.

Triton's kernels run in its interpreter, on a CPU. On a machine with a GPU, TRITON_INTERPRET=0 runs their tests on that.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported
