"""Converts images: keeps an encoded file as it is, converts it to a baseline JPEG, or rejects it.

    rules = ImageRules(resize_short=256)
    try:
        image = convert_image(path.read_bytes(), rules)      # .encoded, .extension, .width, .height, .change, .histogram
    except BadImage as error:
        …                                                    # str(error) is the reason

Every image is decoded once, completely, so that training never meets a bad one. Sound RGB and gray baseline JPEGs are stored byte
for byte. Every other image becomes a baseline JPEG, gray or RGB: PNG, GIF and WebP (the first frame), BMP, TIFF, CMYK, 16-bit,
palette, alpha, EXIF-rotated, progressive.

Colors are those of timm and torchvision: ICC profiles are not applied, and CMYK is converted with ideal inks. Most images are stored
as they are, and converted ones should have the same colors. There are two exceptions. 16-bit samples are scaled to 8 bits, whereas
convert("RGB") clips them. Alpha is composited on white, the page that such images are made for; dropping alpha would reveal the
arbitrary colors of transparent pixels.

libjpeg-turbo decides whether a JPEG is sound, with warnings as errors: libjpeg and Pillow decode a damaged file to its end and
leave gray or garbled blocks. DALI's decoder is libjpeg-turbo too, but it parses headers more strictly, and so does
`read_jpeg_header`. tests/data/packing/test_images.py asserts, with many damaged files, that DALI decodes everything stored here. Of the
other formats only PNG has checksums; a damaged file that still decodes becomes a JPEG of the visible pixels.
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

from data.dataset.headers import END_OF_IMAGE, FRAMES, BadImage, JpegHeader, import_nvimgcodec, read_jpeg_header

MAX_PIXELS = 2**28 // 3  # 89 megapixels, 256 MiB of RGB: bounds a worker's memory, and DALI's buffers, which never shrink
DALI_PIXELS = (2**29 - 1) // 3  # DALI's JPEG decoder rejects 2^29 bytes of pixels and more
JPEG_SIDE = 65_500  # libjpeg's limit for width and height; below the index's limit of 16 bits
MAX_BYTES = 2**31 - 1  # an encoded image's limit: DALI's JPEG decoder counts bytes in an int
MAX_METADATA = 1 << 18  # bytes of a JPEG besides its pixels: three average images of ImageNet-22K, read again in every epoch
QUALITY = 95  # a new JPEG's quality, unless it reuses the quantization tables of its source
HISTOGRAM_STEP = 5  # rows; coprime to the 8 rows of a JPEG block


@dataclass(frozen=True, kw_only=True)
class ImageRules:
    """Rules for the conversion of images. Raises ValueError for a value out of range.

    Attributes:
        keep_original: keep JPEG, PNG and WebP byte for byte if DALI can read them. Training then sees them as DALI decodes them: EXIF
            rotation is not applied and alpha is dropped.
        max_side: shrink images to at most this many pixels on the longer side.
        resize_short: shrink images to at most this many pixels on the shorter side.
        max_pixels: reject larger images by their header.
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
class StoredImage:
    """An image as a shard stores it, with its size in pixels.

    Attributes:
        change: the conversions, such as "progressive" or "png+resized"; None if the source is stored byte for byte.
        histogram: int64 (3, 256), counts of the red, green and blue values in every fifth row. Integers, so that the sum over a
            dataset does not depend on the order.
    """

    encoded: bytes
    extension: str
    width: int
    height: int
    change: str | None
    histogram: np.ndarray


def convert_image(encoded: bytes, rules: ImageRules) -> StoredImage:
    """Converts an encoded image file; equal bytes and rules give equal results. Not thread-safe: it sets Python's warning filter.

    Raises BadImage for a file that is empty, not an image, truncated, damaged, of an unsupported format, or too large (found in the header,
    before memory for pixels is allocated).
    """
    if not encoded:
        raise BadImage("empty file")
    if len(encoded) > MAX_BYTES:
        raise BadImage(f"{len(encoded)} bytes; DALI reads at most {MAX_BYTES}")
    with warnings.catch_warnings(action="ignore"):  # Pillow warns of odd metadata
        try:
            return _convert(encoded, rules)
        except (BadImage, MemoryError):
            raise
        except Exception as error:  # decoders raise errors of many types
            is_readable = isinstance(error, (OSError, ValueError, SyntaxError)) and str(error)
            raise BadImage(str(error) if is_readable else f"{type(error).__name__}: {error}") from error


@dataclass(frozen=True, eq=False)
class _Decoded:
    """A decoded file.

    Attributes:
        pixels: uint8, (H, W, 3) or, gray, (H, W); EXIF orientation is not applied.
        extension: the extension under which DALI can read the file; None if it can't.
        change: why the file can't be stored as it is.
        original: the bytes to store for unchanged pixels; None if the pixels must be encoded.
        encoding: Pillow's options to encode the pixels.
        quantized_by: the header whose quantization tables encode unchanged pixels; None for those of `encoding`.
    """

    pixels: np.ndarray
    extension: str | None
    orientation: int
    change: list[str]
    original: bytes | None
    encoding: dict[str, Any]
    quantized_by: JpegHeader | None = None


def _convert(encoded: bytes, rules: ImageRules) -> StoredImage:
    decoded = _decode_jpeg(encoded, rules) if encoded.startswith(b"\xff\xd8") else _decode_other(encoded, rules)
    height, width = decoded.pixels.shape[:2]
    size = _scale_size(width, height, rules)
    is_rotated, is_resized = decoded.orientation in _UPRIGHT, size != (width, height)
    change = decoded.change + ["rotated"] * is_rotated + ["resized"] * is_resized
    if change and rules.keep_original and decoded.extension and not is_resized:
        pixels = decode_with_dali(encoded)
        if pixels is not None:
            return _describe(encoded, pixels, [], decoded.extension)
    if not (is_rotated or is_resized):
        if decoded.original is not None:
            return _describe(decoded.original, decoded.pixels, change)
        tables = _copy_quantization(decoded.quantized_by) if decoded.quantized_by else {}
        return _describe(_encode_jpeg(Image.fromarray(decoded.pixels), decoded.encoding | tables), decoded.pixels, change)

    image = Image.fromarray(decoded.pixels)
    if is_resized:
        # Lanczos comes closest to a band-limited image. reducing_gap averages whole pixels first where an image becomes much
        # smaller: several times faster, without a visible difference.
        image = image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
    if is_rotated:
        image = image.transpose(_UPRIGHT[decoded.orientation])
    return _describe(_encode_jpeg(image, decoded.encoding), np.asarray(image), change)


def _describe(encoded: bytes, pixels: np.ndarray, change: list[str], extension: str = "jpg") -> StoredImage:
    height, width = pixels.shape[:2]
    rows = Image.fromarray(np.ascontiguousarray(pixels[::HISTOGRAM_STEP]))
    counts = np.array(rows.histogram(), np.int64).reshape(-1, 256)  # (1, 256) for gray
    return StoredImage(encoded, extension, width, height, "+".join(change) or None, np.broadcast_to(counts, (3, 256)))


def _encode_jpeg(image: Image.Image, encoding: dict[str, Any]) -> bytes:
    out = io.BytesIO()
    image.save(out, "JPEG", **encoding)
    return out.getvalue()


def _scale_size(width: int, height: int, rules: ImageRules) -> tuple[int, int]:
    """Returns the width and height to store; raises BadImage for an image too large to decode or store."""
    if width * height > rules.max_pixels:
        raise BadImage(f"{width} x {height} pixels; the limit is {rules.max_pixels}")
    long, short = max(width, height), min(width, height)
    scale = min(1.0, (rules.max_side or long) / long, (rules.resize_short or short) / short)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    if max(size) > JPEG_SIDE:
        raise BadImage(f"{width} x {height} pixels; a side of a JPEG has at most {JPEG_SIDE}")
    return size


# The transposition that turns an image of each EXIF orientation upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _read_orientation(exif: bytes) -> int:
    """Returns the EXIF orientation; 1, upright, if EXIF data are missing, unreadable, or longer than a JPEG can hold."""
    if not exif or len(exif) > 1 << 16:
        return 1
    tags = Image.Exif()
    try:
        tags.load(exif)
        return int(tags.get(ExifTags.Base.Orientation, 1))
    except Exception:  # Pillow raises errors of many types for damaged EXIF data; the pixels are sound nevertheless
        return 1


# For each color space of a JPEG, the space to decode to, and the change to record if decoders disagree about the colors.
_COLORS = {"YCbCr": ("RGB", None), "Gray": ("GRAY", None), "RGB": ("RGB", "rgb"), "CMYK": ("CMYK", "cmyk"), "YCCK": ("CMYK", "cmyk")}
_SUBSAMPLING = {"422": 1, "420": 2}  # the modes that Pillow can write, by its numbers; every other mode becomes 0, none


def _decode_jpeg(encoded: bytes, rules: ImageRules) -> _Decoded:
    header = read_jpeg_header(encoded)
    try:
        height, width, colors, chroma = simplejpeg.decode_jpeg_header(header.stripped)
    except (ValueError, KeyError):
        raise BadImage("the JPEG's header is damaged, or its chroma subsampling is not supported") from None
    _scale_size(width, height, rules)
    space, color_change = _COLORS[colors]
    change = [word for word in (FRAMES[header.frame], None if header.single_scan else "scans", color_change) if word]
    is_baseline = not change
    end = len(encoded)
    if is_baseline and (header.unwanted or end > MAX_METADATA):  # drop data after the picture, which can't contain an end of image
        end = encoded.find(END_OF_IMAGE, header.scan_start) + len(END_OF_IMAGE)
    stripped = header.stripped + encoded[header.scan_start : end]
    pixels = simplejpeg.decode_jpeg(stripped, space)  # strict: raises ValueError where libjpeg would warn
    if space == "CMYK":  # inverted, as Adobe and every later writer store it, even without a marker
        inks = Image.frombuffer("CMYK", (width, height), pixels, "raw", "CMYK;I", 0, 1)
        pixels = np.asarray(inks.convert("RGB"))
    elif space == "GRAY":
        pixels = pixels[:, :, 0]
    encoding = {"quality": QUALITY, "subsampling": _SUBSAMPLING.get(chroma, 0)}
    orientation = _read_orientation(header.exif)
    if not is_baseline:
        tables = None if color_change or FRAMES[header.frame] == "lossless" else header
        return _Decoded(pixels, "jpg", orientation, change, None, encoding, tables)
    if header.unwanted:
        return _Decoded(pixels, "jpg", orientation, [header.unwanted], stripped, encoding)
    if len(encoded) - len(stripped) > MAX_METADATA:
        return _Decoded(pixels, "jpg", orientation, ["metadata"], stripped, encoding)
    return _Decoded(pixels, "jpg", orientation, [], encoded, encoding)


def _copy_quantization(header: JpegHeader) -> dict[str, Any]:
    """Returns Pillow's options to encode with a JPEG's quantization tables, so that unchanged blocks lose next to nothing."""
    source = JpegImageFile(io.BytesIO(header.stripped))
    tables = [source.quantization[table] for _, _, _, table in source.layer]
    return {"quality": -1, "qtables": [[min(step, 255) for step in table] for table in tables]}  # baseline has 8 bits a step


# The formats besides JPEG, each with the extension under which keep_original keeps it. DALI does not read GIF, a damaged TIFF can make
# DALI abort the process, and DALI accepts some damaged BMPs that it then can't convert.
_FORMATS = {"PNG": "png", "WEBP": "webp", "GIF": None, "BMP": None, "TIFF": None}


def _decode_other(encoded: bytes, rules: ImageRules) -> _Decoded:
    try:
        image = Image.open(io.BytesIO(encoded), formats=tuple(_FORMATS))
    except UnidentifiedImageError:
        formats = ", ".join(("JPEG", *_FORMATS))
        raise BadImage(f"not an image of a supported format ({formats}): it begins with {encoded[:12]!r}") from None
    with image:
        assert image.format is not None
        _scale_size(image.width, image.height, rules)
        if image.format == "PNG":  # Pillow compares checksums only when it does not decode
            with Image.open(io.BytesIO(encoded), formats=("PNG",)) as undecoded:
                undecoded.verify()
        image.load()
        return _Decoded(
            _convert_to_8_bits(image),
            _FORMATS[image.format],
            _read_orientation(image.info.get("exif", b"")),  # Pillow has already rotated a TIFF
            [image.format.lower()],
            None,
            {"quality": QUALITY, "subsampling": 0},
        )


def _convert_to_8_bits(image: Image.Image) -> np.ndarray:
    """Returns an image's pixels as uint8, gray (H, W) or RGB (H, W, 3)."""
    if image.mode.startswith("I;16"):
        return ((np.asarray(image).astype(np.uint32) * 255 + 32_767) // 65_535).astype(np.uint8)  # convert() would clip at 255
    if image.mode in ("I", "F"):
        raise BadImage("32-bit samples, whose range the file does not define")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("L" if image.mode in ("1", "L") else "RGB"))


def decode_with_dali(encoded: bytes) -> np.ndarray | None:
    """Decodes an image as DALI does on a CPU, uint8 (H, W, 3); returns None if DALI can't."""
    image = _open_dali_decoder()(encoded)
    return None if image is None else np.asarray(image)


@functools.cache
def _open_dali_decoder() -> Callable[[bytes], Any]:
    codec = import_nvimgcodec()
    backend = codec.Backend(codec.BackendKind.CPU_ONLY)
    decoder = codec.Decoder(device_id=codec.NVIMGCODEC_DEVICE_CPU_ONLY, max_num_cpu_threads=1, backends=[backend])
    return functools.partial(decoder.decode, params=codec.DecodeParams(apply_exif_orientation=False))
