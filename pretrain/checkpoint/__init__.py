"""Saves and loads sharded checkpoints, complete or absent, in any ZeRO stage and on any number of ranks.

    RUN/checkpoints/step-000012500/   __RANK_0.distcp      a rank's pieces: raw bytes
                                      .metadata            the position of each piece in the files (torch.distributed.checkpoint)
                                      trainer.json         step, settings, evaluation
                                      MANIFEST.json        every file's size and checksum; written last
    RUN/checkpoints/latest            the newest checkpoint's name, for people and scripts; resuming lists the folder instead
    RUN/lock-000001                   the job that trains in this run directory

A checkpoint holds named 1-D pieces of the flattened parameters, `weight/NAME`, `exp_avg/NAME`, `exp_avg_sq/NAME` and `ema/NAME`, and
BatchNorm's buffers, `buffer/NAME` and `buffer_ema/NAME`. A reader takes the parts of a parameter that it needs from whichever files hold
them. Learning rate and data need no state: both follow from the step.

A save copies the state to host memory (on a GPU during the next step, until its update). A thread on each rank writes and hashes this
memory, as a file in a directory with a temporary name. Rank 0 adds the manifest, renames the directory, replaces `latest`, and removes
the checkpoints that retention.py selects. Every name is durable before anything depends on it.
"""

from pretrain.checkpoint.checkpoints import Checkpoints, SaveFailed
from pretrain.checkpoint.files import find_newest_whole, verify
from pretrain.checkpoint.lock import lock_run
from pretrain.checkpoint.pieces import read_tensors
from pretrain.checkpoint.retention import Retention
from pretrain.run.directory import list_checkpoints

__all__ = ["Checkpoints", "Retention", "SaveFailed", "find_newest_whole", "list_checkpoints", "lock_run", "read_tensors", "verify"]
