"""What preflight looks at on each node, by the first of its ranks; without torch, which no part of it needs.

    here = Here(config, problems)              # problems: of the settings, such as a folder that is missing on this node
    node = here.look(share, doing)             # GPUs, versions, disks, data and how fast they are read
    here.recheck({"data.train": [17]})         # shards that another node found damaged

verdict.py judges what all nodes have found.
"""

import os
import platform
import random
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import Any

from data.common.git import git_commit
from data.dataset.check import find_damaged_shards
from data.dataset.index import Index, open_index
from data.loader.store import FetchedShards, ShardStore
from data.storage.cache import Cache, choose_cache_root
from launch.preflight.gpus import Gpu, read_gpus
from pretrain.config import Config, confirm, flat

PACKAGES = ("torch", "nvidia-nccl-cu13", "deepspeed", "nvidia-dali-cuda130", "timm", "numpy")
DATASETS = ("data.train", "data.val")
# Settings that are a node's own: what lies there is compared instead.
OWN = (*DATASETS, "data.cache")
TMP_NEEDED = 1 << 30  # bytes: compiled kernels, and files that live as long as a process
READ_BYTES, READ_SECONDS, READ_THREADS = 64 << 20, 2.0, 8
# Parameters without the head, and features that it takes. From the models themselves, which take seconds to import:
# tests/launch/test_preflight.py compares.
BACKBONES = {
    "van_b0": (3_848_800, 256),
    "van_b1": (13_348_800, 512),
    "van_b2": (26_065_472, 512),
    "van_b3": (44_252_608, 512),
    "van_b4": (59_770_176, 512),
    "van_b5": (89_198_688, 768),
    "van_b6": (199_060_416, 768),
}


@dataclass(frozen=True)
class Problem:
    """`about` is what is wrong, in a word that is the same on all nodes where it is. `own`: a defect of this node, whatever others have."""

    about: str
    text: str
    own: bool = False


@dataclass(frozen=True)
class Space:
    what: str
    free: int  # bytes


@dataclass
class Node:
    name: str
    ranks: list[int]
    problems: list[Problem] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)  # by what they are of
    settings: dict[str, Any] = field(default_factory=dict)  # by dotted key, without OWN
    gpus: list[Gpu] = field(default_factory=list)
    no_gpus: str = ""  # why there are none, if that was asked
    spaces: list[Space] = field(default_factory=list)
    fingerprints: dict[str, str] = field(default_factory=dict)  # of DATASETS
    suspects: dict[str, list[int]] = field(default_factory=dict)  # of DATASETS, the shards that look damaged from here
    read_bytes: int = 0
    read_seconds: float = 0.0
    clock: float = 0.0  # seconds ahead of the first node's
    pair_bytes: int = 0  # sent each way in `pair_seconds`, with the better of its neighbours
    pair_seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Node":
        kinds = {"problems": Problem, "gpus": Gpu, "spaces": Space}
        return cls(**{**values, **{key: [kind(**each) for each in values[key]] for key, kind in kinds.items()}})


class Here:
    """This node. `problems` are those of the settings, as texts that begin with the key."""

    def __init__(self, name: str, config: Config, problems: Sequence[str], force_config: bool = False) -> None:
        self.config, self.force_config = config, force_config
        self.node = Node(name, [], [Problem(text.partition(" ")[0], text) for text in problems])
        self.indexes: dict[str, Index] = {}

    def look(self, number: int, nodes: int, doing: Callable[[str], None]) -> Node:
        """Everything that can be seen without the other nodes; of the shards, the share of node `number` of `nodes`."""
        self._software()
        self._gpus()
        doing("looking at its disks")
        self._run()
        self._spaces()
        for key in DATASETS:
            doing(f"opening {key}")
            self._open(key)
        for key, index in self.indexes.items():
            doing(f"looking at the shards of {key}")
            share = range(number, len(index.shards), nodes)
            if find_damaged_shards(index, share, checksums=False):
                self.node.suspects[key] = [shard for shard in share if find_damaged_shards(index, [shard], checksums=False)]
        if "data.train" in self.indexes:
            doing("reading data.train")
            self._read(self.indexes["data.train"], number, nodes)
        return self.node

    def recheck(self, shards: Mapping[str, Sequence[int]]) -> list[Problem]:
        """What is wrong with these shards as this node sees them."""
        return [
            Problem(f"{key} {shard}", f"{index.place}: {fault}. Copy this shard again from where the dataset was packed")
            for key, index in self.indexes.items()
            for shard in shards.get(key, [])
            for fault in find_damaged_shards(index, [shard], checksums=False)
        ]

    def _wrong(self, about: str, error: object) -> None:
        self.node.problems.append(Problem(about, str(error)))

    def _software(self) -> None:
        self.node.versions = {"commit": git_commit(), "python": platform.python_version()} | {name: _version(name) for name in PACKAGES}
        self.node.settings = {key: value for key, value in flat(self.config).items() if key not in OWN}

    def _gpus(self) -> None:
        if self.config.engine.device == "cpu":
            return
        try:
            self.node.versions["NVIDIA driver"], self.node.gpus = read_gpus()
            self.node.no_gpus = "" if self.node.gpus else "none is visible"
        except ValueError as error:
            self.node.no_gpus = str(error)

    def _run(self) -> None:
        """Whether a run that is there can go on with these settings."""
        before = Path(self.config.run.dir, "config.yaml")
        if self._checkpoints() and before.exists():
            try:
                confirm(self.config, before, self.force_config)
            except ValueError as error:
                self._wrong("run.dir", error)

    def _checkpoints(self) -> int:
        return len(list(Path(self.config.run.dir, "checkpoints").glob("step-*")))

    def _spaces(self) -> None:
        run = self.config.run
        size = checkpoint_bytes(self.config)
        there = min(run.keep, self._checkpoints())
        self._space(
            "run.dir",
            Path(run.dir),
            size * (run.keep + 1 - there),
            f"for {run.keep + 1 - there} checkpoints more of {size / 1e9:.3g} GB each",
        )
        self._space("TMPDIR", Path(os.environ.get("TMPDIR", "/tmp")), TMP_NEEDED, "for what a job puts there")

    def _space(self, what: str, path: Path, needed: int, purpose: str) -> None:
        there = path.absolute()
        while not there.exists():
            there = there.parent
        if not os.access(there, os.W_OK | os.X_OK):
            self._wrong(f"disk {what}", f"{what} = {path}: {there} can't be written to")
            return
        space = Space(what, shutil.disk_usage(there).free)
        self.node.spaces.append(space)
        if space.free < needed:
            text = f"{what} = {path}: its disk has {space.free / 1e9:.3g} GB free, and {needed / 1e9:.3g} GB are needed {purpose}"
            self._wrong(f"disk {what}", text + "; free space there, or set another folder")

    def _open(self, key: str) -> None:
        place = getattr(self.config.data, key.removeprefix("data."))
        if place is None or any(problem.about == key for problem in self.node.problems):
            return
        try:
            index = open_index(place, self.config.data.cache)
            if index.remote is not None:
                Cache(index.folder, self.config.data.cache_gb * 1e9).check_disk(int(index.shard_bytes.sum()))
                self.node.spaces.append(Space("data.cache", shutil.disk_usage(choose_cache_root(self.config.data.cache)).free))
        except (ValueError, OSError) as error:
            self._wrong(key, error)
            return
        self.indexes[key] = index
        self.node.fingerprints[key] = index.fingerprint
        if key == "data.train" and len(index.classes) != self.config.model.classes:
            have, want = len(index.classes), self.config.model.classes
            self._wrong("model.classes", f"{place} has {have} classes, but model.classes={want}; make them agree")

    def _read(self, index: Index, number: int, nodes: int) -> None:
        began = time.monotonic()
        try:
            with _store(index, self.config.data.cache_gb) as store, ThreadPoolExecutor(READ_THREADS) as pool:
                ids = _sample_ids(index, number, nodes)
                while some := list(islice(ids, 4 * READ_THREADS)):
                    self.node.read_bytes += sum(pool.map(lambda sample: len(store.read(sample, planned=False)), some))
                    self.node.read_seconds = time.monotonic() - began
                    if self.node.read_bytes >= READ_BYTES or self.node.read_seconds >= READ_SECONDS:
                        return
        except (ValueError, OSError) as error:
            self._wrong("reading data.train", error)


def checkpoint_bytes(config: Config) -> int:
    """Of one checkpoint: weights, two moments, and the moving average if one is kept, in fp32."""
    backbone, features = BACKBONES[config.model.name]
    copies = 3 + (config.engine.ema_decay > 0)
    return 4 * copies * (backbone + config.model.classes * (features + 1))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _store(index: Index, cache_gb: float) -> ShardStore:
    """At a URL it reads past the cache, which has room for what a job has planned alone."""
    return ShardStore(index) if index.remote is None else FetchedShards(index, [], at_once=0, cache_gb=cache_gb)


def _sample_ids(index: Index, number: int, nodes: int) -> Iterator[int]:
    """Of this node's share of the shards, in an order that no earlier start took, so that few of them are in the host's memory."""
    shards = list(range(number % len(index.shards), len(index.shards), nodes))
    random.SystemRandom().shuffle(shards)
    for shard in shards:
        yield from range(int(index.shard_start[shard]), int(index.shard_start[shard + 1]))
