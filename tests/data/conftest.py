"""Fixtures of the data tests: datasets of several shards, in folders and on S3, and a source with odd and broken files."""

from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from data.dataset.index import Index
from tests.support.datasets import make_dataset, upload
from tests.support.packs import HOLDOUT, make_source_files, pack_small, write_files
from tests.support.servers import Proxy, s3_server


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """67 files in 4 class folders, three of them no usable images; read-only."""
    return write_files(tmp_path_factory.mktemp("source") / "source", make_source_files())


@pytest.fixture(scope="session")
def packed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source packed in one process without an interruption, with a holdout; read-only."""
    out = tmp_path_factory.mktemp("packed") / "in"
    pack_small(source, out, HOLDOUT)
    return out


@pytest.fixture(scope="session")
def many_shards(tmp_path_factory: pytest.TempPathFactory) -> Index:
    """100 images in about 20 shards of about 55 KB; read-only."""
    index = make_dataset(tmp_path_factory.mktemp("many") / "train", 100, shard_bytes=45_000)
    assert len(index.shards) >= 15
    return index


@pytest.fixture(scope="session")
def _s3(many_shards: Index) -> Iterator[Proxy]:
    with s3_server() as proxy, pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL": proxy.url,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }.items():
            patch.setenv(name, value)
        upload(many_shards.folder, "s3://bucket/train")
        yield proxy


@pytest.fixture
def s3(_s3: Proxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """An S3 server with many_shards at s3://bucket/train; the environment points to it, and pauses between tries are short."""
    monkeypatch.setattr("data.storage.remote.FIRST_PAUSE", 0.01)
    _s3.clear()
    yield _s3
    _s3.go_on.set()
    fsspec.get_filesystem_class("s3").clear_instance_cache()  # a test may have opened a client in another environment
