"""Imports the modules that take seconds to import, for the server process that forks the ranks of tests."""

from pretrain.__main__ import lasting_imports

with lasting_imports():
    import deepspeed  # noqa: F401
    import nvidia.dali.fn  # noqa: F401
    import torch._dynamo
    import torch.distributed.checkpoint
    import torch.utils.tensorboard  # noqa: F401

    import pretrain.train  # noqa: F401
