"""Sample order: pure functions from (seed, epoch, step) to the sample ids of the whole global batch, and a rank's part of it.

    order = SampleOrder(index.shard_start, seed=0, global_batch=8192)
    epoch, step_in_epoch = order.locate(step)
    ids = order.batch(epoch, step_in_epoch)[select_rank_slots(8192, rank, ranks)]
    for use in plan_shard_uses(order, select_rank_slots(8192, rank, ranks), start, end): …      # which shards that takes, and when

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

With repeated augmentation (Hoffer et al., "Augment your batch", CVPR 2020; as DeiT's RASampler) a global batch holds G/R distinct samples R
times each. The layout above is that of the distinct ones, with G/R in place of G: an epoch is still one pass over the data, and has
R times as many steps. The batch is the distinct ones laid end to end R times: neighbours, which mixup pairs, are never copies of
one another, and from R ranks on the copies of a sample are on different ranks.
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
    """The largest divisor of the global batch up to `lanes`: every lane gives equally many samples to a step."""
    return next(count for count in range(min(lanes, global_batch), 0, -1) if global_batch % count == 0)


def select_rank_slots(global_batch: int, rank: int, ranks: int) -> slice:
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


def select_evaluation_ids(samples: int, rank: int, ranks: int) -> np.ndarray:
    """The sample ids that `rank` of `ranks` evaluates, int64: every sample falls to exactly one rank."""
    return np.arange(rank, samples, ranks, dtype=np.int64)


@dataclass(frozen=True, eq=False)  # eq=False: hashed by identity, for the cache of an epoch's layout
class SampleOrder:
    """The order of a run. `shard_start` is int64 (shards + 1,): the id of each shard's first sample, then their number. Each sample of a
    global batch is in it `repeats` times.

    Raises ValueError when the dataset has fewer samples than one global batch takes, and when `repeats` don't divide that batch into
    more than one sample.
    """

    shard_start: np.ndarray
    seed: int
    global_batch: int
    lanes: int = 64
    window: int = 2048
    repeats: int = 1

    def __post_init__(self) -> None:
        fit = [count for count in range(1, self.global_batch) if self.global_batch % count == 0] or [1]
        if self.repeats not in fit:
            raise ValueError(
                f"a global batch of {self.global_batch} can't hold samples {self.repeats} times each, and more than one of them; "
                f"numbers of repeats that work: {', '.join(map(str, fit))}"
            )
        if self.samples < self.distinct:
            takes = f"one global batch of {self.global_batch}" + (f" with {self.repeats} repeats takes" if self.repeats > 1 else "")
            raise ValueError(f"the dataset has {self.samples} samples, fewer than {takes}; lower the global batch or use more data")

    @property
    def samples(self) -> int:
        return int(self.shard_start[-1])

    @property
    def distinct(self) -> int:
        """Samples in a global batch, copies not counted."""
        return self.global_batch // self.repeats

    @property
    def copies(self) -> np.ndarray:
        """Which copy of its sample a slot holds, 0 to repeats - 1, int64 (global_batch,)."""
        return np.repeat(np.arange(self.repeats), self.distinct)

    @property
    def steps_per_epoch(self) -> int:
        return self.samples // self.distinct

    def locate(self, step: int) -> tuple[int, int]:
        """(epoch, step in that epoch) of a step counted from 0 at the start of training."""
        return divmod(step, self.steps_per_epoch)

    def batch(self, epoch: int, step: int) -> np.ndarray:
        """The global batch of a step of an epoch: sample ids, int64 (global_batch,), in slot order.

        Raises ValueError for a step outside of [0, steps_per_epoch).
        """
        shards, starts, offset = _epoch_layout(self, epoch)
        positions = (self.positions(epoch, step) + offset) % self.samples
        slot = np.searchsorted(starts, positions, side="right") - 1
        return self.shard_start[shards[slot]] + positions - starts[slot]

    def positions(self, epoch: int, step: int) -> np.ndarray:
        """Where the global batch lies in the epoch's rotated sequence, int64 (global_batch,), in slot order.

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
            shuffled = _window_permutations(self.seed, epoch, lanes, window, length)
            parts.append(first + shuffled[:, max(start - first, 0) : stop - first])
        within_lane = np.concatenate(parts, axis=1)
        return np.tile((np.arange(lanes)[:, None] * lane_length + within_lane).reshape(-1), self.repeats)


def make_sample_order(index: Index, settings: DataConfig, *, seed: int, global_batch: int) -> SampleOrder:
    """Makes the sample order of a job. Raises ValueError as SampleOrder does."""
    return SampleOrder(index.shard_start, seed, global_batch, settings.lanes, settings.window, settings.repeats)


@dataclass(frozen=True)
class ShardUse:
    """A rank takes samples of a shard in steps `first` to `last`, or ends a little before `last`."""

    shard: int
    first: int
    last: int


def plan_shard_uses(order: SampleOrder, slots: slice, start: int, end: int) -> Iterator[ShardUse]:
    """The shards that these slots of the global batch touch in steps `start` to `end` - 1, counted from the start of training,
    in the order of first need.

    A shard comes once for each stretch of a lane in which it lies: again in another lane, and in another epoch. `first` is
    exact; `last` is the end of the last window that the stretch reaches into.
    """
    epoch = -1
    for step in range(start, end):
        before, (epoch, step_in_epoch) = epoch, order.locate(step)
        if epoch != before:
            stretches = _stretches(order, epoch)
            seen = np.zeros(len(stretches.shard), bool)
        positions = order.positions(epoch, step_in_epoch)[slots]
        touched, place = np.unique(np.searchsorted(stretches.begin, positions, side="right") - 1, return_index=True)
        new = touched[np.argsort(place)]
        new = new[~seen[new]]
        seen[new] = True
        for number in new.tolist():
            yield ShardUse(int(stretches.shard[number]), step, epoch * order.steps_per_epoch + int(stretches.last[number]))


def compute_peak_bytes(order: SampleOrder, shard_bytes: np.ndarray, ranks: int, start: int, end: int) -> int:
    """The most bytes of shards that one of `ranks` needs at the same time in steps `start` to `end` - 1: those of the windows it
    is in. `shard_bytes` is int64 (shards,)."""
    lanes = count_lanes(order.distinct, order.lanes)
    share, per_lane = order.global_batch // ranks, order.distinct // lanes
    # A rank's slots may go from the last lane of one copy on to the first of the next, so the lanes are laid out twice.
    first_slot = np.arange(ranks) * share % order.distinct
    first_lane = first_slot // per_lane
    last_lane = np.minimum((first_slot + share - 1) // per_lane, first_lane + lanes - 1)
    most = 0
    for epoch in range(order.locate(start)[0], order.locate(end - 1)[0] + 1):
        found = _stretches(order, epoch)
        change = np.zeros((lanes, order.steps_per_epoch + 1), np.int64)  # from step to step
        np.add.at(change, (found.lane, found.first), shard_bytes[found.shard])
        np.add.at(change, (found.lane, found.last + 1), -shard_bytes[found.shard])
        held = np.zeros((2 * lanes + 1, order.steps_per_epoch + 1), np.int64)  # by all lanes before
        np.tile(change.cumsum(axis=1), (2, 1)).cumsum(axis=0, out=held[1:])
        most = max(most, int((held[last_lane + 1] - held[first_lane]).max()))
    return min(most, int(shard_bytes.sum()))  # a shard in which several lanes are was counted for each


def plan_evaluation_uses(shard_start: np.ndarray, micro_batch: int, ranks: int) -> list[ShardUse]:
    """The shards that evaluation touches, in the order of first need, for any of `ranks`: in its micro-batch i, which counts as
    step i, each takes some of the samples i * micro_batch * ranks and following. Where only a part of the samples is evaluated,
    `shard_start` counts those."""
    per_step = micro_batch * ranks
    bounds = enumerate(itertools.pairwise(shard_start.tolist()))
    return [ShardUse(shard, first // per_step, (end - 1) // per_step) for shard, (first, end) in bounds if first < end]


def compute_evaluation_peak_bytes(uses: Sequence[ShardUse], shard_bytes: np.ndarray) -> int:
    """The most bytes of shards that are in use in the same step; `shard_bytes` is int64 (shards,)."""
    change = np.zeros(max((use.last for use in uses), default=0) + 2, np.int64)
    for use in uses:
        change[use.first] += shard_bytes[use.shard]
        change[use.last + 1] -= shard_bytes[use.shard]
    return int(change.cumsum().max())


@dataclass(frozen=True, eq=False)
class _Stretches:
    """The used positions of an epoch's rotated sequence, cut wherever a shard or a lane ends, in order; int64 (stretches,) each:
    first position, shard, lane, and the first and last step, counted in the epoch, of the windows that it reaches into."""

    begin: np.ndarray
    shard: np.ndarray
    lane: np.ndarray
    first: np.ndarray
    last: np.ndarray


@lru_cache(maxsize=2)
def _stretches(order: SampleOrder, epoch: int) -> _Stretches:
    shards, starts, offset = _epoch_layout(order, epoch)
    lanes = count_lanes(order.distinct, order.lanes)
    per_step = order.distinct // lanes
    lane_length = order.steps_per_epoch * per_step
    cuts = np.concatenate([(starts - offset) % order.samples, np.arange(lanes) * lane_length])
    begin = np.unique(cuts[cuts < lanes * lane_length])
    lane, within = np.divmod(begin, lane_length)
    last_within = np.append(begin[1:], lanes * lane_length) - 1 - lane * lane_length
    window_end = np.minimum((last_within // order.window + 1) * order.window, lane_length)
    return _Stretches(
        begin=begin,
        shard=shards[np.searchsorted(starts, (begin + offset) % order.samples, side="right") - 1],
        lane=lane,
        first=within // order.window * order.window // per_step,
        last=(window_end - 1) // per_step,
    )


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
