"""The check before a job finds damaged shards."""

from pathlib import Path

import pytest

from data.dataset.check import find_damaged_shards
from data.dataset.index import Index
from tests.support.damage import damaged_copy


def check_all(index: Index, *, checksums: bool) -> list[str]:
    return find_damaged_shards(index, range(len(index.shards)), checksums=checksums, quiet=True)


def overwrite(index: Index, shard: int, place: int, data: bytes) -> None:
    with open(index.folder / index.shards[shard].name, "r+b") as file:
        file.seek(place)
        file.write(data)


def test_packed_dataset_has_no_faults(dataset: Index) -> None:
    assert check_all(dataset, checksums=False) == check_all(dataset, checksums=True) == []


@pytest.mark.parametrize("which", ["first", "last"])
def test_other_file_of_the_same_size_is_found(dataset: Index, tmp_path: Path, which: str) -> None:
    """Other members, or no tar at all: only a header reveals them. Each rank checks its own shards."""
    index = damaged_copy(dataset, tmp_path / "copy", {})
    sample = int(index.shard_start[1]) if which == "first" else int(index.shard_start[2]) - 1
    header = int(index.samples["offset"][sample]) - 512
    name = index.shards[1].name
    whole = (index.folder / name).read_bytes()
    for content in (bytes(len(whole)), whole[: header + 3] + b"?" * (len(whole) - header - 3)):
        (index.folder / name).write_bytes(content)
        (fault,) = check_all(index, checksums=False)
        assert fault.startswith(f"{name} has no image where the index says (")
    (index.folder / name).write_bytes(whole[:512] + whole[:-512])  # a tar of the same members, elsewhere
    assert [name in fault for fault in check_all(index, checksums=False)] == [True]
    assert find_damaged_shards(index, [0, 2, 3], checksums=False, quiet=True) == []
    assert find_damaged_shards(index, [1], checksums=True, quiet=True)[0].startswith(f"{name} has the checksum ")


def test_single_bit_is_found_by_its_checksum_alone(dataset: Index, tmp_path: Path) -> None:
    index = damaged_copy(dataset, tmp_path / "copy", {})
    place = int(index.samples["offset"][30]) + int(index.samples["size"][30]) // 2
    shard = index.shard_of(30)
    byte = (index.folder / index.shards[shard].name).read_bytes()[place]
    overwrite(index, shard, place, bytes([byte ^ 1]))
    assert check_all(index, checksums=False) == []
    (fault,) = check_all(index, checksums=True)
    assert fault.startswith(f"{index.shards[shard].name} has the checksum ")
    assert fault.endswith(f" instead of {index.shards[shard].xxh3_128}")


def test_missing_shard_is_found(dataset: Index, tmp_path: Path) -> None:
    index = damaged_copy(dataset, tmp_path / "copy", {})
    (index.folder / index.shards[2].name).unlink()
    for checksums in (False, True):
        assert check_all(index, checksums=checksums) == [f"{index.shards[2].name} can't be read (No such file or directory)"]
