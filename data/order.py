"""Sample order: pure functions from (seed, epoch, step) to the sample ids of the whole global batch, and a rank's part of it.

    order = SampleOrder(index.shard_start, seed=0, global_batch=8192)
    epoch, step_in_epoch = order.locate(step)
    ids = order.batch(epoch, step_in_epoch)[rank_slice(8192, rank, ranks)]

How an epoch is laid out, for N samples, a global batch of G, S = N // G steps and L lanes:

    1. the shards are permuted by (seed, epoch) and laid end to end: a sequence of N positions;
    2. that sequence is rotated by an offset drawn from (seed, epoch), and its first S*G positions are used, so the N - S*G that
       can't fill a batch are others in each epoch, even of a single shard;
    3. the S*G positions are cut into L lanes of equal length;
    4. in every lane, windows of W consecutive positions are permuted, each by (seed, epoch, lane, window);
    5. step k takes the next g = G/L positions of every lane; the global batch is laid out lane by lane (slot = lane * g + j).

A rank owns a contiguous part of the slots and so whole lanes (or, with more ranks than lanes, an equal share of one): it
reads its own shards nearly in sequence, while one global batch mixes L windows of different shards. Nothing here depends on
the number of ranks, and any step costs the same: only the windows it touches are permuted.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from data.draws import Draw, hash64, permutation


def lanes_for(global_batch: int, lanes: int) -> int:
    """The largest divisor of the global batch up to `lanes`: every lane gives equally many samples to a step."""
    return next(count for count in range(min(lanes, global_batch), 0, -1) if global_batch % count == 0)


def rank_slice(global_batch: int, rank: int, ranks: int) -> slice:
    """The slots of the global batch that `rank` of `ranks` owns.

    Raises ValueError when the global batch can't be shared equally.
    """
    if global_batch % ranks:
        fit = [count for count in range(1, min(global_batch, 2 * ranks) + 1) if global_batch % count == 0]
        raise ValueError(
            f"a global batch of {global_batch} can't be shared equally by {ranks} ranks; "
            f"numbers of ranks that work: {', '.join(map(str, fit))}"
        )
    share = global_batch // ranks
    return slice(rank * share, (rank + 1) * share)


def evaluation_ids(samples: int, rank: int, ranks: int) -> np.ndarray:
    """The sample ids that `rank` of `ranks` evaluates, int64: every sample falls to exactly one rank."""
    return np.arange(rank, samples, ranks, dtype=np.int64)


@dataclass(frozen=True, eq=False)  # eq=False: hashed by identity, for the cache of an epoch's layout
class SampleOrder:
    """The order of a run. `shard_start` is int64 (shards + 1,): the id of each shard's first sample, then their number.

    Raises ValueError when the dataset has fewer samples than one global batch.
    """

    shard_start: np.ndarray
    seed: int
    global_batch: int
    lanes: int = 64
    window: int = 2048

    def __post_init__(self) -> None:
        if self.samples < self.global_batch:
            raise ValueError(
                f"the dataset has {self.samples} samples, fewer than one global batch of {self.global_batch}; "
                f"lower the global batch or use more data"
            )

    @property
    def samples(self) -> int:
        return int(self.shard_start[-1])

    @property
    def steps_per_epoch(self) -> int:
        return self.samples // self.global_batch

    def locate(self, step: int) -> tuple[int, int]:
        """(epoch, step in that epoch) of a step counted from 0 at the start of training."""
        return divmod(step, self.steps_per_epoch)

    def batch(self, epoch: int, step: int) -> np.ndarray:
        """The global batch of a step of an epoch: sample ids, int64 (global_batch,), in slot order.

        Raises ValueError for a step outside of [0, steps_per_epoch).
        """
        if not 0 <= step < self.steps_per_epoch:
            raise ValueError(f"step {step} is outside of an epoch of {self.steps_per_epoch} steps")
        lanes = lanes_for(self.global_batch, self.lanes)
        per_step = self.global_batch // lanes
        lane_length = self.steps_per_epoch * per_step

        start, stop = step * per_step, (step + 1) * per_step
        parts = []
        for window in range(start // self.window, (stop - 1) // self.window + 1):
            first = window * self.window
            length = min(self.window, lane_length - first)
            shuffled = _window_permutations(self.seed, epoch, lanes, window, length)
            parts.append(first + shuffled[:, max(start - first, 0) : stop - first])
        within_lane = np.concatenate(parts, axis=1)
        positions = (np.arange(lanes)[:, None] * lane_length + within_lane).reshape(-1)

        shards, starts, offset = _epoch_layout(self, epoch)
        positions = (positions + offset) % self.samples
        slot = np.searchsorted(starts, positions, side="right") - 1
        return self.shard_start[shards[slot]] + positions - starts[slot]


@lru_cache(maxsize=8)
def _epoch_layout(order: SampleOrder, epoch: int) -> tuple[np.ndarray, np.ndarray, int]:
    """The permuted shards, the position of each one's first sample in that sequence, and the sequence's rotation."""
    shards = permutation(len(order.shard_start) - 1, order.seed, Draw.SHARDS, epoch)
    starts = np.zeros(len(shards), np.int64)
    np.cumsum(np.diff(order.shard_start)[shards][:-1], out=starts[1:])
    return shards, starts, int(hash64(order.seed, Draw.ROTATION, epoch) % np.uint64(order.samples))


@lru_cache(maxsize=8)  # consecutive steps share their windows
def _window_permutations(seed: int, epoch: int, lanes: int, window: int, length: int) -> np.ndarray:
    """The permutation of one window in every lane, int64 (lanes, length). A lane's last window may be shorter."""
    return permutation(length, seed, Draw.WINDOW, epoch, np.arange(lanes), window)
