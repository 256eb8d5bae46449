"""Tar shards in WebDataset's layout: write one, read its headers, and the .idx file that lets DALI's own reader use it.

    KEY.cls   the label, as decimal text
    KEY.jpg   the encoded image

The bytes of a shard follow from its samples alone (no times, users or modes of the machine that wrote it). A shard appears
under its final name whole or not at all.
"""

import io
import itertools
import operator
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from data.index import DTYPE, publish


@dataclass(frozen=True)
class Sample:
    """One image on its way into a shard. `key` has no dot: WebDataset ends a key at the first one."""

    key: str
    jpeg: bytes
    label: int


@dataclass(frozen=True)
class Member:
    """A file in a tar: `offset` is where its data begin, in bytes from the start of the tar."""

    key: str
    extension: str
    offset: int
    size: int

    @property
    def name(self) -> str:
        return f"{self.key}.{self.extension}"


def write_shard(path: Path, samples: Iterable[Sample]) -> np.ndarray:
    """Writes PATH and its .idx; gives its index rows, of index.DTYPE, in the order of the samples."""
    from webdataset import TarWriter  # imports torch, which takes seconds and which only writing is worth

    with open(path.with_name(path.name + ".tmp"), "wb") as file:
        with TarWriter(file, encoder=False, mtime=0, user="data", group="data", mode=0o644) as tar:
            for sample in samples:
                tar.write({"__key__": sample.key, "jpg": sample.jpeg, "cls": str(sample.label).encode()})
        publish(file, path)
    members = read_members(path)
    write_idx(path.with_suffix(".idx"), members)
    return index_rows(path, members)


def read_members(path: Path) -> list[dict[str, Member]]:
    """The members of each sample of a tar, by extension, read from its headers in sequence.

    Raises ValueError for a tar that is cut short or is none, and for a sample without an image or a label.
    """
    members = []
    try:
        with tarfile.open(path, "r:") as tar:
            for entry in tar:
                folder, slash, name = entry.name.rpartition("/")
                stem, _, extension = name.partition(".")
                members.append(Member(folder + slash + stem, extension, entry.offset_data, entry.size))
    except tarfile.TarError as error:
        raise ValueError(f"{path}: not a whole tar file ({error})") from error
    samples = []
    for key, group in itertools.groupby(members, key=operator.attrgetter("key")):
        sample = {member.extension: member for member in group}
        if not {"jpg", "cls"} <= sample.keys():
            raise ValueError(f"{path}: sample {key} has {', '.join(sample)} instead of jpg and cls")
        samples.append(sample)
    return samples


def index_rows(path: Path, samples: Sequence[dict[str, Member]]) -> np.ndarray:
    """The index rows, of index.DTYPE, of a tar's samples; width and height come from each image's header, labels from KEY.cls.

    Raises ValueError for an image whose header can't be read and for a label that is no number.
    """
    rows = np.zeros(len(samples), DTYPE)
    with open(path, "rb") as file:
        for row, sample in zip(rows, samples, strict=True):
            image, label = sample["jpg"], sample["cls"]
            try:
                file.seek(label.offset)
                number = int(file.read(label.size))
                file.seek(image.offset)
                with Image.open(io.BytesIO(file.read(image.size))) as header:
                    width, height = header.size
            except (OSError, ValueError) as error:
                raise ValueError(f"{path}: sample {image.key}: {error}") from error
            row["offset"], row["size"], row["label"] = image.offset, image.size, number
            row["width"], row["height"] = width, height
    return rows


def idx_text(samples: Sequence[dict[str, Member]]) -> str:
    """A tar's .idx as DALI's wds2idx writes it: `v1.2 N`, then a line a sample of `extension offset size name` groups."""
    lines = [f"v1.2 {len(samples)}"]
    for sample in samples:
        lines.append(" ".join(f"{part.extension} {part.offset} {part.size} {part.name}" for part in sample.values()))
    return "\n".join(lines) + "\n"


def write_idx(path: Path, samples: Sequence[dict[str, Member]]) -> None:
    with open(path.with_name(path.name + ".tmp"), "w", encoding="utf-8") as file:
        file.write(idx_text(samples))
        publish(file, path)
