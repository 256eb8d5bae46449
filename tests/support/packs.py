"""A small image source with odd and broken files, and helpers to pack it and read the result."""

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data.dataset.index import Index, read_key
from data.loader.store import ShardStore
from data.packing.pack import pack
from data.packing.plan import Settings
from data.synthetic.synthesize import draw_images

DRAWN = [(encoded, label) for encoded, label in draw_images(4, 60, 0, 0)]
SMALL = Settings(name="in", shard_bytes=60_000)
HOLDOUT = Settings(name="in", shard_bytes=60_000, holdout=3)
ODD_NAMES = [
    "plain.jpg", "two.dots.in.it.jpg", "no extension", ".hidden", "caf\udce9.jpg", "café.jpg", "%41.jpg", "A.jpg", "tab\there.jpg",
    "line\nfeed.jpg", "same.jpg", "same.png", "same.jpg.gif", "quote'\".jpg", "x" * 200 + ".jpg", "x" * 200 + ".png", "y" * 150 + "1.jpg",
    "y" * 150 + "2.jpg", "..jpg", "-.jpg", "__x__.jpg", "a/b.jpg", "a%2Fb.jpg", "ü" * 60 + ".jpg",
]  # fmt: skip


BROKEN = {"n0003/cut.jpg", "n0003/text.jpg", "n0003/empty.jpg"}


def write_files(root: Path, files: Mapping[str, bytes]) -> Path:
    """Writes files by relative path; returns the root."""
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def make_tar(files: Mapping[str, bytes] | Sequence[tuple[str, bytes]], mode: str = "w") -> bytes:
    """Returns a tar of the files, in their order."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as tar:  # type: ignore[call-overload]
        for name, data in files.items() if isinstance(files, Mapping) else files:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return out.getvalue()


def encode(image: Image.Image, kind: str) -> bytes:
    out = io.BytesIO()
    image.save(out, kind)
    return out.getvalue()


def make_source_files() -> dict[str, bytes]:
    """Returns 60 sound JPEGs in 4 class folders, with odd and broken files among them."""
    files = {f"n{label:04d}/image {number}.JPEG": encoded for number, (encoded, label) in enumerate(DRAWN)}
    plain = Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 40, 3), np.uint8))
    return files | {
        "n0000/named.jpg": encode(plain, "PNG"),
        "n0001/cmyk.jpg": encode(plain.convert("CMYK"), "JPEG"),
        "n0002/deep/photo.webp": encode(plain, "WEBP"),
        "n0003/gray.jpg": encode(plain.convert("L"), "JPEG"),
        "n0003/cut.jpg": encode(plain, "JPEG")[:-400],
        "n0003/text.jpg": b"not an image",
        "n0003/empty.jpg": b"",
    }


def pack_small(source: Path, out: Path, settings: Settings = SMALL, **options: Any) -> list[Index]:
    """Packs into small shards, with up to ten rejected images."""
    return pack(source, out, settings, **{"max_rejected": 10} | options)


def read_samples(index: Index) -> dict[str, tuple[bytes, int]]:
    """Returns the encoded image and the label of each sample, by key, in sample order."""
    with ShardStore(index) as store:
        return {
            read_key(index, number): (store.read(number).tobytes(), int(index.samples["label"][number])) for number in range(len(index))
        }


def read_rejected(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / "rejected.jsonl").read_text().splitlines()]


def read_files(folder: Path) -> dict[str, bytes]:
    """Returns the bytes of all files below a folder, by relative path."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
