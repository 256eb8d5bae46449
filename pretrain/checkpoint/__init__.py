"""Sharded checkpoints: written whole or not at all, read by any number of ranks, in any ZeRO stage, or by one process.

    RUN/checkpoints/step-000012500/   __RANK_0.distcp      a rank's pieces: raw bytes
                                      .metadata            where in which file each piece lies (torch.distributed.checkpoint)
                                      trainer.json         step, settings, evaluation
                                      MANIFEST.json        every file's size and checksum; written last
    RUN/checkpoints/latest            the newest one's name, for people and scripts; resuming looks at the folder itself
    RUN/lock-000001                   who trains in this run directory

What is saved are named 1-D pieces of the flattened parameters, `weight/NAME`, `exp_avg/NAME`, `exp_avg_sq/NAME` and `ema/NAME`, and
BatchNorm's buffers, `buffer/NAME` and `buffer_ema/NAME`. torch.distributed.checkpoint knows where in a parameter each piece lies, so
a reader takes whatever part it needs from whichever files hold it. Learning rate and data need no state: both follow from the step.

    lock = hold(run, log.line)                                                       lock.py
    checkpoints = Checkpoints(run / "checkpoints", engine, stats, …)                 checkpoints.py, on pieces.py and staging.py
    trainer = checkpoints.load(identity)
    for each step: …; checkpoints.before_update(); engine.step(); checkpoints.save({"step": step, …})
    checkpoints.close()

    newest_whole(run / "checkpoints", print), verify(path), read(path, ("weight", "buffer"))   one process; files.py, pieces.py

How a save goes: the state is copied to host memory (on a GPU beside the next step, until its update); a thread writes it, each rank
its own file, into a directory of a temporary name, hashing as it writes; rank 0 adds the manifest, renames the directory, then
replaces `latest` and removes what retention.py lets go. Every name is made durable before anything builds on it.
"""

from pretrain.checkpoint.checkpoints import Checkpoints, SaveFailed
from pretrain.checkpoint.files import newest_whole, verify
from pretrain.checkpoint.lock import RunLock, hold
from pretrain.checkpoint.pieces import read
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
    "hold",
    "list_checkpoints",
    "newest_whole",
    "read",
    "verify",
]
