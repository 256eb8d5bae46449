"""Drawn datasets of several shards, and their upload to a store."""

from pathlib import Path

import fsspec

from data.dataset.index import Index
from data.dataset.shards import Sample, write_dataset
from data.synthetic.drawings import PATTERNS
from data.synthetic.synthesize import draw_images


def make_dataset(out: Path, count: int, *, shard_bytes: int = 150_000, seed: int = 0) -> Index:
    """Writes a dataset of `count` drawn images of 10 classes to OUT, about 20 a shard."""
    out.mkdir()
    samples = (Sample(f"{number:09d}", encoded, label) for number, (encoded, label) in enumerate(draw_images(10, count, seed, 0)))
    return write_dataset(out, samples, list(PATTERNS), shard_bytes=shard_bytes, name="train")


def upload(folder: Path, url: str, **options: str) -> None:
    store, path = fsspec.core.url_to_fs(url)
    store.mkdirs(path.partition("/")[0], exist_ok=True)
    for file in folder.iterdir():
        store.put_file(str(file), f"{path}/{file.name}", **options)
