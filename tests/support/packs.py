"""A small source with odd and broken files in it, and what packing makes of it, for tests."""

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


def write_tree(root: Path, files: Mapping[str, bytes]) -> Path:
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def tar_of(files: Mapping[str, bytes] | Sequence[tuple[str, bytes]], mode: str = "w") -> bytes:
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


def tree() -> dict[str, bytes]:
    """60 good JPEGs in 4 classes, with odd and broken files among them."""
    files = {f"n{label:04d}/image {number}.JPEG": encoded for number, (encoded, label) in enumerate(DRAWN)}
    plain = Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 40, 3), np.uint8))
    return files | {
        "n0000/named.jpg": encode(plain, "PNG"),
        "n0001/cmyk.jpg": encode(plain.convert("CMYK"), "JPEG"),
        "n0002/deep/photo.webp": encode(plain, "WEBP"),
        "n0003/grey.jpg": encode(plain.convert("L"), "JPEG"),
        "n0003/cut.jpg": encode(plain, "JPEG")[:-400],
        "n0003/text.jpg": b"not an image",
        "n0003/empty.jpg": b"",
    }


BROKEN = {"n0003/cut.jpg", "n0003/text.jpg", "n0003/empty.jpg"}


def quietly(source: Path, out: Path, settings: Settings = SMALL, **options: Any) -> list[Index]:
    return pack(source, out, settings, **{"max_rejected": 10} | options)


def contents(index: Index) -> dict[str, tuple[bytes, int]]:
    """The encoded image and the label of each sample, by key."""
    with ShardStore(index) as store:
        return {
            read_key(index, number): (store.read(number).tobytes(), int(index.samples["label"][number])) for number in range(len(index))
        }


def rejected(out: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
