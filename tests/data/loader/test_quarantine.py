"""Bad images are replaced, nothing else changes, and too many end the job."""

import gc
import io
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data.augment.sampling import Mix
from data.common.hashing import hash_file
from data.common.placement import Placement
from data.dataset.index import Index, open_index, write_index
from data.dataset.shards import Sample, write_dataset
from data.loader.loaders import EvalLoader, TrainLoader
from data.loader.order import SampleOrder, compute_peak_bytes
from data.loader.pipeline import Batch, Loader
from data.loader.quarantine import Quarantine
from data.settings import DataConfig
from data.synthetic.drawings import PATTERNS
from data.synthetic.synthesize import draw_images
from tests.data.loader.test_loaders import has_at_most_threads
from tests.support.damage import damaged_copy
from tests.support.datasets import upload
from tests.support.image_corpus import encode
from tests.support.servers import Proxy

pytestmark = pytest.mark.slow

GLOBAL_BATCH, SAMPLES = 16, 64  # every sample is used in every epoch
STEPS = 2 * SAMPLES // GLOBAL_BATCH
PNGS, WEBPS = (7, 27), (33,)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Index:
    """64 drawn images in shards of about 10, a few of them PNG and WebP; not to be changed."""
    folder = tmp_path_factory.mktemp("quarantine") / "train"
    folder.mkdir()
    samples = []
    for number, (encoded, label) in enumerate(draw_images(10, SAMPLES, 1, 0)):
        extension = "png" if number in PNGS else "webp" if number in WEBPS else "jpg"
        if extension != "jpg":
            picture = Image.open(io.BytesIO(encoded)).convert("RGB")
            encoded = encode(picture, {"png": "PNG", "webp": "WEBP"}[extension])
        samples.append(Sample(f"{number:09d}", encoded, label, extension))
    index = write_dataset(folder, samples, list(PATTERNS), shard_bytes=100_000, name="train")
    assert len(index.shards) >= 5
    return index


@pytest.fixture(scope="module")
def order(clean: Index) -> SampleOrder:
    return SampleOrder(clean.shard_start, seed=3, global_batch=GLOBAL_BATCH, lanes=4, window=8)


@pytest.fixture(scope="module")
def undamaged(clean: Index, order: SampleOrder) -> dict[int, Batch]:
    return by_step(train(clean, order))


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.loader.store.FIRST_PAUSE", 0.001)


def loader_of(index: Index, order: SampleOrder, *, ranks: int = 1, rank: int = 0, start: int = 0, **options: Any) -> TrainLoader:
    micro_batch = options.pop("micro_batch", GLOBAL_BATCH // ranks)
    quarantine = options.pop("quarantine", None)
    settings = DataConfig(**({"image_size": 16, "decode_threads": 1, "read_threads": 2, "max_bad": 0.5} | options))
    placement = Placement(CPU, micro_batch, rank, ranks)
    return TrainLoader(index, order, settings, placement, start=start, end=STEPS, quarantine=quarantine)


def train(index: Index, order: SampleOrder, **options: Any) -> Iterator[Batch]:
    with loader_of(index, order, **options) as loader:
        yield from loader


def threads() -> int:
    gc.collect()  # an exception's traceback holds DALI's frames
    return len(os.listdir("/proc/self/task"))


def by_step(batches: Iterator[Batch]) -> dict[int, Batch]:
    """Concatenates the micro-batches of each step."""
    steps: dict[int, list[Batch]] = {}
    for batch in batches:
        steps.setdefault(batch.step, []).append(batch)
    return {step: concatenate(parts) for step, parts in steps.items()}


def concatenate(parts: list[Batch]) -> Batch:
    mixes = [part.mix for part in parts if part.mix is not None]
    return Batch(
        torch.cat([part.images for part in parts]),
        torch.cat([part.labels for part in parts]),
        np.concatenate([part.ids for part in parts]),
        Mix(np.concatenate([mix.box for mix in mixes]), np.concatenate([mix.lam for mix in mixes])),
        parts[0].epoch,
        parts[0].step,
    )


def expected_replacement(index: Index, bad: set[int], sample: int) -> int:
    """Computes the replacement by its definition."""
    shard = index.shard_of(sample)
    while True:
        first, end = index.shard_start[shard : shard + 2].tolist()
        own = list(range(first, end))
        if sample in own:
            own = own[sample - first :] + own[: sample - first]
        for candidate in own:
            if candidate not in bad:
                return candidate
        shard = (shard + 1) % len(index.shards)


def check_batches(found: dict[int, Batch], undamaged: dict[int, Batch], index: Index, bad: set[int]) -> None:
    """Asserts that batches equal the undamaged ones, bit for bit; slots of bad samples have the replacement's image and label."""
    pictures = {(b.epoch, int(i)): image for b in undamaged.values() for i, image in zip(b.ids, b.images, strict=True)}
    assert len(pictures) == 2 * SAMPLES
    for step, batch in found.items():
        slots = undamaged[step].ids.tolist()
        used = [expected_replacement(index, bad, slot) for slot in slots]
        assert batch.ids.tolist() == used
        assert batch.labels.tolist() == index.samples["label"][used].tolist()
        assert batch.mix is not None
        assert (batch.mix.box == undamaged[step].mix.box).all()  # type: ignore[union-attr]
        assert (batch.mix.lam == undamaged[step].mix.lam).all()  # type: ignore[union-attr]
        assert all(torch.equal(image, pictures[batch.epoch, sample]) for image, sample in zip(batch.images, used, strict=True))


def scenario(name: str, index: Index, order: SampleOrder) -> dict[int, str]:
    jpegs = [sample for sample in range(SAMPLES) if sample not in (*PNGS, *WEBPS)]
    first, end = index.shard_start[2:4].tolist()
    if name == "everything":
        return {0: "zeros", 1: "no tables", 2: "no tables", 3: "cut", 7: "cut", 33: "zeros", 40: "another size", 63: "no tables"}
    if name == "several in one batch":
        own = [sample for sample in order.batch(0, 1).tolist() if sample in jpegs]
        return dict(zip(own[:4], ("no tables", "cut", "no tables", "another size"), strict=True))
    if name == "first and last of a shard":
        return {first: "no tables", end - 1: "cut"}
    return {sample: "no tables" if sample in jpegs else "zeros" for sample in range(first, end)}  # a whole shard


SCENARIOS = ["everything", "several in one batch", "first and last of a shard", "whole shard"]


@pytest.mark.parametrize("name", SCENARIOS)
def test_bad_images_are_replaced_and_nothing_else_changes(
    clean: Index, order: SampleOrder, undamaged: dict[int, Batch], tmp_path: Path, name: str
) -> None:
    damage = scenario(name, clean, order)
    index = damaged_copy(clean, tmp_path / "copy", damage)
    before = threads()
    with loader_of(index, order) as loader:
        check_batches(by_step(iter(loader)), undamaged, index, set(damage))
    assert has_at_most_threads(before)
    assert {bad.sample for bad in loader.quarantine.take_unreported()} == set(damage)


def test_ranks_use_the_same_replacements(clean: Index, order: SampleOrder, undamaged: dict[int, Batch], tmp_path: Path) -> None:
    """Each rank finds the bad samples by itself."""
    damage = scenario("everything", clean, order)
    index = damaged_copy(clean, tmp_path / "copy", damage)
    loaders = [train(index, order, ranks=4, rank=rank) for rank in range(4)]
    check_batches({step: concatenate([next(loader) for loader in loaders]) for step in range(STEPS)}, undamaged, index, set(damage))
    assert all(next(loader, None) is None for loader in loaders)


def test_resumed_run_uses_the_same_replacements(clean: Index, order: SampleOrder, undamaged: dict[int, Batch], tmp_path: Path) -> None:
    """With and without the file of bad samples."""
    damage = scenario("everything", clean, order)
    index = damaged_copy(clean, tmp_path / "copy", damage)
    known = Quarantine(index, 0.5, tmp_path / "quarantine.jsonl")
    for sample in damage:
        known.add(sample, "found before")
    known.record(known.merge(known.take_unreported()), step=4)
    for file in (None, tmp_path / "quarantine.jsonl"):
        quarantine = Quarantine(index, 0.5, file)
        check_batches(by_step(train(index, order, start=4, quarantine=quarantine)), undamaged, index, set(damage))
        assert (quarantine.unreported_count > 0) == (file is None)


def test_job_ends_without_the_removal_of_bad_images(
    clean: Index, order: SampleOrder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Control of the tests above."""
    index = damaged_copy(clean, tmp_path / "copy", {20: "no tables"})

    def give_up(self: Loader, error: RuntimeError) -> None:
        raise error

    monkeypatch.setattr(Loader, "_remove_bad", give_up)
    with pytest.raises(RuntimeError, match="Failed to decode"):
        list(train(index, order))


def test_dali_failure_without_a_bad_image_is_an_error(clean: Index, order: SampleOrder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The crops of whole batches lie outside of their images, those of single images do not."""
    parameters = TrainLoader._compute_parameters

    def broken(self: TrainLoader, epoch: int, ids: np.ndarray, copies: np.ndarray) -> Any:
        (start, *others), erased = parameters(self, epoch, ids, copies)
        return (start + (100_000 if len(ids) > 1 else 0), *others), erased

    monkeypatch.setattr(TrainLoader, "_compute_parameters", broken)
    before = threads()
    with pytest.raises(ValueError, match=r"DALI failed on samples \d+ to \d+, each of which it can decode alone: "):
        list(train(clean, order))
    assert has_at_most_threads(before)


# ---------------------------------------------------------------- reading


def test_shard_cut_while_training_is_replaced_from_the_cut_on(
    clean: Index, order: SampleOrder, undamaged: dict[int, Batch], tmp_path: Path
) -> None:
    index = damaged_copy(clean, tmp_path / "copy", {})
    shard = 3
    first, end = index.shard_start[shard : shard + 2].tolist()
    middle = (first + end) // 2
    bad = set(range(middle, end))
    found = []
    with loader_of(index, order, micro_batch=2, read_threads=1) as loader:  # reads no step ahead
        for batch in loader:
            found.append(batch)
            if len(found) == 1:
                os.truncate(index.folder / index.shards[shard].name, int(index.samples["offset"][middle]) + 10)
    steps = by_step(iter(found))
    assert list(steps) == list(range(STEPS))
    check_batches({step: batch for step, batch in steps.items() if batch.epoch == 1}, undamaged, index, bad)
    entries = loader.quarantine.take_unreported()
    assert {entry.sample for entry in entries} == bad
    assert all("the shard ends early" in entry.reason for entry in entries)


def test_bad_shard_at_a_url_is_replaced(s3: Proxy, clean: Index, tmp_path: Path) -> None:
    """The replacements lie in a shard for which the smallest cache that works may have no room."""
    order = SampleOrder(clean.shard_start, seed=3, global_batch=GLOBAL_BATCH, lanes=1, window=6)
    damage = scenario("whole shard", clean, order)
    local = damaged_copy(clean, tmp_path / "copy", damage)
    as_packed = [replace(shard, xxh3_128=hash_file(local.folder / shard.name)) for shard in local.shards]
    write_index(local.folder, as_packed, [np.array(local.samples)], local.classes)
    upload(local.folder, "s3://bucket/damaged")
    index = open_index("s3://bucket/damaged", str(tmp_path / "cache"))
    at_once = compute_peak_bytes(order, index.shard_bytes, 1, 0, STEPS)
    assert at_once < index.shard_bytes.sum()
    with loader_of(index, order, cache_gb=at_once / 1e9) as loader:
        check_batches(by_step(iter(loader)), by_step(train(clean, order)), index, set(damage))


# ---------------------------------------------------------------- evaluation


def evaluate(index: Index, *, rank: int = 0, ranks: int = 1, micro_batch: int = 7, passes: int = 1) -> list[list[Batch]]:
    settings = DataConfig(image_size=16, decode_threads=1, max_bad=0.9)
    with EvalLoader(index, settings, Placement(CPU, micro_batch, rank, ranks)) as loader:
        return [list(loader) for _ in range(passes)]


@pytest.mark.parametrize(("name", "ranks"), [("everything", 1), ("whole shard", 3)])
def test_evaluation_skips_bad_images(clean: Index, order: SampleOrder, tmp_path: Path, ranks: int, name: str) -> None:
    damage = scenario(name, clean, order)
    index = damaged_copy(clean, tmp_path / "copy", damage)
    (expected,) = evaluate(clean)
    pictures = {int(i): image for batch in expected for i, image in zip(batch.ids, batch.images, strict=True)}
    seen = []
    for rank in range(ranks):
        for batches in evaluate(index, rank=rank, ranks=ranks, passes=2):
            assert all(len(batch.ids) == len(batch.images) == len(batch.labels) > 0 for batch in batches)
            for batch in batches:
                assert batch.labels.tolist() == index.samples["label"][batch.ids].tolist()
                assert all(torch.equal(image, pictures[int(i)]) for i, image in zip(batch.ids, batch.images, strict=True))
            ids = [int(i) for batch in batches for i in batch.ids]
        seen += ids
    assert sorted(seen) == [sample for sample in range(SAMPLES) if sample not in damage]


def test_batch_without_a_good_image_is_skipped(clean: Index, tmp_path: Path) -> None:
    index = damaged_copy(clean, tmp_path / "copy", {8: "no tables", 9: "no tables", 10: "zeros", 11: "cut"})
    (batches,) = evaluate(index, micro_batch=4)
    assert [batch.step for batch in batches] == [step for step in range(SAMPLES // 4) if step != 2]


# ---------------------------------------------------------------- the limit and the file


def test_too_many_bad_images_end_the_job(clean: Index, order: SampleOrder, tmp_path: Path) -> None:
    damage = dict.fromkeys((4, 5, 30, 44), "no tables")
    index = damaged_copy(clean, tmp_path / "copy", damage)
    assert len(list(train(index, order, max_bad=4 / SAMPLES))) == STEPS
    before = threads()
    with pytest.raises(ValueError, match=rf"{index.place}: 4 of 64 images can't be used, and data\.max_bad=0\.046875 allows 3\.") as caught:
        list(train(index, order, max_bad=3 / SAMPLES))
    assert str(caught.value).count("DALI can't decode it") == 4
    assert "python -m data verify --deep" in str(caught.value)
    del caught
    assert has_at_most_threads(before)


def test_file_keeps_bad_samples(clean: Index, tmp_path: Path) -> None:
    file = tmp_path / "quarantine.jsonl"
    first = Quarantine(clean, 0.5, file)
    assert not file.exists()
    first.add(63, "its header is damaged")
    first.record(first.merge(first.take_unreported()), step=50)
    val = Quarantine(clean, 0.5, file, replaces=False)
    val.add(3, "DALI can't decode it")
    val.record(val.merge(val.take_unreported()), step=60)
    first.add(int(clean.shard_start[-2]), "cut")  # the replacement
    first.record(first.merge(first.take_unreported()), step=100)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    start = int(clean.shard_start[-2])
    expected = [(50, 63, start), (60, 3, None), (100, start, start + 1)]
    assert [(line["step"], line["sample"], line["replaced_by"]) for line in lines] == expected
    assert lines[0]["key"] == "000000063"
    assert lines[0]["shard"] == clean.shards[-1].name
    assert lines[0]["reason"] == "its header is damaged"
    assert {line["dataset"] for line in lines} == {clean.fingerprint}

    again = Quarantine(clean, 0.5, file)
    assert (again.count, again.unreported_count) == (3, 0)
    assert [again.find_replacement(sample) for sample in (63, start, 0)] == [start + 1, start + 1, 0]
    with pytest.raises(ValueError, match=r"3 of 64 images can't be used, and data\.max_bad=0 allows 0"):
        Quarantine(clean, 0, file)

    file.write_text(file.read_text().replace(clean.fingerprint, "of another dataset"))
    assert Quarantine(clean, 0, file).count == 0
    file.write_text(file.read_text() + '{"time": 17')
    with pytest.raises(ValueError, match=rf"{file}: line 4 can't be read"):
        Quarantine(clean, 0.5, file)


def test_bad_image_of_a_shard_without_idx_has_no_key(clean: Index, tmp_path: Path) -> None:
    index = damaged_copy(clean, tmp_path / "copy", {})
    (index.folder / index.shards[0].name).with_suffix(".idx").unlink()
    quarantine = Quarantine(index, 0.5)
    quarantine.add(0, "bad")
    (bad,) = quarantine.take_unreported()
    assert str(bad) == f"sample 0 (key None, shard {index.shards[0].name}): bad"
