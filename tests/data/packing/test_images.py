import io
import re
import subprocess
import sys
import warnings
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
from data.packing.images import DALI_PIXELS, ImageRules, StoredImage, convert_image, decode_with_dali
from tests.support.image_corpus import Case, corpus, damaged, encode, into_header, picture, png, segment, with_orientation

pytestmark = pytest.mark.filterwarnings("ignore:.*EXIF:UserWarning")  # Pillow's, where the tests themselves open a damaged file

PLAIN = ImageRules()
KEEP = ImageRules(keep_original=True)
GOOD = [case for case in corpus() if case.bad is None]
ADDRESS = re.compile("at 0x")  # which would make a reason differ from run to run
BAD = [case for case in corpus() if case.bad is not None]


def named(case: Case) -> str:
    return case.name


def decoded(encoded: bytes) -> np.ndarray:
    """As Pillow sees it, uint8 (H, W, 3)."""
    with Image.open(io.BytesIO(encoded)) as image:
        return np.asarray(image.convert("RGB"))


def by_dali(stored: Sequence[StoredImage], crops: Sequence[tuple[int, int, int, int]]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Whole images, and crops (top, left, height, width) of them, as DALI decodes them in training. It fails if one of them does."""
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


def check_by_dali(stored: Sequence[StoredImage], seed: int) -> None:
    chance = np.random.default_rng(seed)
    crops = []
    for image in stored:
        top, left = int(chance.integers(image.height)), int(chance.integers(image.width))
        crops.append((top, left, int(chance.integers(1, image.height - top + 1)), int(chance.integers(1, image.width - left + 1))))
    for image, crop, whole, part in zip(stored, crops, *by_dali(stored, crops), strict=True):
        assert whole.shape == (image.height, image.width, 3)
        assert part.shape == (*crop[2:], 3)


@pytest.mark.parametrize("case", GOOD, ids=named)
def test_what_is_good_is_stored(case: Case) -> None:
    stored = convert_image(case.encoded, PLAIN)
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
    pixels = decoded(stored.encoded)
    assert pixels.shape == (stored.height, stored.width, 3)
    if case.pixels is not None:
        assert pixels.shape == case.pixels.shape
        assert np.abs(pixels.astype(int) - case.pixels).mean() < 4
    again = convert_image(bytes(bytearray(case.encoded)), PLAIN)
    assert again.encoded == stored.encoded
    assert (again.histogram == stored.histogram).all()


def test_pictures_of_the_corpus_tell_mistakes() -> None:
    """Control: what a wrong turn, clipping or a dropped alpha would give is further from what is expected than is allowed above."""
    expected = {case.name: case.pixels for case in GOOD}

    def distance(name: str, pixels: np.ndarray) -> float:
        return float(np.abs(expected[name].astype(int) - pixels).mean())

    rgb = picture()
    for orientation in range(2, 9):
        shown = [expected[f"orientation {other}.jpg"] for other in range(2, 9) if other != orientation]
        same_size = [pixels for pixels in [rgb, *shown] if pixels.shape == expected[f"orientation {orientation}.jpg"].shape]
        assert min(distance(f"orientation {orientation}.jpg", pixels) for pixels in same_size) > 20
    files = {case.name: case.encoded for case in GOOD}
    for name in ("16 bits.png", "16 bits.tif", "alpha.png", "grey alpha.png", "alpha.webp"):
        assert distance(name, decoded(files[name])) > 20, "Pillow's convert() clips 16 bits and drops alpha"
    assert distance("cmyk.jpg", 255 - expected["cmyk.jpg"]) > 20


@pytest.mark.parametrize("case", BAD, ids=named)
def test_what_is_bad_is_refused(case: Case) -> None:
    for rules in (PLAIN, KEEP, ImageRules(max_side=30)):
        if case.name == "long.png" and rules.max_side:
            continue
        with pytest.raises(BadImage, match=case.bad) as error:
            convert_image(case.encoded, rules)
        assert str(error.value)
        assert not ADDRESS.search(str(error.value))


@pytest.mark.parametrize("case", GOOD, ids=named)
def test_keep_original(case: Case) -> None:
    stored = convert_image(case.encoded, KEEP)
    if case.kept:
        assert stored.encoded is case.encoded
        assert stored.change is None
        with Image.open(io.BytesIO(case.encoded)) as image:
            assert stored.extension == {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}[str(image.format)]
            assert (stored.width, stored.height) == image.size, "as stored, not as EXIF would turn it"
    else:
        assert stored.extension == "jpg"
        assert stored.encoded == convert_image(case.encoded, PLAIN).encoded
    small = convert_image(case.encoded, ImageRules(keep_original=True, max_side=8))
    assert (small.change or "").endswith("resized") == (max(stored.width, stored.height) > 8)


def test_every_beginning_of_a_jpeg_is_refused() -> None:
    whole = encode(picture())
    for length in range(len(whole)):
        with pytest.raises(BadImage):
            convert_image(whole[:length], PLAIN)
    assert convert_image(whole, PLAIN).change is None


def test_pillow_alone_would_not_do() -> None:
    """Control: it makes pictures of a JPEG with a hole in its data, and of a PNG whose checksum is wrong, without a word."""
    files = {case.name: case.encoded for case in BAD}
    assert np.abs(decoded(files["zeros within.jpg"]).astype(int) - picture()).mean() > 3
    assert decoded(files["wrong checksum.png"]).shape == picture().shape


def of_damaged(count: int, seed: int, rules: ImageRules) -> tuple[list[StoredImage], dict[bytes, str]]:
    """What is stored of damaged files, and the files that are refused, with the reasons."""
    stored, refused = [], {}
    for encoded in damaged(count, seed):
        try:
            stored.append(convert_image(encoded, rules))
        except BadImage as error:
            refused[encoded] = str(error)
    return stored, refused


@pytest.mark.parametrize("rules", [PLAIN, KEEP], ids=["plain", "keep_original"])
def test_what_is_stored_decodes_in_dali(rules: ImageRules) -> None:
    stored, refused = of_damaged(1500, 1, rules)
    assert len(stored) > 200
    assert len(refused) > 500
    assert all(reason and not ADDRESS.search(reason) for reason in refused.values())
    stored += [convert_image(case.encoded, rules) for case in GOOD]
    check_by_dali(stored, seed=2)


def test_dali_alone_would_refuse_some_of_what_pillow_takes() -> None:
    """Control: there are such among the damaged files above."""
    _, refused = of_damaged(1500, 1, PLAIN)
    jpegs = [encoded for encoded in refused if encoded.startswith(b"\xff\xd8")]  # its readers of others can abort the process
    assert sum(decode_with_dali(encoded) is None for encoded in jpegs if accepted_by_pillow(encoded)) > 3


def accepted_by_pillow(encoded: bytes) -> bool:
    try:
        decoded(encoded)
    except Exception:
        return False
    return True


@pytest.mark.full
@pytest.mark.parametrize("seed", range(10, 30))
@pytest.mark.parametrize("rules", [PLAIN, KEEP], ids=["plain", "keep_original"])
def test_what_is_stored_decodes_in_dali_sweep(rules: ImageRules, seed: int) -> None:
    stored, _ = of_damaged(20_000, seed, rules)
    for start in range(0, len(stored), 256):
        check_by_dali(stored[start : start + 256], seed)


def test_pixels_of_untouched_files_are_dalis() -> None:
    """The strict decoder's pixels, from which the histogram comes, are bit for bit those of training."""
    whole = encode(picture(60, 45))
    stored = convert_image(whole, PLAIN)
    ((pixels,), _) = by_dali([stored], [(0, 0, 1, 1)])
    expected = np.stack([np.bincount(pixels[::5, :, channel].ravel(), minlength=256) for channel in range(3)])
    np.testing.assert_array_equal(stored.histogram, expected)
    assert stored.histogram.dtype == np.int64
    grey = convert_image(encode(picture(60, 45)[:, :, 0]), PLAIN).histogram
    assert grey.shape == (3, 256)
    assert (grey[0] == grey[2]).all()
    assert grey[0].sum() == 60 * 9


def noise(a: np.ndarray, b: np.ndarray) -> float:
    """Root of the mean squared difference."""
    return float(np.sqrt(np.mean((a.astype(float) - b) ** 2)))


@pytest.mark.parametrize("quality", [40, 75, 95])
def test_progressive_keeps_its_quantisation(quality: int) -> None:
    chance = np.random.default_rng(0)
    rough = np.clip(picture(160, 120) + chance.normal(0, 20, (120, 160, 3)), 0, 255).astype(np.uint8)
    source = encode(rough, quality=quality, progressive=True)
    stored = convert_image(source, PLAIN)
    assert noise(decoded(stored.encoded), decoded(source)) < 0.25 * noise(rough, decoded(source))
    assert len(stored.encoded) < 1.3 * len(source)
    with Image.open(io.BytesIO(source)) as before, Image.open(io.BytesIO(stored.encoded)) as after:
        assert before.quantization[0] == after.quantization[0]
        assert before.layer[0][1:3] == after.layer[0][1:3]


@pytest.mark.parametrize(
    ("rules", "size", "becomes"),
    [
        (ImageRules(max_side=40), (100, 50), (40, 20)),
        (ImageRules(max_side=40), (50, 100), (20, 40)),
        (ImageRules(max_side=100), (100, 50), (100, 50)),
        (ImageRules(resize_short=32), (100, 50), (64, 32)),
        (ImageRules(resize_short=32), (333, 97), (110, 32)),
        (ImageRules(resize_short=60), (100, 50), (100, 50)),
        (ImageRules(resize_short=60, max_side=200), (100, 50), (100, 50)),
        (ImageRules(resize_short=32, max_side=48), (100, 50), (48, 24)),
        (ImageRules(resize_short=16, max_side=48), (100, 50), (32, 16)),
        (ImageRules(max_side=10), (900, 3), (10, 1)),
    ],
)
def test_resizing_is_downward_and_proportional(rules: ImageRules, size: tuple[int, int], becomes: tuple[int, int]) -> None:
    source = encode(picture(*size))
    stored = convert_image(source, rules)
    assert (stored.width, stored.height) == becomes
    assert decoded(stored.encoded).shape == (becomes[1], becomes[0], 3)
    if becomes == size:
        assert stored.encoded is source
    else:
        assert stored.change == "resized"
        if min(becomes) > 10:
            assert np.abs(decoded(stored.encoded).astype(int) - picture(*becomes)).mean() < 4


def test_resizing_and_turning_together() -> None:
    source = encode(picture(100, 50), exif=with_orientation(6))
    stored = convert_image(source, ImageRules(max_side=40))
    assert (stored.width, stored.height, stored.change) == (20, 40, "rotated+resized")
    assert np.abs(decoded(stored.encoded).astype(int) - np.rot90(picture(40, 20), -1)).mean() < 4
    as_stored = convert_image(source, ImageRules(max_side=40, keep_original=True))
    assert as_stored.encoded == stored.encoded, "what is resized is made anew, and then upright"


def test_resizing_does_not_alias() -> None:
    """Lines too fine for the small image become an even grey; taking single pixels would show false lines."""
    lines = np.broadcast_to(np.where(np.arange(600) % 3 == 0, 255, 0)[None, :, None], (400, 600, 3)).astype(np.uint8)
    small = decoded(convert_image(encode(lines, "PNG"), ImageRules(resize_short=80)).encoded)
    assert small[:, 4:-4].std() < 3
    assert abs(small.mean() - 85) < 2


def test_a_long_side_can_be_resized() -> None:
    long = png(65_501, 1, data=zlib.compress(bytes(65_502)))
    assert convert_image(long, ImageRules(max_side=100)).width == 100


def test_huge_metadata_is_cut_without_touching_the_picture() -> None:
    plain = encode(picture())
    icc = into_header(plain, segment(0xE2, b"ICC_PROFILE\0\1\1" + bytes(50_000)) * 100)
    assert convert_image(icc, PLAIN).encoded == plain
    assert convert_image(icc + plain * 500, PLAIN).encoded == plain
    small = into_header(plain, segment(0xFE, b"!" * 60_000))
    assert convert_image(small, PLAIN).encoded is small


def test_bombs_take_no_memory() -> None:
    """In a process of its own, whose highest memory is measured."""
    program = """
import resource
from data.dataset.headers import BadImage
from data.packing.images import ImageRules, convert_image
from tests.support.image_corpus import corpus, encode, into_header, picture, segment
convert_image(encode(picture(), "PNG"), ImageRules())
bombs = [case for case in corpus() if "bomb" in case.name]
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
    assert int(done.stdout) < 20_000  # KiB; the smallest of the pictures would take 100,000
    assert done.stderr == ""


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for case in corpus():
            for rules in (PLAIN, KEEP):
                if case.change == "jfif" and rules is KEEP:
                    continue  # libjpeg inside DALI warns of it, here as in training
                try:
                    convert_image(case.encoded, rules)
                except BadImage:
                    continue
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""
    assert not caught


def test_noise_at_every_size_can_be_encoded() -> None:
    """What compresses worst: some encoders' buffers are too small for it."""
    chance = np.random.default_rng(0)
    for side in (1, 7, 64, 300):
        pixels = chance.integers(0, 256, (side, side, 3), np.uint8)
        for options in ({"kind": "PNG"}, {"quality": 50, "progressive": True}):
            check_by_dali([convert_image(encode(pixels, **options), PLAIN)], seed=0)


def test_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    source = encode(picture(50, 40))
    assert convert_image(source, ImageRules(max_pixels=2000)).change is None
    with pytest.raises(BadImage, match="50 x 40 pixels; the limit is 1999"):
        convert_image(source, ImageRules(max_pixels=1999, max_side=8))
    monkeypatch.setattr(images, "MAX_BYTES", len(source))
    assert convert_image(source, PLAIN).change is None
    with pytest.raises(BadImage, match="DALI reads at most"):
        convert_image(source + b"\0", PLAIN)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_side": 0}, "max_side must be 1 or more, not 0"),
        ({"resize_short": -1}, "resize_short must be 1 or more, not -1"),
        ({"max_pixels": 0}, "max_pixels must be from 1"),
        ({"max_pixels": DALI_PIXELS + 1}, "the most that DALI decodes"),
    ],
)
def test_rules_that_mean_nothing(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageRules(**settings)  # type: ignore[arg-type]
