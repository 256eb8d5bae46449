"""Reads class lists and label files: class names in label order, and the class of each image without a class folder."""

import csv
import json
import os
import posixpath
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

_WNID_WITH_WORDS = re.compile(r"(n\d{8})\s")  # `n01440764 tench, Tinca tinca`, or Kaggle's `n03995372 85 1 499 272`


def escape_name(name: str) -> str:
    """Returns a file name as valid UTF-8: other bytes are escaped, such as `\\xe9`."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def read_classes(path: Path) -> tuple[str, ...]:
    """Reads class names in label order from a packed folder, its classes.json, or a text file of names.

    A line of the text file that begins with a WordNet id, such as `n01440764 tench`, names the class n01440764. Raises ValueError for any
    other file, an empty list, and a name that occurs twice.
    """
    file = path / "classes.json" if path.is_dir() else path
    try:
        text = file.read_text(encoding="utf-8")
        names = json.loads(text) if file.suffix == ".json" else [_parse_class(line) for line in text.splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{file}: not a list of classes ({error}); give a packed folder, its classes.json, or one name per line"
        ) from error
    if not (isinstance(names, list) and names and all(isinstance(name, str) for name in names)):
        raise ValueError(f"{file}: expected a list of class names")
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"{file}: class {repeated[0]} occurs {names.count(repeated[0])} times")
    return tuple(names)


def _parse_class(text: str) -> str:
    wnid = _WNID_WITH_WORDS.match(text)
    return wnid[1] if wnid else text.strip()


def read_image_labels(file: Path, names: Sequence[str]) -> list[str]:
    """Reads the class of each image from a file of labels; `names` are the images' sorted file names.

    The file is a CSV of `image,class` lines such as Kaggle's LOC_val_solution.csv, with or without file extensions. Any other file has
    one line per image in the order of `names`: a class, or a class number of ILSVRC2012's development kit, which the kit's meta.mat
    beside the file resolves. Raises ValueError for an unreadable file, an image without a label, and a label without an image.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: can't be read as labels ({error})") from error
    if file.suffix.lower() == ".csv":
        return _parse_csv(file, lines, names)
    classes = [_parse_class(line) for line in lines if line.strip()]
    if len(classes) != len(names):
        raise ValueError(f"{file}: {len(classes)} labels for {len(names)} images, such as {escape_name(names[0])}")
    if all(name.isdecimal() for name in classes):
        numbers = _read_kit_numbers(file)
        return [numbers[int(number)] for number in classes]
    return classes


def _parse_csv(file: Path, lines: Sequence[str], names: Sequence[str]) -> list[str]:
    full_names: dict[str, str] = {}
    for name in names:
        base = posixpath.basename(name)
        full_names |= {name: name, base: name, posixpath.splitext(base)[0]: name}
    classes: dict[str, str] = {}
    for number, row in enumerate(csv.reader(lines)):
        if len(row) < 2 or row[0] not in full_names:
            if number == 0:  # column names
                continue
            raise ValueError(f"{file}, line {number + 1}: {','.join(row)!r} names no image in the source")
        classes[full_names[row[0]]] = _parse_class(row[1])
    if missing := [name for name in names if name not in classes]:
        raise ValueError(f"{file}: no label for {len(missing)} of {len(names)} images, such as {escape_name(missing[0])}")
    return [classes[name] for name in names]


def _read_kit_numbers(file: Path) -> dict[int, str]:
    from scipy.io import loadmat  # a slow import, for one kind of source

    meta = file.parent / "meta.mat"
    if not meta.is_file():
        raise ValueError(
            f"{file}: its numbers are those of the development kit, which do not follow the sorted class names; "
            "put the kit's meta.mat beside it"
        )
    synsets = loadmat(meta, squeeze_me=True)["synsets"]
    return dict(zip(synsets["ILSVRC2012_ID"].astype(int).tolist(), synsets["WNID"].tolist(), strict=True))
