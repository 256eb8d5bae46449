"""Computes the sample order: pure functions from (seed, epoch, step) to the sample ids of a global batch.

    order = SampleOrder(index.shard_start, seed=0, global_batch=8192)
    epoch, step_in_epoch = order.locate(step)
    ids = order.batch(epoch, step_in_epoch)[select_rank_slots(8192, rank, ranks)]
    for use in plan_shard_uses(order, select_rank_slots(8192, rank, ranks), start, end): …      # the shards needed, and when

The layout of an epoch, for N samples, a global batch of G, S = N // G steps and L lanes:

    1. The shards are permuted by (seed, epoch) and concatenated: a sequence of N positions.
    2. The sequence is rotated by an offset drawn from (seed, epoch), and its first S*G positions are used. So the N - S*G samples
       that can't fill a batch differ between epochs, even within a single shard.
    3. The S*G positions are cut into L lanes of equal length.
    4. In every lane, windows of W consecutive positions are permuted, each by (seed, epoch, lane, window).
    5. Step k takes the next g = G/L positions of every lane. The global batch is laid out lane by lane: slot = lane * g + j.

A rank takes consecutive slots and so whole lanes, or, with more ranks than lanes, an equal part of one. It reads its shards nearly in
sequence, while a global batch mixes L windows of different shards. The order does not depend on the number of ranks, and every step
costs the same: only its windows are permuted.

With repeated augmentation (Hoffer et al., "Augment your batch", CVPR 2020; as DeiT's RASampler) a global batch holds G/R distinct samples,
R times each. The layout above is that of the distinct samples, with G/R in place of G: an epoch is still one pass over the data, but has R
times as many steps. The distinct samples are concatenated R times. So neighbors, which mixup pairs, are never copies of one sample, and
with R ranks or more the copies of a sample are on different ranks.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from data.common.counter_rng import Draw, hash64, permutation
from data.dataset.index import Index
from data.settings import DataConfig


def count_lanes(global_batch: int, lanes: int) -> int:
    """Returns the largest divisor of the global batch up to `lanes`, so that all lanes contribute equally many samples."""
    return next(count for count in range(min(lanes, global_batch), 0, -1) if global_batch % count == 0)


def select_rank_slots(global_batch: int, rank: int, ranks: int) -> slice:
    """Returns the slots of the global batch that `rank` of `ranks` takes.

    Raises ValueError when the ranks don't divide the global batch.
    """
    if global_batch % ranks:
        divisors = [count for count in range(1, min(global_batch, 2 * ranks) + 1) if global_batch % count == 0]
        raise ValueError(
            f"a global batch of {global_batch} can't be shared equally by {ranks} ranks; "
            f"numbers of ranks that work: {', '.join(map(str, divisors))}"
        )
    share = global_batch // ranks
    return slice(rank * share, (rank + 1) * share)


@dataclass(frozen=True, eq=False)  # eq=False: instances are hashed by identity, for the caches below
class SampleOrder:
    """The sample order of a run.

    Args:
        shard_start: int64 (shards + 1,): the id of each shard's first sample, then the number of samples.
        lanes: the maximum number of lanes.
        window: samples of a lane that are permuted together.
        repeats: the number of copies of each sample in a global batch.

    Raises:
        ValueError: the dataset is smaller than one global batch, or `repeats` does not divide the global batch into more than one
            distinct sample.
    """

    shard_start: np.ndarray
    seed: int
    global_batch: int
    lanes: int = 64
    window: int = 2048
    repeats: int = 1

    def __post_init__(self) -> None:
        divisors = [count for count in range(1, self.global_batch) if self.global_batch % count == 0] or [1]
        if self.repeats not in divisors:
            raise ValueError(
                f"a global batch of {self.global_batch} can't hold {self.repeats} copies each of more than one sample; "
                f"numbers of repeats that work: {', '.join(map(str, divisors))}"
            )
        if self.samples < self.distinct:
            needed = f"one global batch of {self.global_batch}" + (f" with {self.repeats} repeats needs" if self.repeats > 1 else "")
            raise ValueError(f"the dataset has {self.samples} samples, fewer than {needed}; lower the global batch or use more data")

    @property
    def samples(self) -> int:
        return int(self.shard_start[-1])

    @property
    def distinct(self) -> int:
        """Distinct samples of a global batch."""
        return self.global_batch // self.repeats

    @property
    def copies(self) -> np.ndarray:
        """The copy of its sample that each slot holds, 0 to repeats - 1: int64 (global_batch,)."""
        return np.repeat(np.arange(self.repeats), self.distinct)

    @property
    def steps_per_epoch(self) -> int:
        """Whole global batches of an epoch."""
        return self.samples // self.distinct

    def locate(self, step: int) -> tuple[int, int]:
        """Converts a step counted from 0 at the start of training to (epoch, step in the epoch)."""
        return divmod(step, self.steps_per_epoch)

    def batch(self, epoch: int, step: int) -> np.ndarray:
        """Computes the global batch of a step of an epoch: sample ids, int64 (global_batch,), in slot order.

        Raises ValueError for a step outside of [0, steps_per_epoch).
        """
        shards, starts, offset = _lay_out_epoch(self, epoch)
        positions = (self.positions(epoch, step) + offset) % self.samples
        slot = np.searchsorted(starts, positions, side="right") - 1
        return self.shard_start[shards[slot]] + positions - starts[slot]

    def positions(self, epoch: int, step: int) -> np.ndarray:
        """Computes the positions of a global batch in the epoch's rotated sequence: int64 (global_batch,), in slot order.

        Raises ValueError for a step outside of [0, steps_per_epoch).
        """
        if not 0 <= step < self.steps_per_epoch:
            raise ValueError(f"step {step} is outside of an epoch of {self.steps_per_epoch} steps")
        lanes = count_lanes(self.distinct, self.lanes)
        per_step = self.distinct // lanes
        lane_length = self.steps_per_epoch * per_step

        start, stop = step * per_step, (step + 1) * per_step
        parts = []
        for window in range(start // self.window, (stop - 1) // self.window + 1):
            first = window * self.window
            length = min(self.window, lane_length - first)
            shuffled = _permute_windows(self.seed, epoch, lanes, window, length)
            parts.append(first + shuffled[:, max(start - first, 0) : stop - first])
        within_lane = np.concatenate(parts, axis=1)
        return np.tile((np.arange(lanes)[:, None] * lane_length + within_lane).reshape(-1), self.repeats)


def make_sample_order(index: Index, settings: DataConfig, *, seed: int, global_batch: int) -> SampleOrder:
    """Makes the sample order of a job. Raises ValueError as SampleOrder does."""
    return SampleOrder(index.shard_start, seed, global_batch, settings.lanes, settings.window, settings.repeats)


@dataclass(frozen=True)
class ShardUse:
    """A range of steps in which a rank may read a shard: from exactly `first` to at most `last`."""

    shard: int
    first: int
    last: int


def plan_shard_uses(order: SampleOrder, slots: slice, start: int, end: int) -> Iterator[ShardUse]:
    """Yields the uses of shards by one rank's slots in steps `start` to `end` - 1, in the order of first need.

    A shard has one use for each of its slices (_Slices) in every epoch. `last` is the end of the last window of the slice.
    """
    epoch = -1
    for step in range(start, end):
        previous_epoch, (epoch, step_in_epoch) = epoch, order.locate(step)
        if epoch != previous_epoch:
            slices = _cut_epoch(order, epoch)
            seen = np.zeros(len(slices.shard), bool)
        positions = order.positions(epoch, step_in_epoch)[slots]
        touched, place = np.unique(np.searchsorted(slices.begin, positions, side="right") - 1, return_index=True)
        new = touched[np.argsort(place)]
        new = new[~seen[new]]
        seen[new] = True
        for number in new.tolist():
            yield ShardUse(int(slices.shard[number]), step, epoch * order.steps_per_epoch + int(slices.last[number]))


def compute_peak_bytes(order: SampleOrder, shard_bytes: np.ndarray, ranks: int, start: int, end: int) -> int:
    """Computes the most bytes of shards that any rank needs in a step from `start` to `end` - 1; `shard_bytes` is int64 (shards,)."""
    lanes = count_lanes(order.distinct, order.lanes)
    share, per_lane = order.global_batch // ranks, order.distinct // lanes
    # A rank's slots may continue from the last lane of one copy to the first lane of the next, so the lanes are laid out twice.
    first_slot = np.arange(ranks) * share % order.distinct
    first_lane = first_slot // per_lane
    last_lane = np.minimum((first_slot + share - 1) // per_lane, first_lane + lanes - 1)
    most = 0
    for epoch in range(order.locate(start)[0], order.locate(end - 1)[0] + 1):
        slices = _cut_epoch(order, epoch)
        change = np.zeros((lanes, order.steps_per_epoch + 1), np.int64)  # change of the bytes between steps
        np.add.at(change, (slices.lane, slices.first), shard_bytes[slices.shard])
        np.add.at(change, (slices.lane, slices.last + 1), -shard_bytes[slices.shard])
        used = np.zeros((2 * lanes + 1, order.steps_per_epoch + 1), np.int64)  # bytes, cumulative over lanes
        np.tile(change.cumsum(axis=1), (2, 1)).cumsum(axis=0, out=used[1:])
        most = max(most, int((used[last_lane + 1] - used[first_lane]).max()))
    return min(most, int(shard_bytes.sum()))  # a shard in several lanes was counted for each of them


def plan_evaluation_uses(shard_start: np.ndarray, micro_batch: int, ranks: int) -> list[ShardUse]:
    """Returns the uses of shards by evaluation, in the order of first need; the same for every rank.

    Rank r takes every `ranks`-th sample from r on, and step i is micro-batch i: together, the ranks take micro_batch * ranks consecutive
    samples. `shard_start` is as in SampleOrder, but counts only the samples that are evaluated.
    """
    per_step = micro_batch * ranks
    bounds = enumerate(itertools.pairwise(shard_start.tolist()))
    return [ShardUse(shard, first // per_step, (end - 1) // per_step) for shard, (first, end) in bounds if first < end]


def compute_evaluation_peak_bytes(uses: Sequence[ShardUse], shard_bytes: np.ndarray) -> int:
    """Computes the most bytes of shards that are in use in one step; `shard_bytes` is int64 (shards,)."""
    change = np.zeros(max((use.last for use in uses), default=0) + 2, np.int64)
    for use in uses:
        change[use.first] += shard_bytes[use.shard]
        change[use.last + 1] -= shard_bytes[use.shard]
    return int(change.cumsum().max())


@dataclass(frozen=True, eq=False)
class _Slices:
    """The used positions of an epoch's rotated sequence, cut wherever a shard or a lane ends, in order.

    Each array is int64 (slices,): first position, shard, lane, and the first and last step in the epoch of the slice's windows.
    """

    begin: np.ndarray
    shard: np.ndarray
    lane: np.ndarray
    first: np.ndarray
    last: np.ndarray


@lru_cache(maxsize=2)
def _cut_epoch(order: SampleOrder, epoch: int) -> _Slices:
    shards, starts, offset = _lay_out_epoch(order, epoch)
    lanes = count_lanes(order.distinct, order.lanes)
    per_step = order.distinct // lanes
    lane_length = order.steps_per_epoch * per_step
    cuts = np.concatenate([(starts - offset) % order.samples, np.arange(lanes) * lane_length])
    begin = np.unique(cuts[cuts < lanes * lane_length])
    lane, within = np.divmod(begin, lane_length)
    last_within = np.append(begin[1:], lanes * lane_length) - 1 - lane * lane_length
    window_end = np.minimum((last_within // order.window + 1) * order.window, lane_length)
    return _Slices(
        begin=begin,
        shard=shards[np.searchsorted(starts, (begin + offset) % order.samples, side="right") - 1],
        lane=lane,
        first=within // order.window * order.window // per_step,
        last=(window_end - 1) // per_step,
    )


@lru_cache(maxsize=8)
def _lay_out_epoch(order: SampleOrder, epoch: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Returns the permuted shards, the position of each shard's first sample in that sequence, and the rotation."""
    shards = permutation(len(order.shard_start) - 1, order.seed, Draw.SHARDS, epoch)
    starts = np.zeros(len(shards), np.int64)
    np.cumsum(np.diff(order.shard_start)[shards][:-1], out=starts[1:])
    return shards, starts, int(hash64(order.seed, Draw.ROTATION, epoch) % np.uint64(order.samples))


@lru_cache(maxsize=8)  # consecutive steps share windows
def _permute_windows(seed: int, epoch: int, lanes: int, window: int, length: int) -> np.ndarray:
    """Draws the permutation of one window in every lane: int64 (lanes, length). A lane's last window may be shorter."""
    return permutation(length, seed, Draw.WINDOW, epoch, np.arange(lanes), window)
