"""Writes shards as other tools do."""

import io
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from data.synthetic.synthesize import draw_images

JPEGS = [encoded for encoded, _ in draw_images(10, 20, 3, 0)]


def reencode(encoded: bytes, kind: str, mode: str = "RGB", **options: Any) -> bytes:
    """Encodes an image in another of Pillow's formats and modes."""
    out = io.BytesIO()
    Image.open(io.BytesIO(encoded)).convert(mode).save(out, kind, **options)
    return out.getvalue()


def write_tar(path: Path, members: Iterable[tuple[str, bytes]], *, format: int = tarfile.PAX_FORMAT, folders: Sequence[str] = ()) -> None:
    """Writes a tar of `folders` and then files, in their order. Names hold bytes that are not UTF-8 as surrogates."""
    with tarfile.open(path, "w", format=format, encoding="utf-8", errors="surrogateescape") as tar:
        for name in folders:
            entry = tarfile.TarInfo(name)
            entry.type = tarfile.DIRTYPE
            tar.addfile(entry)
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
