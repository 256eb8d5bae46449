"""Inspects a node before a job: GPUs, software versions, settings, disks, data sets and read speed. Does not import torch.

config, problems = read_settings(path, overrides, ranks)
node = Inspection(name, config, problems).run(number, nodes, report_progress)        verdict.py compares the nodes of a job
"""

import os
import platform
import random
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
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
from pretrain import config as settings
from pretrain.config import Config, ConfigError
from pretrain.run.directory import CHECKPOINTS, list_checkpoints

PACKAGES = ("torch", "nvidia-nccl-cu13", "deepspeed", "nvidia-dali-cuda130", "timm", "numpy")
DATASETS = ("data.train", "data.val")
LOCAL_SETTINGS = (*DATASETS, "data.cache")  # may differ between nodes; the data sets are compared by fingerprint
SHARD_CHECKERS = 2  # nodes that check each shard, so that a node with a bad disk differs from another
MAX_DAMAGED = 20  # damaged shards that a node reports
TMP_BYTES = 1 << 30  # for compiled kernels and files of running processes
READ_BYTES, READ_SECONDS, READ_THREADS = 64 << 20, 2.0, 8


@dataclass(frozen=True)
class Problem:
    about: str  # the subject, equal on all nodes with the same problem
    text: str
    is_defect: bool = False  # makes its node unfit, even if all nodes have it
    checkers: int | None = None  # number of nodes that check for this problem; None: all


@dataclass
class Node:
    name: str
    problems: list[Problem] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)  # by dotted key, without LOCAL_SETTINGS
    gpus: list[Gpu] = field(default_factory=list)
    no_gpus: str = ""  # why the node has no GPU; empty if it has one or needs none
    free_bytes: dict[str, int] = field(default_factory=dict)  # by the setting that names the folder
    fingerprints: dict[str, str] = field(default_factory=dict)  # of DATASETS
    read_bytes: int = 0
    read_seconds: float = 0.0

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Node":
        """Rebuilds a node from the result of `asdict`."""
        problems = [Problem(**problem) for problem in values["problems"]]
        return cls(**{**values, "problems": problems, "gpus": [Gpu(**gpu) for gpu in values["gpus"]]})


def read_settings(path: Path, overrides: Sequence[str], ranks: int) -> tuple[Config, list[str]]:
    """Returns the settings, and problems that only this node may have (missing paths); ConfigError lists all others."""
    problems: list[str] = []
    try:
        config = settings.load(path, overrides)
    except ConfigError as error:
        problems = error.problems
        if not all(problem.partition(" ")[0] in settings.NODE_PATHS for problem in problems):
            raise
        config = settings.load(path, overrides, unchecked=settings.NODE_PATHS)
    try:
        settings.accumulation(config, ranks)
    except ConfigError as error:
        raise ConfigError(str(path), error.problems + problems) if problems else error from None
    return config, problems


class Inspection:
    """Inspects the node of this process. `problems` are those of `read_settings`, each of which begins with a key."""

    def __init__(self, name: str, config: Config, problems: Sequence[str], force_config: bool = False) -> None:
        self.config, self.force_config = config, force_config
        self.node = Node(name, [Problem(text.partition(" ")[0], text) for text in problems])
        self.indexes: dict[str, Index] = {}

    def run(self, number: int, nodes: int, report_progress: Callable[[str], None]) -> Node:
        """Inspects node `number` of `nodes` and its part of the shards; calls `report_progress` before each operation that can hang."""
        report_progress("reading versions and GPUs")
        self._read_versions()
        self._read_gpus()
        report_progress("checking its disks")
        self._check_run()
        self._check_disks()
        for key in DATASETS:
            report_progress(f"opening {key}")
            self._open_dataset(key)
        for key, index in self.indexes.items():
            report_progress(f"checking the shards of {key}")
            shards = [shard for shard in range(len(index.shards)) if (shard - number) % nodes < SHARD_CHECKERS]
            for fault in find_damaged_shards(index, shards, checksums=False)[:MAX_DAMAGED]:
                text = f"{index.place}: {fault}. Copy this shard again from the original dataset"
                self.node.problems.append(Problem(f"{key}: {fault}", text, checkers=min(nodes, SHARD_CHECKERS)))
        if "data.train" in self.indexes:
            report_progress("reading data.train")
            self._time_reading(self.indexes["data.train"], number, nodes)
        return self.node

    def _add_problem(self, about: str, error: object) -> None:
        self.node.problems.append(Problem(about, str(error)))

    def _read_versions(self) -> None:
        self.node.versions = {"commit": git_commit(), "python": platform.python_version()} | {name: _version(name) for name in PACKAGES}
        values = settings.flat(self.config)
        self.node.settings = {key: str(value) for key, value in values.items() if key not in LOCAL_SETTINGS}

    def _read_gpus(self) -> None:
        if self.config.engine.device == "cpu":
            return
        try:
            self.node.versions["NVIDIA driver"], self.node.gpus = read_gpus()
            self.node.no_gpus = "" if self.node.gpus else "none is visible"
        except ValueError as error:
            self.node.no_gpus = str(error)

    def _check_run(self) -> None:
        """Checks whether an existing run can be resumed with these settings."""
        before = Path(self.config.run.dir, "config.yaml")
        if self._checkpoints() and before.exists():
            try:
                settings.confirm(self.config, before, self.force_config)
            except ValueError as error:
                self._add_problem("run.dir", error)

    def _checkpoints(self) -> int:
        return len(list_checkpoints(Path(self.config.run.dir, CHECKPOINTS)))

    def _check_disks(self) -> None:
        self._check_disk("run.dir", Path(self.config.run.dir), 0, "")  # the job itself checks the size of its checkpoints
        self._check_disk("TMPDIR", Path(os.environ.get("TMPDIR", "/tmp")), TMP_BYTES, "compiled kernels and temporary files")

    def _check_disk(self, name: str, path: Path, needed: int, purpose: str) -> None:
        existing = path.absolute()
        while not existing.exists():
            existing = existing.parent
        if not os.access(existing, os.W_OK | os.X_OK):
            self._add_problem(f"disk {name}", f"{name} = {path}: {existing} is not writable")
            return
        free = self.node.free_bytes[name] = shutil.disk_usage(existing).free
        if free < needed:
            text = f"{name} = {path}: its disk has {free / 1e9:.3g} GB free, and {needed / 1e9:.3g} GB are needed for {purpose}"
            self._add_problem(f"disk {name}", text + "; free space there, or set another folder")

    def _open_dataset(self, key: str) -> None:
        place = getattr(self.config.data, key.removeprefix("data."))
        if place is None or any(problem.about == key for problem in self.node.problems):
            return
        try:
            index = open_index(place, self.config.data.cache)
            if index.remote is not None:
                Cache(index.folder, self.config.data.cache_gb * 1e9).check_disk(int(index.shard_bytes.sum()))
                self.node.free_bytes["data.cache"] = shutil.disk_usage(choose_cache_root(self.config.data.cache)).free
        except (ValueError, OSError) as error:
            self._add_problem(key, error)
            return
        self.indexes[key] = index
        self.node.fingerprints[key] = index.fingerprint
        if key == "data.train" and len(index.classes) != self.config.model.classes:
            have, want = len(index.classes), self.config.model.classes
            self._add_problem("model.classes", f"{place} has {have} classes, but model.classes={want}; make them agree")

    def _time_reading(self, index: Index, number: int, nodes: int) -> None:
        began = time.monotonic()
        try:
            with _open_store(index, self.config.data.cache_gb) as store, ThreadPoolExecutor(READ_THREADS) as pool:
                ids = _random_samples(index, number, nodes)
                while batch := list(islice(ids, 4 * READ_THREADS)):
                    self.node.read_bytes += sum(pool.map(lambda sample: len(store.read(sample, planned=False)), batch))
                    self.node.read_seconds = time.monotonic() - began
                    if self.node.read_bytes >= READ_BYTES or self.node.read_seconds >= READ_SECONDS:
                        return
        except (ValueError, OSError) as error:
            self._add_problem("reading data.train", error)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _open_store(index: Index, cache_gb: float) -> ShardStore:
    """Opens the shards; for URLs without the cache, which has room only for samples that a job has planned."""
    return ShardStore(index) if index.remote is None else FetchedShards(index, [], peak_bytes=0, cache_gb=cache_gb)


def _random_samples(index: Index, number: int, nodes: int) -> Iterator[int]:
    """Yields the sample ids of this node's shards, in random order of shards, so that few are in the page cache."""
    shards = list(range(number % len(index.shards), len(index.shards), nodes))
    random.SystemRandom().shuffle(shards)
    for shard in shards:
        yield from range(int(index.shard_start[shard]), int(index.shard_start[shard + 1]))
