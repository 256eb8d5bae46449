"""Datasets at URLs: how they are opened, and the errors of places that can't be opened."""

from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest

from data.__main__ import main
from data.dataset.index import Index, open_index, read_key
from data.packing.verify import verify
from tests.data.loader.test_fetched import TRAIN, read_all, store_of
from tests.data.loader.test_store import read_images
from tests.support.datasets import upload
from tests.support.servers import Proxy, web_server

pytestmark = pytest.mark.slow


def test_index_comes_through_the_cache_once(s3: Proxy, many_shards: Index, tmp_path: Path) -> None:
    s3.clear()
    index = open_index(TRAIN, str(tmp_path))
    assert index.folder == tmp_path / many_shards.fingerprint
    assert isinstance(index.samples, np.memmap)
    assert (index.samples == many_shards.samples).all()
    assert (index.shards, index.classes, index.fingerprint) == (many_shards.shards, many_shards.classes, many_shards.fingerprint)
    assert [read_key(index, sample_id) for sample_id in (0, 50, 99, 50)] == [
        read_key(many_shards, sample_id) for sample_id in (0, 50, 99, 50)
    ]
    assert not s3.shards()
    open_index(TRAIN, str(tmp_path))
    assert s3.gets["index.npy"] == 1
    assert sum(count for name, count in s3.gets.items() if name.endswith(".idx")) == 3


def test_index_of_another_dataset_never_enters_the_cache(s3: Proxy, tmp_path: Path) -> None:
    s3.fail("index.npy", "ever-corrupt")
    with pytest.raises(ValueError, match=r"s3://bucket/train/index\.npy: .*\(6 tries\)"):
        open_index(TRAIN, str(tmp_path))
    assert [path.name for folder in tmp_path.iterdir() for path in folder.iterdir()] == ["lock"]


@pytest.fixture(params=["http", "file", "memory"])
def url(request: pytest.FixtureRequest, many_shards: Index) -> Iterator[str]:
    if request.param == "http":
        with web_server(many_shards.folder.parent) as proxy:
            proxy.fail(many_shards.shards[1].name, "500", "short", "corrupt")
            yield f"{proxy.url}/train"
    elif request.param == "file":
        yield f"file://{many_shards.folder}"
    else:
        store = fsspec.filesystem("memory")
        store.put(str(many_shards.folder), "/train", recursive=True)
        yield "memory://train"
        store.rm("/train", recursive=True)


def test_other_protocols_give_the_same_bytes(url: str, many_shards: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.storage.remote.FIRST_PAUSE", 0.01)
    index = open_index(url, str(tmp_path))
    assert index.place == url
    with store_of(index, shards=6) as store:
        assert read_all(store) == read_images(many_shards)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://nobody/train", r"s3://nobody/train/dataset\.json: FileNotFoundError: .*bucket does not exist \(1 try\)"),
        ("s3://bucket/nothing", r"s3://bucket/nothing/dataset\.json: FileNotFoundError.* is it the folder of a packed dataset"),
        ("gs://bucket/train", r"gs://bucket/train: can't be opened: .*gcsfs"),
        ("what://bucket/train", r"what://bucket/train: can't be opened: Protocol not known: what"),
        ("http://127.0.0.1:1/train", r"http://127\.0\.0\.1:1/train/dataset\.json: ClientConnectorError.*\(6 tries\)"),
    ],
)
def test_place_that_cannot_be_opened_is_an_error(s3: Proxy, tmp_path: Path, url: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_index(url, str(tmp_path))


def test_missing_credentials_are_an_error(s3: Proxy, many_shards: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    upload(many_shards.folder, "s3://bucket/public", ACL="public-read")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with pytest.raises(ValueError, match=r"Unable to locate credentials \(1 try\); credentials come from .* FSSPEC_S3_ANON=true"):
        open_index(TRAIN, str(tmp_path))
    monkeypatch.setitem(fsspec.config.conf, "s3", {"anon": True})  # as FSSPEC_S3_ANON=true does
    with pytest.raises(ValueError, match=r"dataset\.json: PermissionError: .*\(1 try\)"):
        open_index(TRAIN, str(tmp_path))
    assert len(open_index("s3://bucket/public", str(tmp_path))) == 100


def test_listing_shows_missing_and_cut_shards(s3: Proxy, dataset: Index, tmp_path: Path) -> None:
    upload(dataset.folder, "s3://bucket/cut")
    store = fsspec.filesystem("s3")
    store.rm_file(f"bucket/cut/{dataset.shards[1].name}")
    store.pipe_file(f"bucket/cut/{dataset.shards[3].name}", b"short")
    expected = rf"s3://bucket/cut: {dataset.shards[1].name} is missing; {dataset.shards[3].name} has 5 bytes instead of \d+"
    with pytest.raises(ValueError, match=expected):
        open_index("s3://bucket/cut", str(tmp_path))


def test_store_without_permission_to_list_is_read(s3: Proxy, tmp_path: Path) -> None:
    s3.fail("bucket", "ever-403")
    index = open_index(TRAIN, str(tmp_path))
    assert index.remote is not None
    assert index.remote.list_sizes() is None


def test_stats_order_and_verify_read_urls(
    s3: Proxy, many_shards: Index, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.storage.remote.FIRST_PAUSE", 0.01)
    outputs = []
    job = tmp_path / "job.yaml"
    for place in (str(many_shards.folder), TRAIN):
        job.write_text(f"global_batch: 10\ndata: {{train: '{place}', cache: {tmp_path}}}")
        for command in (["stats", place, "--cache", str(tmp_path)], ["order", str(job), "--steps", "0:3"]):
            assert main(command) == 0
            outputs.append(capsys.readouterr().out.replace(place, ""))
    assert outputs[:2] == outputs[2:]
    assert not s3.shards()
    s3.fail(many_shards.shards[2].name, "ever-corrupt")
    assert main(["verify", TRAIN, "--cache", str(tmp_path), "--workers", "1"]) == 1
    line, _ = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{TRAIN}/{many_shards.shards[2].name}: the checksum differs from that of the packed shard")
    s3.clear()
    assert verify(TRAIN, str(tmp_path), deep=True) == 0
    assert s3.shards() == {many_shards.shards[2].name: 1}
