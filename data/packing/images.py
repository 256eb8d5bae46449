"""What becomes of one encoded image file on its way into a dataset: stored as it is, made a plain JPEG, or refused.

    rules = ImageRules(resize_short=256)
    try:
        stored = stored_image(path.read_bytes(), rules)      # .encoded, .extension, .width, .height, .change, .histogram
    except BadImage as error:
        …                                                    # str(error) says why

Every image is decoded wholly, once, so that training never meets a bad one. RGB and grey baseline JPEGs that are fine are stored
byte for byte. All else becomes a baseline JPEG, grey or RGB: PNG, GIF and WebP (of each the first frame), BMP, TIFF, CMYK, 16-bit,
palette, alpha, EXIF-rotated, progressive.

Colours are those that timm and torchvision see: ICC profiles are not applied and CMYK is taken for ideal inks, since most images
are stored as they are and the others should not differ from them. Two exceptions: 16 bits are scaled to 8, where convert("RGB")
clips them, and alpha is laid on white, the page that such images are made for, where dropping it would uncover whatever lies under
transparent pixels.

Whether a JPEG is fine is decided by libjpeg-turbo with warnings as errors: libjpeg and Pillow decode a damaged file to its end
and leave grey or garbled blocks in it. DALI's decoder is libjpeg-turbo too, but it reads headers more strictly, and so does
`read_jpeg_header`. That what is stored here decodes in DALI is tested with many damaged files (tests/data/packing/test_images.py). Of the
other formats only PNG has checksums; what is damaged but decodes becomes a JPEG of what can be seen.
"""

import functools
import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from data.dataset.headers import END_OF_IMAGE, FRAMES, BadImage, JpegHeader, nvimgcodec, read_jpeg_header

MAX_PIXELS = 2**28 // 3  # 89 megapixels, 256 MiB of RGB: bounds a worker's memory, and DALI's buffers, which never shrink
DALI_PIXELS = (2**29 - 1) // 3  # DALI's JPEG decoder refuses 2^29 bytes of pixels and more
JPEG_SIDE = 65_500  # libjpeg's limit for width and height; the index, with 16 bits for each, could hold a little more
MAX_BYTES = 2**31 - 1  # of an encoded image: DALI's JPEG decoder counts them in an int
MAX_METADATA = 1 << 18  # bytes of a JPEG beside its picture: three average images of ImageNet-22K, and read in every epoch
QUALITY = 95  # of what is made a JPEG, unless it can go on with the quantisation it had
HISTOGRAM_STEP = 5  # rows; coprime to the 8 rows of a JPEG's block


@dataclass(frozen=True, kw_only=True)
class ImageRules:
    """What to do with images.

    keep_original leaves JPEG, PNG and WebP byte for byte where DALI can read them, to be seen in training as DALI sees them: EXIF
    rotation is not applied, alpha is dropped. max_side caps the longer side, resize_short sets the shorter side, both in pixels
    and downward only. An image of more than max_pixels is refused from its header. Raises ValueError for values that can't be met.
    """

    keep_original: bool = False
    max_side: int | None = None
    resize_short: int | None = None
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        for name, value in (("max_side", self.max_side), ("resize_short", self.resize_short)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be 1 or more, not {value}")
        if not 1 <= self.max_pixels <= DALI_PIXELS:
            raise ValueError(f"max_pixels must be from 1 to {DALI_PIXELS}, the most that DALI decodes, not {self.max_pixels}")


@dataclass(frozen=True, eq=False)
class Stored:
    """An image as it goes into a shard.

    width and height, in pixels, are those of the stored image. change: what was done, in words such as "progressive" and "png",
    joined by "+" ("png+resized"); None when it is the source byte for byte. histogram, int64 (3, 256), counts the values of red,
    green and blue in every fifth row; as integers, so that a dataset's sum does not depend on the order.
    """

    encoded: bytes
    extension: str
    width: int
    height: int
    change: str | None
    histogram: np.ndarray


def stored_image(encoded: bytes, rules: ImageRules) -> Stored:
    """What to store for an encoded image file; always the same for the same bytes and rules. Not for several threads at once, as
    Python's filter of warnings is one for all.

    Raises BadImage for a file that is empty, no image, cut short, damaged, too large (known from the header, before memory for
    pixels is allocated) or of a kind that isn't read here.
    """
    if not encoded:
        raise BadImage("empty file")
    if len(encoded) > MAX_BYTES:
        raise BadImage(f"{len(encoded)} bytes; DALI reads at most {MAX_BYTES}")
    with warnings.catch_warnings(action="ignore"):  # Pillow's, about odd metadata
        try:
            return _stored(encoded, rules)
        except (BadImage, MemoryError):
            raise
        except Exception as error:  # decoders raise whatever the damage leads them to
            plain = isinstance(error, (OSError, ValueError, SyntaxError)) and str(error)
            raise BadImage(plain or f"{type(error).__name__}: {error}") from error


@dataclass(frozen=True, eq=False)
class _Picture:
    """A decoded file.

    pixels: uint8, (H, W, 3) or, grey, (H, W), not turned by EXIF orientation. extension: what DALI would read the file as, None
    when it can't. change: why the file can't be stored as it is. ready: gives what to store if the pixels stay as they are.
    encoding: Pillow's options to encode them if they don't.
    """

    pixels: np.ndarray
    extension: str | None
    orientation: int
    change: list[str]
    ready: Callable[[], bytes]
    encoding: dict[str, Any]


def _stored(encoded: bytes, rules: ImageRules) -> Stored:
    picture = _read_jpeg(encoded, rules) if encoded.startswith(b"\xff\xd8") else _read_other(encoded, rules)
    height, width = picture.pixels.shape[:2]
    size = _target_size(width, height, rules)
    rotated, resized = picture.orientation in _UPRIGHT, size != (width, height)
    change = picture.change + ["rotated"] * rotated + ["resized"] * resized
    if change and rules.keep_original and picture.extension and not resized:
        pixels = _dali_pixels(encoded)
        if pixels is not None:
            return _described(encoded, pixels, [], picture.extension)
    if not (rotated or resized):
        return _described(picture.ready(), picture.pixels, change)

    image = Image.fromarray(picture.pixels)
    if resized:
        # Lanczos comes closest to a band-limited image. With the gap, whole pixels are averaged first where an image becomes much
        # smaller: several times as fast, and no difference to the eye.
        image = image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
    if rotated:
        image = image.transpose(_UPRIGHT[picture.orientation])
    return _described(_as_jpeg(image, picture.encoding), np.asarray(image), change)


def _described(encoded: bytes, pixels: np.ndarray, change: list[str], extension: str = "jpg") -> Stored:
    height, width = pixels.shape[:2]
    rows = Image.fromarray(np.ascontiguousarray(pixels[::HISTOGRAM_STEP]))
    counts = np.array(rows.histogram(), np.int64).reshape(-1, 256)  # (1, 256) for grey
    return Stored(encoded, extension, width, height, "+".join(change) or None, np.broadcast_to(counts, (3, 256)))


def _as_jpeg(image: Image.Image, encoding: dict[str, Any]) -> bytes:
    out = io.BytesIO()
    image.save(out, "JPEG", **encoding)
    return out.getvalue()


def _target_size(width: int, height: int, rules: ImageRules) -> tuple[int, int]:
    """Width and height after the rules, in the same proportion. Raises BadImage for an image that is too large to decode, or
    would have a side that no JPEG can have."""
    if width * height > rules.max_pixels:
        raise BadImage(f"{width} x {height} pixels; more than {rules.max_pixels} are refused")
    long, short = max(width, height), min(width, height)
    scale = min(1.0, (rules.max_side or long) / long, (rules.resize_short or short) / short)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    if max(size) > JPEG_SIDE:
        raise BadImage(f"{width} x {height} pixels; a side of a JPEG has at most {JPEG_SIDE}")
    return size


# How to turn an image upright, by its EXIF orientation.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _orientation(exif: bytes) -> int:
    """The EXIF orientation; 1, upright, where EXIF data are missing, unreadable, or longer than they can be in a JPEG."""
    if not exif or len(exif) > 1 << 16:
        return 1
    tags = Image.Exif()
    try:
        tags.load(exif)
        return int(tags.get(ExifTags.Base.Orientation, 1))
    except Exception:  # Pillow raises whatever the damage leads it to; the picture is fine without
        return 1


# As what to decode a JPEG's colours, and their name where decoders differ about them.
_COLOURS = {"YCbCr": ("RGB", None), "Gray": ("GRAY", None), "RGB": ("RGB", "rgb"), "CMYK": ("CMYK", "cmyk"), "YCCK": ("CMYK", "cmyk")}
_SUBSAMPLING = {"422": 1, "420": 2}  # those that Pillow can write, as it numbers them; 0, none, for the others


def _read_jpeg(encoded: bytes, rules: ImageRules) -> _Picture:
    header = read_jpeg_header(encoded)
    try:
        height, width, colours, chroma = simplejpeg.decode_jpeg_header(header.stripped)
    except (ValueError, KeyError):
        raise BadImage("the JPEG's header is damaged, or its colours are subsampled in a way that isn't read here") from None
    _target_size(width, height, rules)
    decoded_as, colour = _COLOURS[colours]
    change = [word for word in (FRAMES[header.frame], None if header.single_scan else "scans", colour) if word]
    baseline = not change
    end = len(encoded)
    if baseline and (header.unwanted or end > MAX_METADATA):  # what follows the picture matters; an end of image can't lie inside it
        end = encoded.find(END_OF_IMAGE, header.scan_start) + len(END_OF_IMAGE)
    bare = header.stripped + encoded[header.scan_start : end]
    pixels = simplejpeg.decode_jpeg(bare, decoded_as)  # strict: raises ValueError where libjpeg would warn
    if decoded_as == "CMYK":  # inverted, as Adobe stores it and all others after it, also where no marker says so
        inks = Image.frombuffer("CMYK", (width, height), pixels, "raw", "CMYK;I", 0, 1)
        pixels = np.asarray(inks.convert("RGB"))
    elif decoded_as == "GRAY":
        pixels = pixels[:, :, 0]
    if baseline and header.unwanted:
        change = [header.unwanted]
    elif baseline and len(encoded) - len(bare) > MAX_METADATA:
        change = ["metadata"]
    encoding: dict[str, Any] = {"quality": QUALITY, "subsampling": _SUBSAMPLING.get(chroma, 0)}

    def ready() -> bytes:
        if baseline:
            return bare if change else encoded
        if colour or FRAMES[header.frame] == "lossless":
            return _as_jpeg(Image.fromarray(pixels), encoding)
        return _as_jpeg(Image.fromarray(pixels), encoding | _own_tables(header))

    return _Picture(pixels, "jpg", _orientation(header.exif), change, ready, encoding)


def _own_tables(header: JpegHeader) -> dict[str, Any]:
    """Pillow's option to encode with the quantisation tables that a JPEG has: the same blocks, quantised alike, lose next to
    nothing."""
    source = JpegImageFile(io.BytesIO(header.stripped))
    tables = [source.quantization[table] for _, _, _, table in source.layer]
    return {"quality": -1, "qtables": [[min(step, 255) for step in table] for table in tables]}  # baseline has 8 bits a step


# What is read beside JPEG, with the extension of what may stay. DALI does not read GIF; a damaged TIFF can make it abort the
# process, and it takes some damaged BMPs for good that it then can't convert.
_FORMATS = {"PNG": "png", "WEBP": "webp", "GIF": None, "BMP": None, "TIFF": None}


def _read_other(encoded: bytes, rules: ImageRules) -> _Picture:
    try:
        image = Image.open(io.BytesIO(encoded), formats=tuple(_FORMATS))
    except UnidentifiedImageError:
        kinds = ", ".join(("JPEG", *_FORMATS))
        raise BadImage(f"not an image of a kind that is read here ({kinds}): it begins with {encoded[:12]!r}") from None
    with image:
        assert image.format is not None
        _target_size(image.width, image.height, rules)
        if image.format == "PNG":  # Pillow compares checksums only when it does not decode
            with Image.open(io.BytesIO(encoded), formats=("PNG",)) as unread:
                unread.verify()
        image.load()
        pixels = _plain(image)
        encoding = {"quality": QUALITY, "subsampling": 0}
        return _Picture(
            pixels,
            _FORMATS[image.format],
            _orientation(image.info.get("exif", b"")),  # TIFFs have none here: Pillow has turned them
            [image.format.lower()],
            lambda: _as_jpeg(Image.fromarray(pixels), encoding),
            encoding,
        )


def _plain(image: Image.Image) -> np.ndarray:
    """An image's pixels as uint8, grey (H, W) or RGB (H, W, 3)."""
    if image.mode.startswith("I;16"):
        return ((np.asarray(image).astype(np.uint32) * 255 + 32_767) // 65_535).astype(np.uint8)  # convert() would clip at 255
    if image.mode in ("I", "F"):
        raise BadImage("samples of 32 bits, of which the file does not say how bright they are")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("L" if image.mode in ("1", "L") else "RGB"))


@functools.cache
def _dali_decoder() -> Callable[[bytes], Any]:
    """DALI's decoder of images on a CPU."""
    codec = nvimgcodec()
    backend = codec.Backend(codec.BackendKind.CPU_ONLY)
    decoder = codec.Decoder(device_id=codec.NVIMGCODEC_DEVICE_CPU_ONLY, max_num_cpu_threads=1, backends=[backend])
    return functools.partial(decoder.decode, params=codec.DecodeParams(apply_exif_orientation=False))


def _dali_pixels(encoded: bytes) -> np.ndarray | None:
    """An image as DALI decodes it, uint8 (H, W, 3); None if it can't."""
    image = _dali_decoder()(encoded)
    return None if image is None else np.asarray(image)
