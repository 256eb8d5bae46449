"""Reads image sources: recognizes a folder or tar, lists its files as plain arrays, and reads each by its position.

    source = recognize_source(Path("fall11_whole.tar"))
    for listing in map(source.make_lister(), source.containers):      # one Listing per container, in any process
        …
    encoded = read_entry(source.root, container, name, offset, size)

| kind              | layout of SOURCE                                                                                        |
|-------------------|---------------------------------------------------------------------------------------------------------|
| class folders     | CLASS/…/IMAGE, at any depth below CLASS                                                                 |
| class tars        | CLASS.tar …, or SOURCE is one tar of such tars (fall11_whole.tar, ILSVRC2012_img_train.tar)               |
| labeled images    | images without classes, in a folder or in one tar, with a file of labels (ILSVRC2012_img_val.tar)         |
| WebDataset shards | tars of KEY.jpg (jpeg, png, webp) with KEY.cls, or KEY.json with a field "label"; or SOURCE is one of them |

Labels of shards are class names or numbers. A number is a position in a classes.json beside the shards, or in the given classes.

A tar is never unpacked: an entry is a range of bytes in a file, also inside a tar within a tar. Every file of a container is an
entry, whatever its name; decoding decides whether it is an image.

An entry's key is CLASS/PATH, with PATH below the class and without extension, percent-encoded to ASCII without dots and blanks.
Files of a class whose names differ only in their extension keep it (`cat%2Ejpg`, `cat%2Epng`). A key of more than 95 bytes would
need tar's extended headers; it is cut to 78 bytes, `~` and a hash. WebDataset samples keep their key. Where keys repeat between
shards, every key is prefixed with its shard's name.
"""

import itertools
import os
import posixpath
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import BinaryIO
from urllib.parse import quote_from_bytes

import numpy as np
import xxhash

from data.dataset.shards import Member, StrictTarInfo, find_image, read_label, read_samples
from data.packing.labels import escape_name, read_classes, read_image_labels

# One file of a source. `label` is a position in its listing's labels; `text` is the byte offset in the listing's text of the key,
# which the name follows; `hash` is the key's 64-bit xxhash. A plain file has offset 0; a file within a tar never has.
ENTRY = np.dtype(
    [
        ("container", "<u4"), ("label", "<u4"), ("offset", "<u8"), ("size", "<u8"), ("hash", "<u8"),
        ("text", "<u8"), ("key_bytes", "u1"), ("name_bytes", "<u2"),
    ]
)  # fmt: skip
KEY_BYTES = 95  # a plain tar header has 100 for KEY.jpeg
SHARDS = "WebDataset shards"

_COMPRESSED = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}
_COMPRESSED_NAME = re.compile(r".*\.(tgz|tar\.(gz|bz2|xz|zst))", re.IGNORECASE)
_SPLITS = {"train", "val", "valid", "validation", "test"}
_EXPECTED = (
    "a source is a folder of class folders, a folder of one tar per class, one tar of such tars, WebDataset shards (KEY.jpg with "
    "KEY.cls or KEY.json), or images in a folder or tar with their labels in a file (--labels)"
)

File = tuple[str, int, int]  # name, byte offset in the tar (0 for a plain file), size in bytes


@dataclass(frozen=True)
class Container:
    """A folder or tar that is listed as one.

    `path` is relative to the source's root. For a tar within that tar, `inner` is the name of the inner tar, and `start` and `stop` are
    its range of bytes. Names hold undecodable bytes as surrogates, as in Python's file functions.
    """

    path: str
    class_name: str = ""
    inner: str = ""
    start: int = 0
    stop: int | None = None


@dataclass(frozen=True, eq=False)
class Listing:
    """The files of one container.

    `rows` are of ENTRY; `text` holds keys and names; `labels` are the distinct labels (a class name, the number of a class, or None).
    `faults` are the reasons, by row, why a shard's sample can't be used, apart from its image.
    """

    rows: np.ndarray
    text: bytes
    labels: list[str | int | None]
    faults: dict[int, str]


@dataclass(frozen=True)
class Source:
    """A recognized source. `classes` is None if only a listing reveals them."""

    kind: str
    root: Path
    containers: tuple[Container, ...]
    classes: tuple[str, ...] | None
    labels: Path | None = None

    def make_lister(self, *, shard_in_key: bool = False) -> Callable[[Container], Listing]:
        """Returns a picklable function that lists a container."""
        if self.labels:
            return partial(_list_labeled, self.root, self.labels)
        if self.kind == SHARDS:
            return partial(_list_shard, self.root, shard_in_key)
        return partial(_list_class, self.root)


def recognize_source(path: Path, labels: Path | None = None) -> Source:
    """Recognizes the kind of source in a folder or tar; `labels` is the file of labels of images without classes.

    Raises:
        ValueError: the path has none of the expected layouts, which the message names.
    """
    if path.is_dir():
        return _recognize_folder(path, labels)
    if not path.is_file():
        raise ValueError(f"{path}: no such file or folder")
    root, whole = path.parent, Container(path.name)
    if labels:
        return Source("labeled images", root, (whole,), None, labels)
    names = _peek(path)
    if _has_labels(names):
        return _make_shards(root, [whole])
    if any(name.endswith(".tar") for name in names):
        inner = [(name, offset, size) for name, offset, size in list_tar(path) if name.endswith(".tar")]
        return _make_class_tars(root, [Container(path.name, _tar_stem(name), name, offset, offset + size) for name, offset, size in inner])
    raise ValueError(f"{path}: it begins with {', '.join(names[:3])}; {_EXPECTED}")


def _recognize_folder(path: Path, labels: Path | None) -> Source:
    if labels:
        return Source("labeled images", path, (Container(""),), None, labels)
    with os.scandir(path) as scan:
        entries = sorted((entry for entry in scan if not entry.name.startswith(".")), key=lambda entry: entry.name)
    folders = [entry.name for entry in entries if entry.is_dir()]
    tars = [entry.name for entry in entries if entry.name.endswith(".tar")]
    if compressed := [entry.name for entry in entries if _COMPRESSED_NAME.fullmatch(entry.name)]:
        raise ValueError(f"{path / compressed[0]} is compressed, and images are read by their position in a tar; decompress it first")
    if folders and tars:
        raise ValueError(f"{path}: {len(folders)} folders and {len(tars)} tars; classes can't be in both; {_EXPECTED}")
    if tars:
        names = _peek(path / tars[0])
        if _has_labels(names):
            return _make_shards(path, [Container(name) for name in tars])
        if any(name.endswith(".tar") for name in names):
            raise ValueError(f"{path / tars[0]} is a tar of tars; give it as SOURCE")
        return _make_class_tars(path, [Container(name, _tar_stem(name)) for name in tars])
    if folders and set(folders) <= _SPLITS:
        raise ValueError(f"{path}: {' and '.join(folders)} look like splits of a dataset, not classes; pack {path / folders[0]}")
    if folders:
        return Source("class folders", path, tuple(Container(name, name) for name in folders), tuple(sorted(map(escape_name, folders))))
    raise ValueError(f"{path}: no class folders and no tars in it; {_EXPECTED}")


def _make_shards(root: Path, containers: list[Container]) -> Source:
    classes = read_classes(root) if (root / "classes.json").is_file() else None
    return Source(SHARDS, root, tuple(containers), classes)


def _make_class_tars(root: Path, containers: list[Container]) -> Source:
    counts = Counter(container.class_name for container in containers)
    if repeated := [name for name, count in counts.items() if count > 1]:
        raise ValueError(f"{root / containers[0].path}: several tars of the class {repeated[0]}")
    containers.sort(key=lambda container: container.class_name)
    return Source("class tars", root, tuple(containers), tuple(sorted(map(escape_name, counts))))


def _peek(path: Path) -> list[str]:
    """Returns the names of a tar's first files."""
    return [name for name, _, _ in itertools.islice(list_tar(path), 20)]


def _has_labels(names: Sequence[str]) -> bool:
    return any(name.endswith((".cls", ".json")) for name in names)


def _tar_stem(name: str) -> str:
    return posixpath.basename(name).removesuffix(".tar")


def _list_class(root: Path, container: Container) -> Listing:
    files = list_files(root, container)
    paths = [posixpath.normpath(name).removeprefix(container.class_name + "/") for name, _, _ in files]
    keys = [encode_key(f"{container.class_name}/{path}") for path in _drop_extensions(paths)]
    return make_listing(container, files, keys, [escape_name(container.class_name)] * len(files))


def _list_labeled(root: Path, labels: Path, container: Container) -> Listing:
    files = sorted(list_files(root, container))
    names = [name for name, _, _ in files]
    classes = read_image_labels(labels, names)
    stems = _drop_extensions([posixpath.normpath(name) for name in names])
    keys = [encode_key(f"{class_name}/{stem}") for class_name, stem in zip(classes, stems, strict=True)]
    return make_listing(container, files, keys, classes)


def _drop_extensions(names: Sequence[str]) -> list[str]:
    """Returns the names without extensions, except if that would make two names equal."""
    stems = [posixpath.splitext(name)[0] for name in names]
    counts, taken = Counter(stems), set(names)
    return [name if counts[stem] > 1 or stem in taken else stem for name, stem in zip(names, stems, strict=True)]


def _list_shard(root: Path, shard_in_key: bool, container: Container) -> Listing:
    path = root / container.path
    prefix = f"{_tar_stem(container.path)}/" if shard_in_key else ""
    files: list[File] = []
    keys: list[str] = []
    labels: list[str | int | None] = []
    faults: dict[int, str] = {}
    try:
        with open(path, "rb") as shard:
            for sample in read_samples(shard, data=False):
                image, label = sample[0], None
                try:
                    image = find_image(sample)
                    label = _read_label(shard, sample)
                except ValueError as error:
                    faults[len(files)] = str(error)
                keys.append(encode_key(prefix + image.key, keep="%"))
                files.append((f"{image.key}.{image.extension}", image.offset, image.size))
                labels.append(label)
    except tarfile.TarError as error:
        raise ValueError(f"{path}: not a whole tar ({error})") from error
    if faults and len(faults) == len(files):
        raise ValueError(f"{path}: none of its {len(files)} samples can be used; of {escape_name(keys[0])}: {faults[0]}")
    return make_listing(container, files, keys, labels, faults)


def _read_label(shard: BinaryIO, sample: list[Member]) -> str | int:
    """Reads a sample's label, a number or a class name; raises ValueError if there is none."""
    members = {member.extension: member for member in sample}
    member = members.get("cls") or members.get("json")
    if member is None:
        raise ValueError(f"it has {', '.join(members)}, and neither cls nor json")
    data = os.pread(shard.fileno(), member.size, member.offset)
    if member.extension == "json":
        return read_label([replace(member, data=data)], "label")
    try:
        text = data.decode("utf-8").strip()
    except UnicodeDecodeError:
        text = ""
    if not text:
        raise ValueError(f"its .cls holds {data[:20]!r} instead of a number or a class name")
    return int(text) if re.fullmatch(r"-?\d+", text) else text


def make_listing(
    container: Container,
    files: Sequence[File],
    keys: Sequence[str],
    labels: Sequence[str | int | None],
    faults: dict[int, str] | None = None,
) -> Listing:
    """Makes a container's Listing of its files and, in the same order, their keys and labels."""
    codes = {label: code for code, label in enumerate(dict.fromkeys(labels))}
    rows = np.zeros(len(files), ENTRY)
    names = [os.fsencode(posixpath.join(container.inner, name)) for name, _, _ in files]
    rows["label"] = [codes[label] for label in labels]
    rows["offset"] = [offset for _, offset, _ in files]
    rows["size"] = [size for _, _, size in files]
    rows["hash"] = [xxhash.xxh3_64_intdigest(key.encode()) for key in keys]
    rows["key_bytes"] = [len(key) for key in keys]
    rows["name_bytes"] = [len(name) for name in names]
    ends = np.cumsum(rows["key_bytes"].astype(np.uint64) + rows["name_bytes"])
    rows["text"][1:] = ends[:-1]
    return Listing(rows, b"".join(key.encode() + name for key, name in zip(keys, names, strict=True)), list(codes), faults or {})


def encode_key(path: str, *, keep: str = "") -> str:
    """Encodes a path as a sample key of at most KEY_BYTES; letters, digits, `_-~/` and `keep` are not percent-encoded."""
    key = quote_from_bytes(os.fsencode(path), safe="/" + keep).replace(".", "%2E")
    if key.startswith("__"):  # WebDataset skips `__…__/`
        key = "%5F" + key[1:]
    if len(key) <= KEY_BYTES:
        return key
    digest = xxhash.xxh3_64_hexdigest(key.encode())
    return f"{key[: KEY_BYTES - 1 - len(digest)]}~{digest}"


def list_files(root: Path, container: Container) -> list[File]:
    """Lists the files of a container: by name in a folder, in their order in a tar."""
    path = root / os.fsdecode(container.path)
    if path.is_dir():
        return _list_folder(path)
    # The last of several members with the same name counts, as when a tar is unpacked.
    return list({name: (name, offset, size) for name, offset, size in list_tar(path, container.start, container.stop)}.values())


def _list_folder(folder: Path) -> list[File]:
    files, pending = [], [""]
    while pending:
        parent = pending.pop()
        with os.scandir(folder / parent) as entries:
            for entry in entries:
                name = posixpath.join(parent, entry.name)
                if entry.is_dir():
                    pending.append(name)
                elif entry.is_file():
                    files.append((name, 0, entry.stat().st_size))
                else:
                    raise ValueError(f"{escape_name(entry.path)} is neither a file nor a folder; is it a dangling link?")
    return sorted(files)


def list_tar(path: Path, start: int = 0, stop: int | None = None) -> Iterator[File]:
    """Yields the files of a tar, or of the tar at bytes `start` to `stop` of a tar.

    Raises:
        ValueError: the tar is compressed, damaged or truncated, or contains links.
    """
    where = escape_name(str(path)) + (f", the tar at byte {start}" if start else "")
    with open(path, "rb") as file:
        stop = os.fstat(file.fileno()).st_size if stop is None else stop
        file.seek(start)
        magic = file.read(6)
        if tool := next((tool for mark, tool in _COMPRESSED.items() if magic.startswith(mark)), None):
            raise ValueError(f"{where} is compressed, and images are read by their position in a tar; decompress it first, with {tool}")
        file.seek(start)
        try:
            with tarfile.open(fileobj=file, mode="r:", tarinfo=StrictTarInfo, encoding="utf-8", errors="surrogateescape") as tar:
                for member in tar:
                    if member.isreg():
                        yield member.name, member.offset_data, member.size
                    elif not member.isdir():
                        raise ValueError(f"{where}: {escape_name(member.name)} is a link or a device; unpack this tar and pack the folder")
                if tar.offset >= stop:
                    raise tarfile.ReadError("it has no end")
        except tarfile.TarError as error:
            raise ValueError(f"{where}: not a whole tar ({error}); copy it again") from error


def read_entry(root: Path, container: Container, name: str, offset: int, size: int) -> bytes:
    """Reads the bytes of an entry: at `offset` of the container's tar, or of the file `name` in a folder.

    Raises ValueError, which names the file, if the file can't be read or has another size than when it was listed.
    """
    path = root / container.path
    try:
        if offset:
            data = os.pread(_open_tar(path).fileno(), size, offset)
        else:
            path = path / name
            data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{escape_name(str(path))}: can't be read ({error.strerror})") from error
    if len(data) != size:
        raise ValueError(f"{escape_name(str(path))}: it has changed since it was listed ({len(data)} bytes instead of {size})")
    return data


@lru_cache(maxsize=64)
def _open_tar(path: Path) -> BinaryIO:
    return open(path, "rb", buffering=0)
