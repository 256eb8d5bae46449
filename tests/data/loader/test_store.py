"""Reading from shards in a folder; test_fetched.py has those at URLs."""

import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from data.dataset.index import Index, open_index
from data.loader.store import ShardStore
from data.storage.remote import Stopped


def read_images(index: Index) -> list[bytes]:
    images = []
    for number, shard in enumerate(index.shards):
        data = (index.folder / shard.name).read_bytes()
        for row in index.samples[index.shard_start[number] : index.shard_start[number + 1]]:
            images.append(data[row["offset"] : row["offset"] + row["size"]])
    return images


def test_threads_share_few_open_files(dataset: Index) -> None:
    expected = read_images(dataset)
    ids = np.random.default_rng(0).integers(0, len(dataset), 3000)
    with ShardStore(dataset, max_open=2) as store, ThreadPoolExecutor(8) as pool:
        for sample_id, image in zip(ids, pool.map(store.read, ids.tolist()), strict=True):
            assert image.tobytes() == expected[sample_id]
            assert len(store._open) <= 2


def test_close_closes_all_files(dataset: Index) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    with ShardStore(dataset, max_open=3) as store:
        for sample_id in range(0, len(dataset), 7):
            store.read(sample_id)
        assert len(list(Path("/proc/self/fd").iterdir())) == before + 3
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.fixture
def copy(dataset: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Index:
    """A copy of the dataset that may be harmed; pauses between tries are short."""
    monkeypatch.setattr("data.loader.store.FIRST_PAUSE", 0.001)
    return open_index(shutil.copytree(dataset.folder, tmp_path / "copy"))


def test_errors_name_the_shard(copy: Index) -> None:
    last = int(copy.shard_start[2]) - 1
    with ShardStore(copy) as store:
        (copy.folder / copy.shards[0].name).unlink()
        with pytest.raises(OSError, match=rf"can't be read from {copy.shards[0].name} of .*copy \(No such file or directory; 6 tries\)"):
            store.read(0)
        (copy.folder / copy.shards[1].name).write_bytes(b"short")
        with pytest.raises(OSError, match=rf"can't be read from {copy.shards[1].name} .*the shard ends early: 0 of \d+ bytes"):
            store.read(last)


@pytest.mark.parametrize("failures", [1, 5, 6])
def test_failed_read_is_tried_again(copy: Index, monkeypatch: pytest.MonkeyPatch, failures: int) -> None:
    """With growing pauses, and a new descriptor; the sixth failure is the last."""
    pauses, reads = [], []
    pread = os.pread

    def failing(descriptor: int, size: int, offset: int) -> bytes:
        reads.append(offset)
        if len(reads) > failures:
            return pread(descriptor, size, offset)
        if len(reads) % 2:
            raise OSError(5, "Input/output error")
        return pread(descriptor, size // 2, offset)

    monkeypatch.setattr("data.loader.store.os.pread", failing)
    with ShardStore(copy) as store:
        monkeypatch.setattr(store._stop, "wait", pauses.append)
        if failures < 6:
            assert store.read(3).tobytes() == read_images(copy)[3]
        else:
            with pytest.raises(OSError, match=r"ends early.*; 6 tries"):
                store.read(3)
            assert store.read(3).tobytes() == read_images(copy)[3]
    assert len(reads) == failures + 1
    assert pauses == [0.001 * 2**number for number in range(min(failures, 5))]


def test_missing_shard_costs_its_pauses_once(copy: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    path = copy.folder / copy.shards[1].name
    with ShardStore(copy) as store:
        monkeypatch.setattr(store._stop, "wait", pauses.append)
        path.rename(path.with_suffix(".away"))
        for sample_id in range(*copy.shard_start[1:3].tolist()):
            with pytest.raises(OSError, match="No such file"):
                store.read(sample_id)
        assert len(pauses) == 5
        path.with_suffix(".away").rename(path)
        store.read(int(copy.shard_start[1]))
        path.write_bytes(b"")
        with pytest.raises(OSError, match="ends early"):  # the shard was readable since, so all tries are made again
            store.read(int(copy.shard_start[1]))
        assert len(pauses) == 10


def test_closing_ends_a_pause(copy: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.loader.store.FIRST_PAUSE", 60)
    (copy.folder / copy.shards[0].name).unlink()
    with ThreadPoolExecutor(1) as pool, ShardStore(copy) as store:
        reading = pool.submit(store.read, 0)
        time.sleep(0.1)
        assert not reading.done()
        store.close()
        with pytest.raises(Stopped):
            reading.result(timeout=5)
