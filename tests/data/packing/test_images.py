"""Conversion of image files: results, rejections, and that DALI decodes everything stored."""

import io
import re
import subprocess
import sys
import zlib
from collections.abc import Sequence

import numpy as np
import pytest
from nvidia.dali import fn
from nvidia.dali.pipeline import Pipeline
from nvidia.dali.types import DALIDataType, DALIImageType
from PIL import Image

from data.dataset.headers import BadImage
from data.packing import images
from data.packing.images import DALI_PIXELS, ImageRules, StoredImage, convert_image
from tests.support.image_corpus import (
    Case,
    damage_files,
    draw_gradient,
    encode,
    insert_into_header,
    load_corpus,
    make_exif,
    make_png,
    make_segment,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*EXIF:UserWarning")  # Pillow warns where a test opens a damaged file

DEFAULT = ImageRules()
KEEP = ImageRules(keep_original=True)
USABLE = [case for case in load_corpus() if case.bad is None]
BAD = [case for case in load_corpus() if case.bad is not None]
ADDRESS = re.compile("at 0x")  # an address would make a reason differ from run to run


def name_case(case: Case) -> str:
    return case.name


def decode(encoded: bytes) -> np.ndarray:
    """Decodes with Pillow, uint8 (H, W, 3)."""
    with Image.open(io.BytesIO(encoded)) as image:
        return np.asarray(image.convert("RGB"))


def compute_distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(int) - b).mean())


def decode_in_pipeline(
    stored: Sequence[StoredImage], crops: Sequence[tuple[int, int, int, int]]
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Decodes whole images and crops (top, left, height, width) in a DALI pipeline, as in training; raises if DALI can't."""
    pipeline = Pipeline(batch_size=len(stored), num_threads=2, device_id=None, exec_dynamic=True, prefetch_queue_depth=1)
    encoded = [np.frombuffer(image.encoded, np.uint8) for image in stored]
    starts, shapes = [np.array(crop[:2], np.int32) for crop in crops], [np.array(crop[2:], np.int32) for crop in crops]
    options = {"device": "cpu", "output_type": DALIImageType.RGB, "adjust_orientation": False}
    with pipeline:
        dtypes = [DALIDataType.UINT8, DALIDataType.INT32, DALIDataType.INT32]
        source, start, shape = fn.external_source(lambda: (encoded, starts, shapes), num_outputs=3, batch=True, dtype=dtypes)
        whole = fn.decoders.image(source, **options)
        part = fn.decoders.image_slice(source, start=start, shape=shape, axis_names="HW", **options)
        pipeline.set_outputs(whole, part)
    pipeline.build()
    whole, part = pipeline.run()
    return [np.array(whole.at(n)) for n in range(len(stored))], [np.array(part.at(n)) for n in range(len(stored))]


def check_with_dali(stored: Sequence[StoredImage], seed: int) -> None:
    chance = np.random.default_rng(seed)
    crops = []
    for image in stored:
        top, left = int(chance.integers(image.height)), int(chance.integers(image.width))
        crops.append((top, left, int(chance.integers(1, image.height - top + 1)), int(chance.integers(1, image.width - left + 1))))
    for image, crop, whole, part in zip(stored, crops, *decode_in_pipeline(stored, crops), strict=True):
        assert whole.shape == (image.height, image.width, 3)
        assert part.shape == (*crop[2:], 3)


@pytest.mark.parametrize("case", USABLE, ids=name_case)
def test_usable_images_become_baseline_jpegs(case: Case) -> None:
    stored = convert_image(case.encoded, DEFAULT)
    assert stored.change == case.change
    assert stored.extension == "jpg"
    if case.change is None:
        assert stored.encoded is case.encoded
    else:
        with Image.open(io.BytesIO(stored.encoded)) as image:
            assert (image.format, image.info.get("progressive")) == ("JPEG", None)
            assert image.mode in ("RGB", "L")
            assert not image.getexif()
        assert b"\xff\xc0" in stored.encoded, "baseline"
    pixels = decode(stored.encoded)
    assert pixels.shape == (stored.height, stored.width, 3)
    if case.pixels is not None:
        assert pixels.shape == case.pixels.shape
        assert compute_distance(pixels, case.pixels) < 4
    again = convert_image(bytes(bytearray(case.encoded)), DEFAULT)
    assert again.encoded == stored.encoded
    assert (again.histogram == stored.histogram).all()


def test_corpus_reveals_wrong_pixels() -> None:
    """Control: a wrong rotation, clipping or a dropped alpha differs by more than the tolerance above."""
    expected = {case.name: case.pixels for case in USABLE}
    files = {case.name: case.encoded for case in USABLE}
    for orientation in range(2, 9):
        pixels = expected[f"orientation {orientation}.jpg"]
        others = [draw_gradient(), *(expected[f"orientation {other}.jpg"] for other in range(2, 9) if other != orientation)]
        assert min(compute_distance(pixels, other) for other in others if other.shape == pixels.shape) > 20
    for name in ("16 bits.png", "16 bits.tif", "alpha.png", "gray alpha.png", "alpha.webp"):
        assert compute_distance(expected[name], decode(files[name])) > 20, "Pillow's convert() clips 16 bits and drops alpha"
    assert compute_distance(expected["cmyk.jpg"], 255 - expected["cmyk.jpg"]) > 20


@pytest.mark.parametrize("case", BAD, ids=name_case)
def test_bad_images_are_rejected_with_a_reason(case: Case) -> None:
    for rules in (DEFAULT, KEEP, ImageRules(max_side=30)):
        if case.name == "long.png" and rules.max_side:
            continue
        with pytest.raises(BadImage, match=case.bad) as error:
            convert_image(case.encoded, rules)
        assert str(error.value)
        assert not ADDRESS.search(str(error.value))


@pytest.mark.parametrize("case", USABLE, ids=name_case)
def test_keep_original_keeps_files_that_dali_reads(case: Case) -> None:
    stored = convert_image(case.encoded, KEEP)
    if case.is_kept:
        assert stored.encoded is case.encoded
        assert stored.change is None
        with Image.open(io.BytesIO(case.encoded)) as image:
            assert stored.extension == {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}[str(image.format)]
            assert (stored.width, stored.height) == image.size, "EXIF orientation is not applied"
    else:
        assert stored.extension == "jpg"
        assert stored.encoded == convert_image(case.encoded, DEFAULT).encoded
    small = convert_image(case.encoded, ImageRules(keep_original=True, max_side=8))
    assert (small.change or "").endswith("resized") == (max(stored.width, stored.height) > 8)


def test_every_truncated_jpeg_is_rejected() -> None:
    whole = encode(draw_gradient())
    for length in range(len(whole)):
        with pytest.raises(BadImage):
            convert_image(whole[:length], DEFAULT)
    assert convert_image(whole, DEFAULT).change is None


def test_pillow_accepts_damage_that_is_rejected() -> None:
    """Control: Pillow silently decodes a JPEG with a hole in its data, and a PNG with a wrong checksum."""
    files = {case.name: case.encoded for case in BAD}
    assert compute_distance(decode(files["zeros within.jpg"]), draw_gradient()) > 3
    assert decode(files["wrong checksum.png"]).shape == draw_gradient().shape


def convert_damaged(count: int, seed: int, rules: ImageRules) -> tuple[list[StoredImage], dict[bytes, str]]:
    """Converts damaged files; returns the stored images, and the reasons of the rejected files."""
    stored, rejected = [], {}
    for encoded in damage_files(count, seed):
        try:
            stored.append(convert_image(encoded, rules))
        except BadImage as error:
            rejected[encoded] = str(error)
    return stored, rejected


@pytest.mark.parametrize("rules", [DEFAULT, KEEP], ids=["default", "keep_original"])
def test_dali_decodes_everything_stored(rules: ImageRules) -> None:
    stored, rejected = convert_damaged(1500, 1, rules)
    assert len(stored) > 200
    assert len(rejected) > 500
    assert all(reason and not ADDRESS.search(reason) for reason in rejected.values())
    stored += [convert_image(case.encoded, rules) for case in USABLE]
    check_with_dali(stored, seed=2)


def test_histogram_counts_the_pixels_that_dali_decodes() -> None:
    stored = convert_image(encode(draw_gradient(60, 45)), DEFAULT)
    ((pixels,), _) = decode_in_pipeline([stored], [(0, 0, 1, 1)])
    expected = np.stack([np.bincount(pixels[::5, :, channel].ravel(), minlength=256) for channel in range(3)])
    np.testing.assert_array_equal(stored.histogram, expected)
    assert stored.histogram.dtype == np.int64
    gray = convert_image(encode(draw_gradient(60, 45)[:, :, 0]), DEFAULT).histogram
    assert gray.shape == (3, 256)
    assert (gray[0] == gray[2]).all()
    assert gray[0].sum() == 60 * 9


def test_progressive_jpegs_keep_their_quantization() -> None:
    chance = np.random.default_rng(0)
    rough = np.clip(draw_gradient(160, 120) + chance.normal(0, 20, (120, 160, 3)), 0, 255).astype(np.uint8)
    source = encode(rough, quality=75, progressive=True)
    stored = convert_image(source, DEFAULT)

    def compute_noise(pixels: np.ndarray) -> float:
        return float(np.sqrt(np.mean((pixels.astype(float) - decode(source)) ** 2)))

    assert compute_noise(decode(stored.encoded)) < 0.25 * compute_noise(rough)
    assert len(stored.encoded) < 1.3 * len(source)
    with Image.open(io.BytesIO(source)) as before, Image.open(io.BytesIO(stored.encoded)) as after:
        assert before.quantization[0] == after.quantization[0]
        assert before.layer[0][1:3] == after.layer[0][1:3]


@pytest.mark.parametrize(
    ("rules", "size", "expected"),
    [
        (ImageRules(max_side=40), (100, 50), (40, 20)),
        (ImageRules(resize_short=32), (333, 97), (110, 32)),
        (ImageRules(resize_short=60, max_side=200), (100, 50), (100, 50)),
        (ImageRules(resize_short=32, max_side=48), (100, 50), (48, 24)),
        (ImageRules(max_side=10), (900, 3), (10, 1)),
    ],
)
def test_resizing_shrinks_in_proportion(rules: ImageRules, size: tuple[int, int], expected: tuple[int, int]) -> None:
    source = encode(draw_gradient(*size))
    stored = convert_image(source, rules)
    assert (stored.width, stored.height) == expected
    assert decode(stored.encoded).shape == (expected[1], expected[0], 3)
    if expected == size:
        assert stored.encoded is source
    else:
        assert stored.change == "resized"
        if min(expected) > 10:
            assert compute_distance(decode(stored.encoded), draw_gradient(*expected)) < 4


def test_resized_images_are_rotated_too() -> None:
    source = encode(draw_gradient(100, 50), exif=make_exif(6))
    stored = convert_image(source, ImageRules(max_side=40))
    assert (stored.width, stored.height, stored.change) == (20, 40, "rotated+resized")
    assert compute_distance(decode(stored.encoded), np.rot90(draw_gradient(40, 20), -1)) < 4
    assert convert_image(source, ImageRules(max_side=40, keep_original=True)).encoded == stored.encoded


def test_resizing_does_not_alias() -> None:
    """Lines too fine for the small image become an even gray; picking single pixels would show false lines."""
    lines = np.broadcast_to(np.where(np.arange(600) % 3 == 0, 255, 0)[None, :, None], (400, 600, 3)).astype(np.uint8)
    small = decode(convert_image(encode(lines, "PNG"), ImageRules(resize_short=80)).encoded)
    assert small[:, 4:-4].std() < 3
    assert abs(small.mean() - 85) < 2


def test_image_too_long_for_a_jpeg_can_be_resized() -> None:
    long = make_png(65_501, 1, data=zlib.compress(bytes(65_502)))
    assert convert_image(long, ImageRules(max_side=100)).width == 100


def test_large_metadata_is_removed_and_the_scan_is_kept() -> None:
    plain = encode(draw_gradient())
    icc = insert_into_header(plain, make_segment(0xE2, b"ICC_PROFILE\0\1\1" + bytes(50_000)) * 100)
    assert convert_image(icc, DEFAULT).encoded == plain
    assert convert_image(icc + plain * 500, DEFAULT).encoded == plain
    small = insert_into_header(plain, make_segment(0xFE, b"!" * 60_000))
    assert convert_image(small, DEFAULT).encoded is small


def test_decompression_bombs_take_no_memory() -> None:
    """The peak memory of a separate process is measured."""
    program = """
import resource
from data.packing.images import BadImage, ImageRules, convert_image
from tests.support.image_corpus import draw_gradient, encode, load_corpus
convert_image(encode(draw_gradient(), "PNG"), ImageRules())
bombs = [case for case in load_corpus() if "bomb" in case.name]
assert len(bombs) > 5
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for bomb in bombs:
    try:
        convert_image(bomb.encoded, ImageRules())
    except BadImage:
        continue
    raise AssertionError(bomb.name)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 20_000  # KiB; the smallest of the images would take 100,000
    assert done.stderr == ""


def test_image_above_the_limits_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    source = encode(draw_gradient(50, 40))
    assert convert_image(source, ImageRules(max_pixels=2000)).change is None
    with pytest.raises(BadImage, match="50 x 40 pixels; the limit is 1999"):
        convert_image(source, ImageRules(max_pixels=1999, max_side=8))
    monkeypatch.setattr(images, "MAX_BYTES", len(source))
    assert convert_image(source, DEFAULT).change is None
    with pytest.raises(BadImage, match="DALI reads at most"):
        convert_image(source + b"\0", DEFAULT)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_side": 0}, "max_side must be 1 or more, not 0"),
        ({"resize_short": -1}, "resize_short must be 1 or more, not -1"),
        ({"max_pixels": 0}, "max_pixels must be from 1"),
        ({"max_pixels": DALI_PIXELS + 1}, "the most that DALI decodes"),
    ],
)
def test_rule_out_of_range_is_an_error(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageRules(**settings)  # type: ignore[arg-type]
