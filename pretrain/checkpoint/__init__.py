"""Sharded checkpoints, complete or absent, that any number of ranks can load, in any ZeRO stage, and one process can read.

    RUN/checkpoints/step-000012500/   __RANK_0.distcp      a rank's pieces: raw bytes
                                      .metadata            the position of each piece in the files (torch.distributed.checkpoint)
                                      trainer.json         step, settings, evaluation
                                      MANIFEST.json        every file's size and checksum; written last
    RUN/checkpoints/latest            the newest one's name, for people and scripts; resuming looks at the folder itself
    RUN/lock-000001                   the job that trains in this run directory

A checkpoint holds named 1-D pieces of the flattened parameters, `weight/NAME`, `exp_avg/NAME`, `exp_avg_sq/NAME` and `ema/NAME`, and
BatchNorm's buffers, `buffer/NAME` and `buffer_ema/NAME`. A reader takes the part of a parameter that it needs from whichever files
hold it. Learning rate and data need no state: both follow from the step.

How a save works: the state is copied to host memory (on a GPU beside the next step, until its update). A thread writes this memory, each
rank its own file, into a directory with a temporary name, and hashes it meanwhile. Rank 0 adds the manifest, renames the directory,
replaces `latest`, and removes the checkpoints that retention.py selects. Every name is durable before anything depends on it.
"""

from pretrain.checkpoint.checkpoints import Checkpoints, SaveFailed
from pretrain.checkpoint.files import find_newest_whole, verify
from pretrain.checkpoint.lock import RunLock, lock_run
from pretrain.checkpoint.pieces import read_tensors
from pretrain.checkpoint.retention import Retention
from pretrain.run.directory import LATEST, MANIFEST, TRAINER, list_checkpoints

__all__ = [
    "LATEST",
    "MANIFEST",
    "TRAINER",
    "Checkpoints",
    "Retention",
    "RunLock",
    "SaveFailed",
    "find_newest_whole",
    "list_checkpoints",
    "lock_run",
    "read_tensors",
    "verify",
]
