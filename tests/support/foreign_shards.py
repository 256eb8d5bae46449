"""Shards as other tools write them, for tests."""

import io
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL import Image

from data.synthetic.synthesize import draw_images

JPEGS = [encoded for encoded, _ in draw_images(10, 20, 3, 0)]


def as_format(encoded: bytes, kind: str) -> bytes:
    """The same image in another format of Pillow's."""
    out = io.BytesIO()
    Image.open(io.BytesIO(encoded)).save(out, kind)
    return out.getvalue()


def write_tar(path: Path, members: Iterable[tuple[str, bytes]], *, format: int = tarfile.PAX_FORMAT, folders: Sequence[str] = ()) -> None:
    """A tar of files, in the order they come, after `folders`. Names may hold bytes that are not UTF-8 as surrogates."""
    with tarfile.open(path, "w", format=format, encoding="utf-8", errors="surrogateescape") as tar:
        for name in folders:
            entry = tarfile.TarInfo(name)
            entry.type = tarfile.DIRTYPE
            tar.addfile(entry)
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
