"""Reads the headers of encoded images: checks that keep damaged files from DALI, and the JPEG headers that packing needs.

check_header(encoded, width, height)        # raises BadImage; takes a few microseconds; safe in several threads
width, height = read_image_size(encoded)
header = read_jpeg_header(encoded)          # .frame, .single_scan, .scan_start, .exif, .unwanted, .stripped
"""

import functools
import importlib
import io
import os
import re
import warnings
from dataclasses import dataclass
from types import ModuleType

import numpy as np
from PIL import Image, UnidentifiedImageError

from data.dataset.index import DTYPE

MAX_SIDE = np.iinfo(DTYPE["width"]).max  # pixels
END_OF_IMAGE = b"\xff\xd9"  # the JPEG marker
# Names of a JPEG's frame types, by marker; None is baseline. libjpeg-turbo decodes no other types.
FRAMES = {0xC0: None, 0xC1: "extended", 0xC2: "progressive", 0xC3: "lossless", 0xC9: "arithmetic", 0xCA: "arithmetic"}
# A segment of a JPEG's header: any number of fill bytes, marker, length. Markers without a length are not allowed: libjpeg skips
# them, but DALI reads the bytes that follow as a length.
_SEGMENT = re.compile(rb"\xff+([\xc0-\xcf\xda-\xef\xfe])(..)", re.DOTALL)


class BadImage(ValueError):
    """An image that can't be used. The message is the reason, the same on every attempt to read the image."""


@dataclass(frozen=True)
class JpegHeader:
    """The header of a JPEG: `frame` is a key of FRAMES, `scan_start` the byte offset of the first scan's data.

    `single_scan` is true if the first scan holds all components; `exif` is empty without such a segment; `unwanted` names content that
    should not be stored, such as "mpo". `stripped` is the header without that content and without metadata.
    """

    frame: int
    single_scan: bool
    scan_start: int
    exif: bytes
    unwanted: str | None
    stripped: bytes


def read_jpeg_header(encoded: bytes) -> JpegHeader:
    """Reads the segments of a JPEG up to the first scan. Raises BadImage if one is damaged or truncated."""
    frame, components, exif, unwanted = 0, 0, b"", None
    stripped = [encoded[:2]]
    end = 2
    while segment := _SEGMENT.match(encoded, end):
        marker, start = segment[1][0], segment.end()
        end = start - 2 + int.from_bytes(segment[2], "big")
        if not start <= end < len(encoded):
            break
        if marker == 0xE0 and encoded.startswith(b"JFIF\0", start) and encoded[start + 5] != 1:
            unwanted = "jfif"  # libjpeg warns of this revision; photos on the web have it without any other fault
            stripped.append(encoded[start - 4 : start + 5] + b"\1" + encoded[start + 6 : end])
        elif marker < 0xE1 or marker == 0xEE:  # JFIF's and Adobe's segments define the components; other APPn and comments don't
            stripped.append(encoded[start - 4 : end])
        if marker in FRAMES:
            frame, components = marker, encoded[min(start + 5, end)]
        elif marker == 0xE1 and not exif and encoded.startswith(b"Exif\0\0", start):
            exif = encoded[start:end]
        elif marker == 0xE2 and encoded.startswith(b"MPF\0", start):
            unwanted = "mpo"
        elif marker == 0xDA:
            return JpegHeader(frame, encoded[start] == components, end, exif, unwanted, b"".join(stripped))
    raise BadImage("the JPEG's header is damaged or truncated")


@functools.cache
def import_nvimgcodec() -> ModuleType:
    """Imports the library with which DALI decodes images."""
    os.environ.setdefault("PYNVIMGCODEC_VERBOSITY", "0")  # read on import; results show failures to decode
    return importlib.import_module("nvidia.nvimgcodec")


def check_header(encoded: np.ndarray, width: int, height: int) -> None:
    """Checks the header of an encoded image, uint8 (bytes,), against the index, before DALI reads it. Safe in several threads.

    Raises:
        BadImage: the header can't be read or has another size in pixels; the format can make DALI abort the process; or a JPEG is
            truncated. A truncated JPEG still decodes if the crop lies above the cut, so it would be bad in some epochs only.
    """
    try:
        stream = import_nvimgcodec().CodeStream(encoded)
        codec, size = stream.codec_name, (stream.width, stream.height)
    except RuntimeError:
        codec, size = "", (0, 0)
    if codec not in ("jpeg", "png", "webp"):
        raise BadImage("its header is damaged, or it is not a JPEG, PNG or WebP")
    if size != (width, height):
        raise BadImage(f"its header has {size[0]} x {size[1]} pixels, the index {width} x {height}")
    if codec == "jpeg" and encoded[-2:].tobytes() != END_OF_IMAGE:  # most files end with the marker
        file = encoded.tobytes()
        if file.rfind(END_OF_IMAGE) < read_jpeg_header(file).scan_start:  # a marker before the scan belongs to a thumbnail
            raise BadImage("the JPEG is truncated: its end is missing")


def read_image_size(encoded: bytes) -> tuple[int, int]:
    """Reads width and height, in pixels, from the header of a JPEG, PNG or WebP.

    Raises ValueError for any other format, and for a side longer than an index can hold.
    """
    try:
        with (
            warnings.catch_warnings(action="ignore"),  # Pillow warns of odd metadata
            Image.open(io.BytesIO(encoded), formats=("JPEG", "PNG", "WEBP")) as image,
        ):
            width, height = image.size
    except UnidentifiedImageError:
        raise ValueError("its image is not a JPEG, PNG or WebP, or its header is damaged") from None
    except Exception as error:  # Pillow's decoders raise errors of many types
        raise ValueError(f"its image can't be read ({error})") from error
    if max(width, height) > MAX_SIDE:
        raise ValueError(f"its image has {width} x {height} pixels; the limit for a side is {MAX_SIDE}")
    return width, height
