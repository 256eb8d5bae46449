"""Where images come from: a source is recognised by what lies there, listed as plain arrays, and read by position.

    source = recognise(Path("fall11_whole.tar"))
    for part in map(source.lister(), source.containers):      # in any process; a part is the list of one container
        …
    encoded = read(source.root, container, name, offset, size)

| kind              | what lies in SOURCE                                                                                     |
|-------------------|---------------------------------------------------------------------------------------------------------|
| class folders     | CLASS/…/IMAGE, at any depth below CLASS                                                                 |
| class tars        | CLASS.tar …, or SOURCE is one tar of such tars (fall11_whole.tar, ILSVRC2012_img_train.tar)               |
| labelled images   | images without classes, in a folder or in one tar, with a file of labels (ILSVRC2012_img_val.tar)         |
| WebDataset shards | tars of KEY.jpg (jpeg, png, webp) with KEY.cls, or KEY.json with a field "label"; or SOURCE is one of them |

Labels of shards are class names, or numbers: positions in a classes.json beside them, or in the classes that are given.

A tar is never unpacked: an entry is a range of bytes in a file, also where it lies in a tar within a tar. Every file of a
container is an entry, whatever its name says; what is an image is seen when it is decoded.

An entry's key is CLASS/PATH, with PATH below the class and without extension, percent-encoded so that it has neither dots nor
blanks and is ASCII. Files of a class that differ in their extension alone keep it (`cat%2Ejpg`, `cat%2Epng`). A key of more than
95 bytes, which would need tar's extended headers, is cut to 78 bytes, `~` and a hash. WebDataset samples keep their own key; where
keys repeat between shards, all get their shard's name in front.
"""

import csv
import itertools
import json
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

# One file of a source. `label` is a position in its part's labels; `text` is where key and name, one after the other, begin in the
# part's text, in bytes; `hash` is the key's 64-bit xxhash. A plain file has offset 0, as no file within a tar has.
ENTRY = np.dtype(
    [
        ("container", "<u4"), ("label", "<u4"), ("offset", "<u8"), ("size", "<u8"), ("hash", "<u8"),
        ("text", "<u8"), ("key_bytes", "u1"), ("name_bytes", "<u2"),
    ]
)  # fmt: skip
KEY_BYTES = 95  # a plain tar header has 100 for KEY.jpeg

_COMPRESSED = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}
_COMPRESSED_NAME = re.compile(r".*\.(tgz|tar\.(gz|bz2|xz|zst))", re.IGNORECASE)
_WNID_WITH_WORDS = re.compile(r"(n\d{8})\s")  # `n01440764 tench, Tinca tinca`, or Kaggle's `n03995372 85 1 499 272`
_SPLITS = {"train", "val", "valid", "validation", "test"}


@dataclass(frozen=True)
class Container:
    """A folder or tar that is listed as one: its path below the source's root; for a tar within that tar, its name and the range
    of its bytes. Names hold undecodable bytes as Python's file functions do (surrogates)."""

    path: str
    class_name: str = ""
    inner: str = ""
    start: int = 0
    stop: int | None = None


@dataclass(frozen=True, eq=False)
class Part:
    """The files of one container: rows of ENTRY, keys and names, and the labels that occur (a class name, a number that stands for
    one, or None). `faults` says, by row, why a sample of a shard can't be used whatever its image."""

    rows: np.ndarray
    text: bytes
    labels: list[str | int | None]
    faults: dict[int, str]


@dataclass(frozen=True)
class Source:
    """`classes` is None where only the listing tells them."""

    kind: str
    root: Path
    containers: tuple[Container, ...]
    classes: tuple[str, ...] | None
    labels: Path | None = None

    def lister(self, *, shard_in_key: bool = False) -> Callable[[Container], Part]:
        """What lists a container; it can be sent to other processes."""
        if self.labels:
            return partial(_list_labelled, self.root, self.labels)
        if self.kind == "WebDataset shards":
            return partial(_list_shard, self.root, shard_in_key)
        return partial(_list_class, self.root)


def recognise(path: Path, labels: Path | None = None) -> Source:
    """What lies in `path`, a folder or a tar; `labels` names the classes of images that lie there without.

    Raises ValueError, saying what was looked for, for what is none of the kinds above.
    """
    if path.is_dir():
        return _recognise_folder(path, labels)
    if not path.is_file():
        raise ValueError(f"{path}: no such file or folder")
    root, whole = path.parent, Container(path.name)
    if labels:
        return Source("labelled images", root, (whole,), None, labels)
    first = _first_names(path)
    if _are_samples(first):
        return _shards(root, [whole])
    if any(name.endswith(".tar") for name in first):
        inner = [(name, offset, size) for name, offset, size in tar_files(path) if name.endswith(".tar")]
        return _class_tars(root, [Container(path.name, _stem(name), name, offset, offset + size) for name, offset, size in inner])
    raise ValueError(f"{path}: it begins with {', '.join(first[:3])}; {_expected()}")


def _recognise_folder(path: Path, labels: Path | None) -> Source:
    with os.scandir(path) as found:
        entries = sorted((entry for entry in found if not entry.name.startswith(".")), key=lambda entry: entry.name)
    if labels:
        return Source("labelled images", path, (Container(""),), None, labels)
    folders = [entry.name for entry in entries if entry.is_dir()]
    tars = [entry.name for entry in entries if entry.name.endswith(".tar")]
    if compressed := [entry.name for entry in entries if _COMPRESSED_NAME.fullmatch(entry.name)]:
        raise ValueError(f"{path / compressed[0]} is compressed, and images are read by their position in a tar; decompress it first")
    if folders and tars:
        raise ValueError(f"{path}: {len(folders)} folders and {len(tars)} tars, so it is not clear what a class is; {_expected()}")
    if tars:
        first = _first_names(path / tars[0])
        if _are_samples(first):
            return _shards(path, [Container(name) for name in tars])
        if any(name.endswith(".tar") for name in first):
            raise ValueError(f"{path / tars[0]} is a tar of tars; give it as SOURCE")
        return _class_tars(path, [Container(name, _stem(name)) for name in tars])
    if folders and set(folders) <= _SPLITS:
        raise ValueError(f"{path}: {' and '.join(folders)} look like splits of a dataset, not classes; pack {path / folders[0]}")
    if folders:
        return Source("class folders", path, tuple(Container(name, name) for name in folders), tuple(sorted(map(shown, folders))))
    raise ValueError(f"{path}: no class folders and no tars in it; {_expected()}")


def _shards(root: Path, containers: list[Container]) -> Source:
    classes = read_classes(root) if (root / "classes.json").is_file() else None
    return Source("WebDataset shards", root, tuple(containers), classes)


def _class_tars(root: Path, containers: list[Container]) -> Source:
    counts = Counter(container.class_name for container in containers)
    if repeated := [name for name, count in counts.items() if count > 1]:
        raise ValueError(f"{root / containers[0].path}: several tars of the class {repeated[0]}")
    containers.sort(key=lambda container: container.class_name)
    return Source("class tars", root, tuple(containers), tuple(sorted(map(shown, counts))))


def _expected() -> str:
    return (
        "a source is a folder of class folders, a folder of one tar a class, one tar of such tars, WebDataset shards (KEY.jpg with "
        "KEY.cls or KEY.json), or images in a folder or tar with their labels in a file (--labels)"
    )


def _first_names(path: Path) -> list[str]:
    return [name for name, _, _ in itertools.islice(tar_files(path), 20)]


def _are_samples(names: Sequence[str]) -> bool:
    return any(name.endswith((".cls", ".json")) for name in names)


def _stem(name: str) -> str:
    return posixpath.basename(name).removesuffix(".tar")


def shown(name: str) -> str:
    """A name for people and for UTF-8 files: bytes that are not UTF-8 become `\\xe9`."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def read_classes(path: Path) -> tuple[str, ...]:
    """A list of classes in label order: a packed dataset's folder or classes.json, or a text file with a name a line (of which
    only the wnid counts if the line begins with one).

    Raises ValueError for what is none of these and for a name that occurs twice.
    """
    file = path / "classes.json" if path.is_dir() else path
    try:
        text = file.read_text(encoding="utf-8")
        names = json.loads(text) if file.suffix == ".json" else [_class_name(line) for line in text.splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: no list of classes ({error}); expected a packed folder, its classes.json, or a name a line") from error
    if not (isinstance(names, list) and names and all(isinstance(name, str) for name in names)):
        raise ValueError(f"{file}: expected a list of class names")
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"{file}: class {repeated[0]} occurs {names.count(repeated[0])} times")
    return tuple(names)


def _class_name(text: str) -> str:
    wnid = _WNID_WITH_WORDS.match(text)
    return wnid[1] if wnid else text.strip()


def _list_class(root: Path, container: Container) -> Part:
    files = list_files(root, container)
    inside = [posixpath.normpath(name).removeprefix(container.class_name + "/") for name, _, _ in files]
    keys = [encoded_key(f"{container.class_name}/{path}") for path in _without_extensions(inside)]
    return part_of(container, files, keys, [shown(container.class_name)] * len(files))


def _without_extensions(names: Sequence[str]) -> list[str]:
    """The names without their extension, but where two would be the same or one the name of another, with it."""
    stems = [posixpath.splitext(name)[0] for name in names]
    counts, taken = Counter(stems), set(names)
    return [name if counts[stem] > 1 or stem in taken else stem for name, stem in zip(names, stems, strict=True)]


def _list_labelled(root: Path, labels: Path, container: Container) -> Part:
    files = sorted(list_files(root, container))
    names = [name for name, _, _ in files]
    classes = image_labels(labels, names)
    stems = _without_extensions([posixpath.normpath(name) for name in names])
    return part_of(container, files, [encoded_key(f"{of}/{stem}") for of, stem in zip(classes, stems, strict=True)], classes)


def image_labels(file: Path, names: Sequence[str]) -> list[str]:
    """The class of each image, whose names are given in sorted order, from a file of labels:

    a CSV of `image,class` lines, the image by its file name with or without extension, such as Kaggle's LOC_val_solution.csv;
    or a line for each image in the order of the names, with its class or, as in the development kit of ILSVRC2012, the number
    that the kit's meta.mat, beside the file, gives to its class.

    Raises ValueError for an image without a label and a label without an image.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: can't be read as labels ({error})") from error
    if file.suffix.lower() == ".csv":
        return _csv_labels(file, lines, names)
    classes = [_class_name(line) for line in lines if line.strip()]
    if len(classes) != len(names):
        raise ValueError(f"{file}: {len(classes)} labels for {len(names)} images, such as {shown(names[0])}")
    if all(name.isdecimal() for name in classes):
        numbers = _numbers_of_the_kit(file)
        return [numbers[int(number)] for number in classes]
    return classes


def _csv_labels(file: Path, lines: Sequence[str], names: Sequence[str]) -> list[str]:
    known: dict[str, str] = {}
    for name in names:
        base = posixpath.basename(name)
        known |= {name: name, base: name, posixpath.splitext(base)[0]: name}
    found: dict[str, str] = {}
    for number, row in enumerate(csv.reader(lines)):
        if len(row) < 2 or row[0] not in known:
            if number == 0:  # the names of the columns
                continue
            raise ValueError(f"{file}, line {number + 1}: {','.join(row)!r} speaks of no image in the source")
        found[known[row[0]]] = _class_name(row[1])
    if missing := [name for name in names if name not in found]:
        raise ValueError(f"{file}: no label for {len(missing)} of {len(names)} images, such as {shown(missing[0])}")
    return [found[name] for name in names]


def _numbers_of_the_kit(file: Path) -> dict[int, str]:
    from scipy.io import loadmat  # takes tenths of a second, for one kind of source

    meta = file.parent / "meta.mat"
    if not meta.is_file():
        raise ValueError(f"{file}: its numbers are those of the development kit, which are not in the order of the classes' names; put "
                         f"the kit's meta.mat beside it")  # fmt: skip
    synsets = loadmat(meta, squeeze_me=True)["synsets"]
    return dict(zip(synsets["ILSVRC2012_ID"].astype(int).tolist(), synsets["WNID"].tolist(), strict=True))


def _list_shard(root: Path, shard_in_key: bool, container: Container) -> Part:
    path = root / container.path
    files: list[tuple[str, int, int]] = []
    keys: list[str] = []
    labels: list[str | int | None] = []
    faults: dict[int, str] = {}
    try:
        with open(path, "rb") as shard:
            for sample in read_samples(shard, data=False):
                image, label = sample[0], None
                try:
                    image = find_image(sample)
                    label = _label(shard, sample)
                except ValueError as error:
                    faults[len(files)] = str(error)
                keys.append(encoded_key(f"{_stem(container.path)}/{image.key}" if shard_in_key else image.key, keep="%"))
                files.append((f"{image.key}.{image.extension}", image.offset, image.size))
                labels.append(label)
    except tarfile.TarError as error:
        raise ValueError(f"{path}: not a whole tar ({error})") from error
    if faults and len(faults) == len(files):
        raise ValueError(f"{path}: none of its {len(files)} samples can be used; of {shown(keys[0])}: {faults[0]}")
    return part_of(container, files, keys, labels, faults)


def _label(shard: BinaryIO, sample: list[Member]) -> str | int:
    """The number or class name of a sample. Raises ValueError where there is none."""
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


def part_of(
    container: Container,
    files: Sequence[tuple[str, int, int]],
    keys: Sequence[str],
    labels: Sequence[str | int | None],
    faults: dict[int, str] | None = None,
) -> Part:
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
    return Part(rows, b"".join(key.encode() + name for key, name in zip(keys, names, strict=True)), list(codes), faults or {})


def encoded_key(path: str, *, keep: str = "") -> str:
    """A path as a sample's key: percent-encoded but for letters, digits, `_-~/` and what is in `keep`, at most KEY_BYTES long."""
    key = quote_from_bytes(os.fsencode(path), safe="/" + keep).replace(".", "%2E")
    if key.startswith("__"):  # WebDataset passes over `__…__/`
        key = "%5F" + key[1:]
    if len(key) <= KEY_BYTES:
        return key
    digest = xxhash.xxh3_64_hexdigest(key.encode())
    return f"{key[: KEY_BYTES - 1 - len(digest)]}~{digest}"


def list_files(root: Path, container: Container) -> list[tuple[str, int, int]]:
    """(name, offset, size in bytes) of each file of a container, in the order of the names in a folder and as they lie in a tar."""
    path = root / os.fsdecode(container.path)
    if path.is_dir():
        return folder_files(path)
    return list({name: (name, offset, size) for name, offset, size in tar_files(path, container.start, container.stop)}.values())


def folder_files(folder: Path) -> list[tuple[str, int, int]]:
    """(name, 0, size in bytes) of each file below a folder, by name."""
    found, pending = [], [""]
    while pending:
        inside = pending.pop()
        with os.scandir(folder / inside) as entries:
            for entry in entries:
                name = posixpath.join(inside, entry.name)
                if entry.is_dir():
                    pending.append(name)
                elif entry.is_file():
                    found.append((name, 0, entry.stat().st_size))
                else:
                    raise ValueError(f"{shown(entry.path)} is neither a file nor a folder; a link to something that is gone?")
    return sorted(found)


def tar_files(path: Path, start: int = 0, stop: int | None = None) -> Iterator[tuple[str, int, int]]:
    """(name, offset in `path`, size in bytes) of each file in a tar, which may itself be bytes `start` to `stop` of a tar.

    Raises ValueError for a tar that is compressed, damaged or cut short, and for links in it.
    """
    where = shown(str(path)) + (f", the tar at byte {start}" if start else "")
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
                        raise ValueError(f"{where}: {shown(member.name)} is a link or a device; unpack this tar and pack the folder")
                if tar.offset >= stop:
                    raise tarfile.ReadError("it has no end")
        except tarfile.TarError as error:
            raise ValueError(f"{where}: not a whole tar ({error}); copy it again") from error


def read(root: Path, container: Container, name: str, offset: int, size: int) -> bytes:
    """The bytes of an entry. Raises ValueError, naming the file, where they can't be read or are not what was listed."""
    path = root / container.path
    try:
        if offset:
            data = os.pread(_open_tar(path).fileno(), size, offset)
        else:
            path = path / name
            data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{shown(str(path))}: can't be read ({error.strerror})") from error
    if len(data) != size:
        raise ValueError(f"{shown(str(path))}: it has changed since it was listed ({len(data)} bytes instead of {size})")
    return data


@lru_cache(maxsize=64)
def _open_tar(path: Path) -> BinaryIO:
    return open(path, "rb", buffering=0)
