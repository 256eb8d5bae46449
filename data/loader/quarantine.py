"""Images that turn out bad while a job runs: which they are, what takes their place, and when there are too many.

    quarantine = Quarantine(index, max_bad=0.001, file=RUN / "quarantine.jsonl")    # knows what earlier starts found
    quarantine.find_replacement(sample_id)                      # the sample itself or, where that is bad, the one that takes its place
    quarantine.add(sample_id, "its header is damaged")  # from any thread
    news = quarantine.share(entries_of_all_ranks)       # what the job did not know before
    quarantine.record(news, step)                       # one rank writes it down

What takes a sample's place follows from the dataset and the known bad samples alone. A stand-in that is bad too is found so when it
is read, so in the end each bad sample is replaced by the next good one, whichever rank asks and in whatever order they were found.
"""

import json
import math
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from data.common.files import publish
from data.dataset.index import Index, read_key

_NAMED = 5  # in the error of too many


@dataclass(frozen=True)
class BadSample:
    """A sample that can't be used. `key` is None where the shard's .idx can't be read either."""

    sample: int
    key: str | None
    shard: str
    reason: str

    def __str__(self) -> str:
        return f"sample {self.sample} (key {self.key}, shard {self.shard}): {self.reason}"


class Quarantine:
    """The bad samples of a dataset, as far as this rank knows them.

    Args:
        max_bad: the share of the dataset's samples that may be bad.
        file: where a run keeps its bad samples, of all its datasets; None: nowhere.
        replaces: whether other samples take the place of bad ones, or nothing does.

    Raises ValueError when there are more than `max_bad`, known at the start or found later, and for a file that can't be read.
    """

    def __init__(self, index: Index, max_bad: float, file: Path | None = None, *, replaces: bool = True) -> None:
        self.index, self.max_bad, self.file, self.replaces = index, max_bad, file, replaces
        self._lock = threading.Lock()
        self._known: dict[int, BadSample] = {}
        self._unshared: list[BadSample] = []
        self._shared: dict[int, BadSample] = {}  # what all ranks know; the same on each, and in the same order
        self.share(_recorded(file, index.fingerprint) if file is not None else [])
        self.check()

    @property
    def count(self) -> int:
        """How many bad samples all ranks know of."""
        return len(self._shared)

    def find_replacement(self, sample: int) -> int | None:
        """The sample if it isn't known to be bad. Else the next of its shard, cyclic, that isn't; where the shard has none left, the first
        of the shards that follow. None where nothing replaces a bad sample, and where none is left."""
        if sample not in self._known:
            return sample
        if not self.replaces:
            return None
        return next((other for other in _neighbours(self.index, sample) if other not in self._known), None)

    def add(self, sample: int, reason: str) -> None:
        """A sample is bad."""
        if sample in self._known:
            return
        shard = self.index.shards[self.index.shard_of(sample)].name
        bad = BadSample(sample, try_read_key(self.index, sample), shard, reason)
        with self._lock:
            if sample not in self._known:  # by now
                self._known[sample] = bad
                self._unshared.append(bad)
        self._check(self._known)

    @property
    def unreported_count(self) -> int:
        """How many bad samples this rank has found and not yet told of."""
        return len(self._unshared)

    def take_unreported(self) -> list[BadSample]:
        with self._lock:
            taken, self._unshared = self._unshared, []
            return taken

    def share(self, found: Iterable[BadSample]) -> list[BadSample]:
        """Takes in what all ranks have found, which must be the same on each; gives what is new to the job."""
        with self._lock:
            new = {bad.sample: bad for bad in found if bad.sample not in self._shared}
            self._shared |= new
            self._known = new | self._known
        return list(new.values())

    def check(self) -> None:
        """Raises ValueError, the same on all ranks, when they together have found more bad samples than are allowed."""
        self._check(self._shared)

    def _check(self, bad: dict[int, BadSample]) -> None:
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
        """Adds entries to the file, as found by this step of training. The file is whole at any moment."""
        assert self.file is not None
        lines = self.file.read_text() if self.file.exists() else ""
        for bad in new:
            about = {"time": round(time.time(), 3), "step": step, "dataset": self.index.fingerprint}
            lines += json.dumps(about | vars(bad) | {"replaced_by": self.find_replacement(bad.sample)}) + "\n"
        with open(self.file.with_name(self.file.name + ".tmp"), "w") as file:
            file.write(lines)
            publish(file, self.file)


def _neighbours(index: Index, sample: int) -> Iterator[int]:
    """The other samples of the dataset in the order in which they take a sample's place."""
    shard = index.shard_of(sample)
    first, end = index.shard_start[shard : shard + 2].tolist()
    yield from range(sample + 1, end)
    yield from range(first, sample)
    yield from range(end, len(index))
    yield from range(first)


def try_read_key(index: Index, sample: int) -> str | None:
    """A sample's key, None where it can't be read."""
    try:
        return read_key(index, sample)
    except (OSError, ValueError):  # where a shard is damaged its .idx may be as well, and the sample's id names it too
        return None


def _recorded(file: Path, fingerprint: str) -> list[BadSample]:
    if not file.exists():
        return []
    found = []
    for number, line in enumerate(file.read_text().splitlines(), 1):
        try:
            entry = json.loads(line)
            if entry["dataset"] == fingerprint:
                found.append(BadSample(entry["sample"], entry["key"], entry["shard"], entry["reason"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file}: line {number} can't be read ({error}); remove it, and what it named is found again") from error
    return found
