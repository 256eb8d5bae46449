"""Writes and reads tar shards in WebDataset's layout, with an .idx file for DALI's reader.

    KEY.cls   the label, as decimal text
    KEY.jpg   the encoded image (or KEY.jpeg, .png, .webp)

The bytes of a shard depend on its samples alone, not on times, users or file modes. A shard gets its final name once it is complete. Shards
of other writers can be read too: with any letter case, other members, and labels in a .json.
"""

import itertools
import json
import operator
import re
import string
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self
from urllib.parse import quote

import numpy as np

from data.common.files import open_to_replace
from data.common.hashing import new_hash
from data.dataset.headers import read_image_size
from data.dataset.index import DTYPE, Index, Shard, open_index, write_index

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
TAR_OVERHEAD = 2048  # bytes per sample: two headers, the label and padding
_BLOCK_BYTES = 1 << 20
_END_OF_TAR = bytes(512)
# Names of the members that form a sample: as in webdataset.tariterators, base_plus_ext and tar_file_iterator's skip_meta. But hidden
# files in folders are skipped, as by DALI's wds2idx; WebDataset gives them the key "folder/".
_MEMBER_NAME = re.compile(r"((?:.*/|)[^./]+)[.]([^/]*)", re.DOTALL)
_META_NAME = re.compile(r"__[^/]*__($|/)")
_IDX_SAFE = string.punctuation.replace("%", "")


@dataclass(frozen=True)
class Sample:
    """A sample to be written.

    `key` has no dot, because WebDataset ends a key at a dot, and at most 95 bytes, which fit a plain tar header.
    """

    key: str
    encoded: bytes
    label: int
    extension: str = "jpg"


@dataclass(frozen=True)
class Member:
    """A file in a tar, with the offset and size of its data in bytes.

    `key` is the name up to the first dot of the base name, `extension` the rest, in lower case. `data` is empty if only headers were read.
    """

    key: str
    extension: str
    offset: int
    size: int
    data: bytes = b""


# From a sample's members to its label, width and height (in pixels). Raises ValueError for a sample that can't be used.
Describe = Callable[[list[Member]], tuple[int, int, int]]


@dataclass(frozen=True, eq=False)
class ShardContents:
    """The contents of a shard: keys and index rows of its samples, the text of its .idx, and faults by sample number.

    If only headers were read, checksum, labels, widths and heights are empty or 0.
    """

    shard: Shard
    keys: list[str]
    rows: np.ndarray
    idx: str
    faults: dict[int, str]


def write_dataset(out: Path, samples: Iterable[Sample], classes: Sequence[str], *, shard_bytes: int, name: str) -> Index:
    """Writes samples, in their order, as a dataset in an existing folder: NAME-000000.tar … of about `shard_bytes` each.

    Raises ValueError if there are no samples or one can't be used.
    """
    samples = iter(samples)
    shards: list[Shard] = []
    rows: list[np.ndarray] = []
    for first in samples:
        path = out / f"{name}-{len(shards):06d}.tar"
        shard, shard_rows = write_shard(path, _fill_shard(itertools.chain([first], samples), shard_bytes))
        shards.append(shard)
        rows.append(shard_rows)
    if not shards:
        raise ValueError(f"no image to write to {out}")
    write_index(out, shards, rows, classes)
    return open_index(out)


def _fill_shard(samples: Iterator[Sample], shard_bytes: int) -> Iterator[Sample]:
    """Yields samples until they fill a shard."""
    filled = 0
    for sample in samples:
        yield sample
        filled += len(sample.encoded) + TAR_OVERHEAD
        if filled >= shard_bytes:
            return


def write_shard(path: Path, samples: Iterable[Sample]) -> tuple[Shard, np.ndarray]:
    """Writes a shard and its .idx; returns its description and its samples' index rows, as read back from the file."""
    from webdataset.writer import TarWriter  # takes seconds and hundreds of MB, as webdataset imports torch

    with open_to_replace(path, "wb") as file, TarWriter(file, user="data", group="data", mode=0o644, mtime=0, encoder=False) as tar:
        tar.tarstream.format = tarfile.USTAR_FORMAT  # TarWriter 1.0.2 ignores its `format`
        for sample in samples:
            tar.write({"__key__": sample.key, "cls": str(sample.label).encode(), sample.extension: sample.encoded})
    contents = read_shard(path)
    if contents.faults:
        raise ValueError("; ".join(f"{path}: sample {contents.keys[number]}: {fault}" for number, fault in contents.faults.items()))
    write_idx(path.with_suffix(".idx"), contents.idx)
    return contents.shard, contents.rows


def find_image(sample: list[Member]) -> Member:
    """Returns the image among a sample's members. Raises ValueError for no image and for two members with one extension."""
    by_extension = {member.extension: member for member in sample}
    if len(by_extension) < len(sample):
        raise ValueError(f"it has several members of one extension: {_extensions(sample)}")
    for extension in IMAGE_EXTENSIONS:
        if extension in by_extension:
            return by_extension[extension]
    raise ValueError(f"it has {_extensions(sample)}, and no {' or '.join(IMAGE_EXTENSIONS)}")


def read_label(sample: list[Member], field: str | None = None) -> int | str:
    """Reads a sample's label: the number in its .cls, or a number or class name in its .json.

    Raises ValueError for a sample without the member or the field, and for a label of another type.
    """
    extension = "cls" if field is None else "json"
    data = next((member.data for member in sample if member.extension == extension), None)
    if data is None:
        hint = "; --label FIELD takes labels from the .json" if field is None and "json" in _extensions(sample) else ""
        raise ValueError(f"it has {_extensions(sample)}, and no {extension}{hint}")
    if field is None:
        try:
            return int(data)
        except ValueError:
            raise ValueError(f"its .cls holds {data[:20]!r} instead of a number") from None
    try:
        fields = json.loads(data)
    except ValueError as error:
        raise ValueError(f"its .json can't be read ({error})") from error
    if not isinstance(fields, dict) or field not in fields:
        raise ValueError(f"its .json has no field {field}")
    if not isinstance(fields[field], int | str) or isinstance(fields[field], bool):
        raise ValueError(f"field {field} of its .json is {fields[field]!r} instead of a number or a class name")
    return fields[field]


def describe_sample(sample: list[Member]) -> tuple[int, int, int]:
    """Reads label, width and height of a sample with a number in its .cls, as a Describe."""
    return int(read_label(sample)), *read_image_size(find_image(sample).data)


def _extensions(sample: list[Member]) -> str:
    return ", ".join(member.extension for member in sample)


def read_shard(path: Path, describe: Describe | None = describe_sample) -> ShardContents:
    """Reads a shard once from start to end. Without `describe` only headers are read, about 4 KB a sample.

    Raises ValueError for a file that can't be read, is truncated or is not a tar.
    """
    keys: list[str] = []
    rows: list[tuple[int, int, int, int, int]] = []
    lines: list[str] = []
    faults: dict[int, str] = {}
    try:
        with open(path, "rb") as file:
            source = _HashedReader(file)
            for number, sample in enumerate(read_samples(source if describe else file, data=describe is not None)):
                keys.append(sample[0].key)
                rows.append((0, 0, 0, 0, 0))
                lines.append(format_idx_line(sample))
                try:
                    image = find_image(sample)
                    rows[number] = (image.offset, image.size, *(describe(sample) if describe else (0, 0, 0)))
                except ValueError as error:
                    faults[number] = str(error)
            while describe and source.read(_BLOCK_BYTES):  # the checksum includes bytes after the end of the archive
                pass
    except tarfile.TarError as error:
        after = f", after sample {keys[-1]}" if keys else ""
        raise ValueError(f"{path}: not a whole tar file ({error}{after})") from error
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    shard = Shard(path.name, len(keys), path.stat().st_size, source.digest.hexdigest() if describe else "")
    return ShardContents(shard, keys, np.array(rows, DTYPE), f"v1.2 {len(lines)}\n" + "".join(lines), faults)


class _HashedReader:
    """Hashes a file while it is read from start to end."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest = file, new_hash()

    def read(self, size: int) -> bytes:
        data = self.file.read(size)
        self.digest.update(data)
        return data


class StrictTarInfo(tarfile.TarInfo):
    """A TarInfo that raises an error for a damaged or missing header, which tarfile treats as the end of the archive."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if buf == _END_OF_TAR:
                raise
            raise tarfile.ReadError(str(error)) from error


def read_samples(file: Any, *, data: bool) -> Iterator[list[Member]]:
    """Yields the samples of a tar as WebDataset does: consecutive members of one key.

    With `data` the file needs only read(). Otherwise only headers are read, by seeking. Raises tarfile.TarError for a file that is
    truncated, damaged or not a tar.
    """
    with tarfile.open(fileobj=file, mode="r|" if data else "r:", tarinfo=StrictTarInfo) as tar:
        for _, members in itertools.groupby(_members(tar, data), key=operator.attrgetter("key")):
            yield list(members)


def _members(tar: tarfile.TarFile, data: bool) -> Iterator[Member]:
    for entry in tar:
        name = _MEMBER_NAME.fullmatch(entry.name)
        if entry.isreg() and name and not _META_NAME.match(entry.name):
            stored = tar.extractfile(entry) if data else None
            yield Member(name[1], name[2].lower(), entry.offset_data, entry.size, stored.read() if stored else b"")


def format_idx_line(sample: list[Member]) -> str:
    """Formats a sample's line of an .idx as DALI's wds2idx does: `extension offset size name` for each member.

    DALI ends a name at a blank, so blanks, percent signs and characters that are not ASCII are percent-encoded.
    """
    fields = []
    for member in sample:
        extension, key = (quote(text, safe=_IDX_SAFE, errors="surrogateescape") for text in (member.extension, member.key))
        fields.append(f"{extension} {member.offset} {member.size} {key}.{extension}")
    return " ".join(fields) + "\n"


def write_idx(path: Path, text: str) -> None:
    """Writes the text of an .idx file atomically."""
    with open_to_replace(path, encoding="ascii") as file:
        file.write(text)
