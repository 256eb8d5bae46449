"""FetchedShards: reads shards at URLs through the cache, despite temporary failures."""

import gc
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from data.dataset.index import Index, open_index
from data.loader.order import ShardUse, compute_evaluation_peak_bytes, plan_evaluation_uses
from data.loader.store import FetchedShards
from data.storage.cache import Cache
from data.storage.remote import Stopped
from tests.data.loader.test_store import read_images
from tests.support.servers import Proxy

pytestmark = pytest.mark.slow

TRAIN = "s3://bucket/train"


@pytest.fixture
def remote(s3: Proxy, tmp_path: Path) -> Index:
    """Opens many_shards on S3; the cache has only its index."""
    index = open_index(TRAIN, str(tmp_path / "cache"))
    s3.clear()
    return index


def sequence(index: Index, micro_batch: int = 1) -> tuple[list[ShardUse], int]:
    """Returns the uses of a reader of all samples in order, one micro-batch a step, and their peak bytes."""
    uses = plan_evaluation_uses(index.shard_start, micro_batch, 1)
    return uses, compute_evaluation_peak_bytes(uses, index.shard_bytes)


def store_of(index: Index, *, shards: float, **options: Any) -> FetchedShards:
    """Opens a store with room for so many shards of the largest size, half of which it may pin."""
    uses, at_once = sequence(index)
    options = {"peak_bytes": at_once, "cache_gb": shards * index.shard_bytes.max() / 1e9} | options
    return FetchedShards(index, options.pop("uses", uses), **options)


def read_all(store: FetchedShards) -> list[bytes]:
    images = []
    for sample_id in range(len(store.index)):
        images.append(store.read(sample_id).tobytes())
        store.advance(sample_id + 1)
    return images


def cached_bytes(index: Index) -> int:
    """Returns the bytes of complete and partial shards in the cache, while its lock is held."""
    with Cache(index.folder)._locked():
        return sum(path.stat().st_size for path in index.folder.iterdir() if path.name.endswith((".tar", ".tar.part")))


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def fetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("fetch-")]


def test_small_cache_fetches_each_shard_once_and_keeps_its_bound(s3: Proxy, remote: Index, many_shards: Index) -> None:
    most, done = [0], threading.Event()

    def sample() -> None:
        while not done.is_set():
            most[0] = max(most[0], cached_bytes(remote))

    sampler = threading.Thread(target=sample)
    sampler.start()
    with store_of(remote, shards=6) as store:
        assert read_all(store) == read_images(many_shards)
    done.set()
    sampler.join()
    assert s3.shards() == {shard.name: 1 for shard in remote.shards}
    bound = 6 * int(remote.shard_bytes.max())
    assert bound / 2 < most[0] <= bound
    assert not fetch_threads()
    assert not list(remote.folder.glob("reserved-*"))


def test_shards_are_fetched_in_order_of_need_as_far_as_the_cache_allows(s3: Proxy, remote: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.loader.store.FETCH_THREADS", 1)  # so that the order of the requests is that of the bookings
    uses = [use for use in sequence(remote)[0] if use.first >= 40]  # as after a resume
    with store_of(remote, shards=10, uses=uses) as store:
        wait_for(lambda: len(list(remote.folder.glob("*.tar"))) >= 5)
        time.sleep(0.1)
        expected, room = [], 10 * int(remote.shard_bytes.max()) // 2
        for use in uses:
            room -= remote.shards[use.shard].bytes
            if room < 0:
                break
            expected.append(remote.shards[use.shard].name)
        assert list(s3.shards()) == expected
        store.advance(uses[1].last + 1)  # two are done
        wait_for(lambda: len(s3.shards()) >= len(expected) + 2)
        time.sleep(0.05)
        assert list(s3.shards())[: len(expected) + 2] == [remote.shards[use.shard].name for use in uses[: len(expected) + 2]]


@pytest.mark.parametrize("fault", ["500", "503", "reset", "short", "corrupt"])
def test_temporary_faults_change_nothing(s3: Proxy, remote: Index, many_shards: Index, fault: str) -> None:
    for shard in remote.shards[::3]:
        s3.fail(shard.name, *[fault] * 2)
    with store_of(remote, shards=8) as store:
        assert read_all(store) == read_images(many_shards)
    assert {name for name, count in s3.shards().items() if count == 3} == {shard.name for shard in remote.shards[::3]}


@pytest.mark.parametrize("fault", ["reset", "corrupt"])
def test_failed_download_leaves_no_shard_pinned(s3: Proxy, remote: Index, fault: str) -> None:
    """Also without a garbage collection of the exceptions that the store's libraries keep in reference cycles, with their frames.

    A shard that stays pinned can't be evicted, and ranks that share the cache would wait forever.
    """
    for shard in remote.shards[:6]:
        s3.fail(shard.name, fault)
    gc.collect()
    gc.disable()
    try:
        with store_of(remote, shards=3 * len(remote.shards)) as store:
            wait_for(lambda: len(s3.shards()) == len(remote.shards) and not fetch_threads())
            assert pinned(remote) == {shard.name for shard in remote.shards}
            store.advance(len(remote))
            assert pinned(remote) == set()
    finally:
        gc.enable()


def pinned(index: Index) -> set[str]:
    """Returns the names of the dataset's shards that this process has open."""
    files = [Path(os.readlink(file)) for file in Path("/proc/self/fd").iterdir() if file.exists()]
    return {file.name for file in files if file.parent == index.folder and file.suffix == ".tar"}


def test_stalled_download_is_retried(s3: Proxy, tmp_path: Path, many_shards: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.storage.remote.STALL", 0.3)
    index = open_index(TRAIN, str(tmp_path))
    s3.fail(index.shards[1].name, "stall", "stall")
    with store_of(index, shards=8) as store:
        assert read_all(store) == read_images(many_shards)


@pytest.mark.parametrize(
    ("fault", "reason", "tries"),
    [
        ("500", r"OSError: .*injected", "6 tries"),
        ("corrupt", "the checksum differs from that of the packed shard; .*", "6 tries"),
        ("403", "PermissionError: .*", r"1 try\); credentials come from"),
    ],
)
def test_permanent_faults_are_raised_when_the_shard_is_read(s3: Proxy, remote: Index, fault: str, reason: str, tries: str) -> None:
    bad = remote.shards[3]
    s3.fail(bad.name, f"ever-{fault}")
    first = int(remote.shard_start[3])
    with store_of(remote, shards=14) as store:
        wait_for(lambda: s3.gets[bad.name] > 0)
        for sample_id in range(first):
            store.read(sample_id)
        with pytest.raises(ValueError, match=rf"^s3://bucket/train/{bad.name}: {reason} \({tries}"):
            store.read(first)
        store.read(int(remote.shard_start[4]))
    assert not (remote.folder / bad.name).exists()
    assert not list(remote.folder.glob("*.part"))


@pytest.mark.parametrize(("change", "message"), [(-7, r"\d+ bytes instead of \d+"), (7, r"more than the \d+ bytes")])
def test_shard_of_another_size_is_an_error(s3: Proxy, many_shards: Index, tmp_path: Path, change: int, message: str) -> None:
    """The shard has changed after the listing, or its server has no listing."""
    folder = shutil.copytree(many_shards.folder, tmp_path / "train")
    index = open_index(f"file://{folder}", str(tmp_path / "cache"))
    os.truncate(folder / index.shards[0].name, index.shards[0].bytes + change)
    with store_of(index, shards=8) as store, pytest.raises(ValueError, match=message):
        store.read(0)


def test_close_does_not_wait_for_a_stalled_download(s3: Proxy, remote: Index) -> None:
    s3.fail(remote.shards[0].name, "stall")
    store = store_of(remote, shards=8)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(store.read, 0)
        assert s3.stalled.wait(10)
        began = time.monotonic()
        store.close()
        assert time.monotonic() - began < 5
        with pytest.raises(Stopped):
            waiting.result(timeout=5)
    s3.go_on.set()
    wait_for(lambda: not fetch_threads())
    assert not list(remote.folder.glob("*.part"))


def test_error_of_a_small_cache_names_a_size_that_works(remote: Index) -> None:
    uses, at_once = sequence(remote, micro_batch=8)
    message = r"data\.cache_gb=0\.0001 is too small: the shards that the ranks of a node \(8\) need at the same time take (\S+) GB"
    with pytest.raises(ValueError, match=message) as caught:
        FetchedShards(remote, uses, peak_bytes=at_once, cache_gb=0.0001, ranks_on_node=8)
    enough = float(re.search(message, str(caught.value))[1])  # type: ignore[index]
    assert 8 * at_once <= enough * 1e9 <= 8 * at_once * 1.01
    with ExitStack() as stack:
        for _ in range(8):
            stack.enter_context(FetchedShards(remote, uses, peak_bytes=at_once, cache_gb=enough, ranks_on_node=8))
        with pytest.raises(ValueError, match="others on this node have reserved"):
            FetchedShards(remote, uses, peak_bytes=at_once, cache_gb=enough, ranks_on_node=1)


READER = """
import hashlib, json, sys, time
import data.loader.store, data.storage.remote
from data.dataset.index import open_index
from data.loader.order import compute_evaluation_peak_bytes, plan_evaluation_uses
data.storage.remote.FIRST_PAUSE = 0.01
url, cache, gb, ranks, rank = sys.argv[1], sys.argv[2], float(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5])
index = open_index(url, cache)
uses = plan_evaluation_uses(index.shard_start, 1, 1)
at_once = compute_evaluation_peak_bytes(uses, index.shard_bytes)
digest = hashlib.sha256()
with data.loader.store.FetchedShards(index, uses, peak_bytes=at_once, cache_gb=gb, ranks_on_node=ranks) as store:
    for sample_id in range(len(index)):
        digest.update(store.read(sample_id))
        store.advance(sample_id + 1)
        time.sleep(0.002 * rank)
print(digest.hexdigest())
"""


class Readers:
    """Processes that read all samples through the same cache."""

    def __init__(self, count: int, cache: Path, gb: float) -> None:
        command = [sys.executable, "-c", READER, TRAIN, str(cache), str(gb), str(count)]
        pipe = subprocess.PIPE
        self.processes = [subprocess.Popen([*command, str(rank)], stdout=pipe, stderr=pipe, text=True) for rank in range(count)]

    def results(self) -> list[str]:
        """Returns the output of each process, or its error."""
        outputs = [process.communicate(timeout=60) for process in self.processes]
        return [output.strip() or error for output, error in outputs]

    def __enter__(self) -> "Readers":
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()


@pytest.fixture
def digest(many_shards: Index) -> str:
    import hashlib

    return hashlib.sha256(b"".join(read_images(many_shards))).hexdigest()


def test_ranks_keep_the_bound_of_a_shared_cache(s3: Proxy, many_shards: Index, tmp_path: Path, digest: str) -> None:
    bound = 7 * int(many_shards.shard_bytes.max())
    folder = tmp_path / many_shards.fingerprint
    most = 0
    with Readers(3, tmp_path, bound / 1e9) as readers:
        index = many_shards.__class__(**{**vars(many_shards), "folder": folder})
        while any(process.poll() is None for process in readers.processes):
            if folder.exists():
                most = max(most, cached_bytes(index))
            time.sleep(0.002)
        assert readers.results() == [digest] * 3
    assert bound / 2 < most <= bound
    assert s3.gets["index.npy"] == 1
