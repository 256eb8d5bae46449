"""Records and replaces the bad images that a job meets, and stops the job when there are too many.

    quarantine = Quarantine(index, max_bad=0.001, file=RUN / "quarantine.jsonl")    # with the bad samples of earlier starts
    quarantine.find_replacement(sample_id)              # the sample itself or, if it is bad, its replacement
    quarantine.add(sample_id, "its header is damaged")  # from any thread
    new = quarantine.merge(entries_of_all_ranks)        # samples that are new to the job
    quarantine.record(new, step)                        # on one rank

A replacement depends only on the dataset and the known bad samples, and is itself checked when it is read. So each bad sample is replaced
by the next good one, on any rank and in whatever order the bad ones were found.
"""

import json
import math
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from data.common.files import open_to_replace
from data.dataset.index import Index, read_key

_NAMED = 5  # bad samples that the error lists


@dataclass(frozen=True)
class BadSample:
    """A sample that can't be used. `key` is None if the shard's .idx can't be read."""

    sample: int
    key: str | None
    shard: str
    reason: str

    def __str__(self) -> str:
        return f"sample {self.sample} (key {self.key}, shard {self.shard}): {self.reason}"


class Quarantine:
    """The bad samples of a dataset that this rank knows.

    Bad samples are replaced or, without `replaces`, skipped. `file` keeps the bad samples of all datasets of a run. Raises ValueError for
    a file that can't be read, and, on creation or later, if the fraction of bad samples exceeds `max_bad`.
    """

    def __init__(self, index: Index, max_bad: float, file: Path | None = None, *, replaces: bool = True) -> None:
        self.index, self.max_bad, self.file, self.replaces = index, max_bad, file, replaces
        self._lock = threading.Lock()
        self._known: dict[int, BadSample] = {}
        self._unreported: list[BadSample] = []
        self._merged: dict[int, BadSample] = {}  # known to all ranks; the same on each, and in the same order
        self.merge(_read_recorded(file, index.fingerprint) if file is not None else [])
        self.check()

    @property
    def count(self) -> int:
        """The number of bad samples that all ranks know."""
        return len(self._merged)

    def find_replacement(self, sample: int) -> int | None:
        """Returns the sample if it is not known to be bad, otherwise its replacement.

        The replacement is the next good sample of the shard, cyclic, or else the first of the shards that follow. Returns None if there
        is none, or if bad samples are skipped.
        """
        if sample not in self._known:
            return sample
        if not self.replaces:
            return None
        return next((other for other in _candidates(self.index, sample) if other not in self._known), None)

    def add(self, sample: int, reason: str) -> None:
        """Adds a bad sample, from any thread. Raises ValueError if this rank alone knows too many."""
        if sample in self._known:
            return
        shard = self.index.shards[self.index.shard_of(sample)].name
        bad = BadSample(sample, try_read_key(self.index, sample), shard, reason)
        with self._lock:
            if sample not in self._known:  # another thread may have added it
                self._known[sample] = bad
                self._unreported.append(bad)
        self._check_limit(self._known)

    @property
    def unreported_count(self) -> int:
        """The number of bad samples that this rank has found but not yet reported to the others."""
        return len(self._unreported)

    def take_unreported(self) -> list[BadSample]:
        """Returns and clears the bad samples that this rank has not yet reported to the others."""
        with self._lock:
            taken, self._unreported = self._unreported, []
            return taken

    def merge(self, reported: Iterable[BadSample]) -> list[BadSample]:
        """Adds the reports of all ranks, in the same order on each; returns those that are new to the job."""
        with self._lock:
            new = {bad.sample: bad for bad in reported if bad.sample not in self._merged}
            self._merged |= new
            self._known = new | self._known
        return list(new.values())

    def check(self) -> None:
        """Raises ValueError, the same on all ranks, if all ranks together know more bad samples than are allowed."""
        self._check_limit(self._merged)

    def _check_limit(self, bad: dict[int, BadSample]) -> None:
        most = math.floor(self.max_bad * len(self.index))
        if len(bad) <= most:
            return
        last = "; ".join(str(entry) for entry in list(bad.values())[-_NAMED:])
        raise ValueError(
            f"{self.index.place}: {len(bad)} of {len(self.index)} images can't be used, and data.max_bad={self.max_bad:g} allows {most}. "
            f"The last were {last}. Find all with `python -m data verify --deep {self.index.place}` and copy or pack these shards again; "
            "or raise data.max_bad"
        )

    def record(self, new: Iterable[BadSample], step: int) -> None:
        """Appends bad samples that are new at this training step to the file, which is replaced atomically."""
        assert self.file is not None
        lines = self.file.read_text() if self.file.exists() else ""
        for bad in new:
            fields = {"time": round(time.time(), 3), "step": step, "dataset": self.index.fingerprint}
            lines += json.dumps(fields | vars(bad) | {"replaced_by": self.find_replacement(bad.sample)}) + "\n"
        with open_to_replace(self.file) as file:
            file.write(lines)


def _candidates(index: Index, sample: int) -> Iterator[int]:
    """Yields the other samples of the dataset in the order in which they may replace a sample."""
    shard = index.shard_of(sample)
    first, end = index.shard_start[shard : shard + 2].tolist()
    yield from range(sample + 1, end)
    yield from range(first, sample)
    yield from range(end, len(index))
    yield from range(first)


def try_read_key(index: Index, sample: int) -> str | None:
    """Reads a sample's key; returns None if the .idx of its shard can't be read."""
    try:
        return read_key(index, sample)
    except (OSError, ValueError):  # a damaged shard may have a damaged .idx, and messages name the sample's id too
        return None


def _read_recorded(file: Path, fingerprint: str) -> list[BadSample]:
    if not file.exists():
        return []
    entries = []
    for number, line in enumerate(file.read_text().splitlines(), 1):
        try:
            entry = json.loads(line)
            if entry["dataset"] == fingerprint:
                entries.append(BadSample(entry["sample"], entry["key"], entry["shard"], entry["reason"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file}: line {number} can't be read ({error}); remove the line; its sample will be found again") from error
    return entries
