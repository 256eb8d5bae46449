"""Reads and writes the index of a dataset: position, label and size of every sample, in a memory-mapped NumPy array.

    FOLDER/NAME-000000.tar …  the shards, each with an .idx beside it for DALI's reader (shards.py)
    FOLDER/index.npy          a row of 20 bytes for each sample (DTYPE), in shard order; a sample's id is its row
    FOLDER/classes.json       class names; a label is a position in this list
    FOLDER/dataset.json       name, samples, bytes and checksum of each shard; the fingerprint; the settings of packing

dataset.json is written last; a folder without it is not a dataset.

    index = open_index("datasets/in22k/train")
    index.samples["label"][ids]
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np

from data.common.files import open_to_replace
from data.common.hashing import hash_file, new_hash
from data.common.text import join_first
from data.storage.cache import Cache, choose_cache_root
from data.storage.remote import Remote, is_url

DTYPE = np.dtype([("offset", "<u8"), ("size", "<u4"), ("label", "<u4"), ("width", "<u2"), ("height", "<u2")])
FORMAT = 2
_HASH_ROWS = 1 << 20


@dataclass(frozen=True)
class Shard:
    """A tar file of a dataset. `xxh3_128` is the checksum of all its bytes, in hex."""

    name: str
    samples: int
    bytes: int
    xxh3_128: str


@dataclass(frozen=True, eq=False)
class Index:
    """An open dataset.

    Attributes:
        folder: the dataset's folder or, for a dataset at a URL, the folder of its local copies.
        shard_start: int64 (shards + 1,): the id of each shard's first sample, then the number of samples.
        samples: a read-only map of index.npy, (N,) of DTYPE: byte offset of the encoded image in its shard, its size in bytes, label,
            width and height in pixels as stored, before EXIF orientation.
        fingerprint: identifies the dataset (compute_fingerprint).
        remote: the dataset's URL; None for a folder.
    """

    folder: Path
    shards: tuple[Shard, ...]
    shard_start: np.ndarray
    samples: np.ndarray
    classes: tuple[str, ...]
    fingerprint: str
    remote: Remote | None = None

    @property
    def place(self) -> str:
        """The URL or folder of the dataset, for messages."""
        return self.remote.url if self.remote else str(self.folder)

    @property
    def shard_bytes(self) -> np.ndarray:
        """Bytes of each shard, int64 (shards,)."""
        return np.array([shard.bytes for shard in self.shards], np.int64)

    def __len__(self) -> int:
        return len(self.samples)

    def shard_of(self, sample_id: int) -> int:
        """Returns the number of the shard that holds a sample."""
        return int(np.searchsorted(self.shard_start, sample_id, side="right")) - 1


def compute_fingerprint(samples: np.ndarray, shards: Iterable[Shard]) -> str:
    """Hashes the index rows and the shards' names and checksums, which identify a dataset."""
    digest = new_hash()
    for start in range(0, len(samples), _HASH_ROWS):
        digest.update(samples[start : start + _HASH_ROWS].tobytes())
    for shard in shards:
        digest.update(f"{shard.name}\0{shard.xxh3_128}\0".encode())
    return digest.hexdigest()


def write_index(folder: Path, shards: Sequence[Shard], rows: Sequence[np.ndarray], classes: Sequence[str], **about: Any) -> None:
    """Writes the index of a folder's shards, which makes it a dataset. `about` holds further entries of dataset.json."""
    samples = np.concatenate([np.zeros(0, DTYPE), *rows])
    with open_to_replace(folder / "index.npy", "wb") as file:
        np.save(file, samples)
    _write_json(folder / "classes.json", list(classes))
    description = {
        "format": FORMAT,
        "samples": len(samples),
        "classes": len(classes),
        "classes_xxh3_128": hash_file(folder / "classes.json"),
        "fingerprint": compute_fingerprint(samples, shards),
        **about,
        "shards": [asdict(shard) for shard in shards],
    }
    _write_json(folder / "dataset.json", description)


def _write_json(path: Path, value: Any) -> None:
    with open_to_replace(path, encoding="utf-8") as file:
        json.dump(value, file, indent=1, ensure_ascii=False)


def open_index(place: str | os.PathLike[str], cache: str | None = None, *, sizes: bool = True) -> Index:
    """Opens the dataset in a folder or at a URL; `cache` is the folder for local copies of a URL's files (choose_cache_root).

    Raises:
        ValueError: the place does not exist, can't be read or is not a dataset; or, with `sizes`, a shard is missing or has another size
            than when it was packed. Sizes on web servers are known only after fetching.
    """
    remote = Remote(str(place)) if is_url(place) else None
    folder = Path(place)
    if remote is None:
        _check_complete(folder)
    texts = {name: remote.read(name) if remote else (folder / name).read_bytes() for name in ("dataset.json", "classes.json")}
    try:
        description, classes = (json.loads(text) for text in texts.values())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{place}: dataset.json or classes.json is damaged ({error}); pack or copy the dataset again") from error

    if description.get("format") != FORMAT:
        raise ValueError(f"{place} is a dataset of format {description.get('format')}, not {FORMAT}; pack or index it again")
    try:
        shards = tuple(Shard(**shard) for shard in description["shards"])
        expected, fingerprint = (description["samples"], description["classes"]), description["fingerprint"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{place}: dataset.json is damaged ({error}); pack or copy the dataset again") from error
    if sizes:
        _check_sizes(place, shards, remote.list_sizes() if remote else _read_sizes(folder, shards))

    if remote is not None:
        folder = choose_cache_root(cache) / fingerprint
        _fetch_index(remote, folder, shards, fingerprint, texts)
    try:
        samples = np.load(folder / "index.npy", mmap_mode="r")
    except Exception as error:  # NumPy parses the header as Python, which raises errors of many types
        raise ValueError(f"{place}/index.npy is damaged ({error}); copy it again from the original dataset") from error
    counts = [shard.samples for shard in shards]
    if samples.dtype != DTYPE or sum(counts) != len(samples) or expected != (len(samples), len(classes)):
        raise ValueError(
            f"{place}: index.npy has {len(samples)} rows of {samples.dtype} and classes.json {len(classes)} names; dataset.json has "
            f"{expected[0]} samples in {expected[1]} classes, and its shards hold {sum(counts)}. The three files belong to different "
            "datasets: copy them again from the original dataset"
        )
    return Index(
        folder=folder,
        shards=shards,
        shard_start=np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64),
        samples=samples,
        classes=tuple(classes),
        fingerprint=fingerprint,
        remote=remote,
    )


def _check_complete(folder: Path) -> None:
    if not folder.is_dir():
        raise ValueError(
            f"{folder}: no such folder; make a dataset with `python -m data pack SOURCE {folder.parent} --split {folder.name}`"
        )
    for name in ("dataset.json", "classes.json", "index.npy"):
        if not (folder / name).is_file():
            raise ValueError(
                f"{folder} is not a whole dataset: it has no {name}. Packing may have been interrupted "
                f"(the same command resumes it), or the dataset is a folder inside this one, such as {folder / 'train'}"
            )


def _read_sizes(folder: Path, shards: Iterable[Shard]) -> dict[str, int]:
    """Returns the bytes of each shard that exists, by name."""
    sizes = {}
    for shard in shards:
        with suppress(FileNotFoundError):
            sizes[shard.name] = os.stat(folder / shard.name).st_size
    return sizes


def _check_sizes(place: str | os.PathLike[str], shards: Iterable[Shard], sizes: Mapping[str, int] | None) -> None:
    if sizes is None:  # a web server has no listing
        return
    faults = [
        f"{shard.name} has {sizes[shard.name]} bytes instead of {shard.bytes}" if shard.name in sizes else f"{shard.name} is missing"
        for shard in shards
        if sizes.get(shard.name) != shard.bytes
    ]
    if faults:
        raise ValueError(f"{place}: {join_first(faults, '; ')}. Copy these shards again from the original dataset")


def _fetch_index(remote: Remote, folder: Path, shards: Sequence[Shard], fingerprint: str, texts: Mapping[str, bytes]) -> None:
    """Fetches index.npy into the cache and writes the texts beside it. An index with another fingerprint is rejected."""

    def check(path: Path) -> None:
        samples = np.load(path, mmap_mode="r")
        if samples.dtype != DTYPE or compute_fingerprint(samples, shards) != fingerprint:
            raise ValueError("not the index that belongs to dataset.json; copy both again from the original dataset")

    cache = Cache(folder)
    cache.keep("index.npy", lambda part: remote.download("index.npy", part, check=check))
    for name, text in texts.items():
        cache.keep(name, partial(_write, text))


def _write(text: bytes, path: Path) -> None:
    path.write_bytes(text)


def read_key(index: Index, sample_id: int) -> str:
    """Reads a sample's key from the .idx of its shard."""
    shard = index.shard_of(sample_id)
    return _keys(fetch_idx(index, shard))[sample_id - int(index.shard_start[shard])]


def fetch_idx(index: Index, shard: int) -> Path:
    """Returns the path of a shard's .idx; for a dataset at a URL, fetches the file first."""
    path = (index.folder / index.shards[shard].name).with_suffix(".idx")
    remote = index.remote
    if remote is not None and not path.exists():

        def check(part: Path) -> None:
            if len(_keys.__wrapped__(part)) != index.shards[shard].samples:
                raise ValueError(f"not an index of {index.shards[shard].samples} samples")

        Cache(index.folder).keep(path.name, lambda part: remote.download(path.name, part, check=check))
    return path


@lru_cache(maxsize=64)  # neighboring samples are often requested together
def _keys(idx: Path) -> list[str]:
    lines = idx.read_text(encoding="ascii").splitlines()[1:]
    names = [unquote(line.split()[3], errors="surrogateescape") for line in lines]
    return [folder + slash + stem.partition(".")[0] for folder, slash, stem in (name.rpartition("/") for name in names)]
