"""Tests, in folders by package. Each process computes on one thread: several run at once, and sums keep their order.

Triton kernels run in its interpreter, on a CPU; TRITON_INTERPRET=0 runs their tests on a GPU.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported
