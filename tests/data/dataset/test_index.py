"""An index opens if its files are complete and belong together."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data.dataset.index import Index, compute_fingerprint, open_index, read_key


@pytest.fixture
def copy(dataset: Index, tmp_path: Path) -> Path:
    return Path(shutil.copytree(dataset.folder, tmp_path / "copy"))


def test_key_comes_from_the_idx_file(dataset: Index) -> None:
    for sample_id in (0, 1, 77, 149):
        assert read_key(dataset, sample_id) == f"{sample_id:09d}"


def test_fingerprint_depends_on_rows_names_and_checksums(dataset: Index) -> None:
    rows = np.array(dataset.samples)
    rows["label"][3] += 1
    first, *others = dataset.shards
    renamed = [replace(first, name="x"), *others]
    changed = [replace(first, xxh3_128="0"), *others]
    found = [
        compute_fingerprint(rows, dataset.shards),
        *(compute_fingerprint(dataset.samples, shards) for shards in (dataset.shards, renamed, changed)),
    ]
    assert len(set(found)) == 4


def test_missing_or_cut_shard_is_named(copy: Path, dataset: Index) -> None:
    os.truncate(copy / dataset.shards[2].name, 1024)
    (copy / dataset.shards[4].name).unlink()
    with pytest.raises(ValueError, match=rf"{dataset.shards[2].name} has 1024 bytes instead of \d+; {dataset.shards[4].name} is missing"):
        open_index(copy)


def test_missing_file_is_named(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        open_index(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"has no dataset\.json"):
        open_index(tmp_path)
    (copy / "index.npy").unlink()
    with pytest.raises(ValueError, match=r"has no index\.npy"):
        open_index(copy)


def test_files_of_different_datasets_are_an_error(copy: Path, dataset: Index) -> None:
    np.save(copy / "index.npy", dataset.samples[:-1])
    with pytest.raises(ValueError, match="149 rows of"):
        open_index(copy)
    (copy / "dataset.json").write_text(json.dumps({"shards": []})[:-3])
    with pytest.raises(ValueError, match="damaged"):
        open_index(copy)
    (copy / "dataset.json").write_text(json.dumps({"format": 1, "shards": []}))
    with pytest.raises(ValueError, match="format 1"):
        open_index(copy)
