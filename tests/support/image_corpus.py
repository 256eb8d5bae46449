"""Odd and broken image files with the expected result of data/packing/images.py, and any number of randomly damaged files.

for case in load_corpus(): …                  # .name, .encoded, .change or .bad, .is_kept, .pixels
for encoded in damage_files(300, seed=0): …
"""

import base64
import functools
import io
import random
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image

WIDTH, HEIGHT = 56, 40


@dataclass(frozen=True, eq=False)
class Case:
    """An image file and its expected conversion.

    Attributes:
        change: the conversion with default rules; None if the file stays byte for byte.
        bad: a pattern that matches the reason of a rejection; None for a usable image.
        is_kept: whether keep_original keeps the file byte for byte.
        pixels: the visible pixels, uint8 RGB, computed without the tested code.
    """

    name: str
    encoded: bytes
    change: str | None = None
    bad: str | None = None
    is_kept: bool = True
    pixels: np.ndarray | None = None


def draw_gradient(width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """Draws smooth colors, uint8 (H, W, 3), that every rotation and reflection changes."""
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    return np.rint(255 * np.stack([x, y, (1 - x) * (1 - y)], axis=-1)).astype(np.uint8)


def encode(pixels: np.ndarray | Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    out = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(out, kind, **({"quality": 90} if kind == "JPEG" else {}) | options)
    return out.getvalue()


def make_segment(marker: int, payload: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(payload) + 2) + payload


def insert_into_header(jpeg: bytes, added: bytes) -> bytes:
    """Inserts bytes at the start of a JPEG's header."""
    return jpeg[:2] + added + jpeg[2:]


def set_header_size(jpeg: bytes, width: int, height: int) -> bytes:
    """Changes the size in a JPEG's header."""
    start = re.search(rb"\xff[\xc0\xc2]\x00.\x08", jpeg, re.DOTALL).end()  # type: ignore[union-attr]
    return jpeg[:start] + struct.pack(">HH", height, width) + jpeg[start + 4 :]


def make_png(width: int, height: int, *chunks: tuple[bytes, bytes], data: bytes = b"") -> bytes:
    """Makes an 8-bit gray PNG of the given chunks and compressed data."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", data), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in parts)


def make_exif(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


# From stored to visible pixels for each EXIF orientation, by the standard's definition of row 0 and column 0.
UPRIGHT = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: np.rot90(x),
}

# Files that no installed library writes: 16 x 16 pixels, red 16 x, green 16 y, blue 255 - 8 x - 8 y, quality 75.
ARITHMETIC = base64.b85decode(
    "|JeWF01!$>Nk#wx0RR9200961|JwjV00;&K2L=TQ2L}fU2?z=d6b%du3k(?&6Au&}8Xq1V8XO!TBrYc)A}k{u94I#_EHE)NG&CP4IXyTsJT5adGXL8ELje"
    "g12@DGi7!3^=G9erxGBPqUGBPqUGBPqUGBPqUGBPqUGBPqUGBPqUGBPqUGBPqUGBPqUGBPqUGBPqUGBW?k01*fP5C9MZ0U`hb5di}c0sqVZ3IGrg1pyEd1"
    "^?Or3<CiG0ucid06zf#0HLWhU=Kw3=%w%0N;L<3JW0X^n4ijBl`ep@H4y*V"
)
SEPARATE_SCANS = base64.b85decode(
    "|JeWF01!$>Nk#wx0RR9200961|JwjV00;&K2L=TQ2L}fU2?z=d6b%du3k(?&6Au&}8Xq1V8XO!TBrYc)A}k{u94I#_EHE)NG&CP4IXyTsJT5adGXL8ELje"
    "g12@DGi7!3^=G9erxGBPqUGBPqUGBPqUGBPqUGBPqUGBPqUGBPqUGBPqUGBPqUGBPqUGBPqUGBPqUGBW?b01*fP5C9MZ0U`hb5di}c0sq7R6#xMN000000"
    "000000000000FB|HJ?o5C8%L000000000000000000C9A~FBk00;pA002J#hfWtNKAbL8rA`+rKAbL8|HJ?k0RaF200000000000000000aNT02mPf0s{a"
    "50000000000000001qLB8|Jncu0Rj;KKLB@fZL|Nx02BcM00000000000000000001|HJ?o5dZ=M000000000000000000FBAu<2j00;pC5dc2`BaU*<|J"
    "e"
)


def _list_jpegs() -> Iterator[Case]:
    """Yields files that a JPEG decoder reads."""
    rgb = draw_gradient()
    gray = np.asarray(Image.fromarray(rgb).convert("L"))
    plain = encode(rgb)
    yield Case("plain.jpg", plain, pixels=rgb)
    yield Case("gray.jpg", encode(gray), pixels=np.stack([gray] * 3, axis=-1))
    for chroma in ("444", "422", "420", "440", "411"):
        yield Case(f"chroma {chroma}.jpeg", simplejpeg.encode_jpeg(rgb, 90, "RGB", chroma), pixels=rgb)
    yield Case("restarts.JPEG", encode(rgb, restart_marker_blocks=2), pixels=rgb)
    yield Case("optimized tables.jpg", encode(rgb, optimize=True), pixels=rgb)
    yield Case("coarse.jpg", encode(rgb, quality=1))
    yield Case("fine.jpg", encode(rgb, quality=100), pixels=rgb)
    yield Case("1x1.jpg", encode(rgb[:1, :1]), pixels=rgb[:1, :1])
    yield Case("1x40.jpg", encode(rgb[:, :1]), pixels=rgb[:, :1])
    yield Case("upright.jpg", encode(rgb, exif=make_exif(1)), pixels=rgb)
    yield Case("bad exif.jpg", encode(rgb, exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\xff" * 30), pixels=rgb)
    yield Case("bad icc.jpg", insert_into_header(plain, make_segment(0xE2, b"ICC_PROFILE\0\x09\x02?")), pixels=rgb)
    yield Case("comments.jpg", insert_into_header(plain, make_segment(0xFE, b"!" * 60_000) * 4), pixels=rgb)
    yield Case("fill bytes.jpg", insert_into_header(plain, b"\xff" * 9), pixels=rgb)
    yield Case("something after it.jpg", plain + b"\0" * 1000, pixels=rgb)
    yield Case("named.png", plain, pixels=rgb)

    for orientation in range(2, 9):
        rotated = encode(rgb, exif=make_exif(orientation))
        yield Case(f"orientation {orientation}.jpg", rotated, "rotated", pixels=UPRIGHT[orientation](rgb))
    yield Case("progressive.jpg", encode(rgb, progressive=True), "progressive", pixels=rgb)
    yield Case("progressive gray.jpg", encode(gray, progressive=True), "progressive", pixels=np.stack([gray] * 3, axis=-1))
    rotated = encode(rgb, progressive=True, exif=make_exif(6))
    yield Case("progressive, on its side.jpg", rotated, "progressive+rotated", pixels=UPRIGHT[6](rgb))
    yield Case("extended.jpg", plain.replace(b"\xff\xc0\0\x11\x08", b"\xff\xc1\0\x11\x08"), "extended", pixels=rgb)
    wide = re.sub(
        rb"\xff\xdb\0C(.)(.{63}).",
        lambda table: make_segment(0xDB, bytes([0x10 + table[1][0]]) + struct.pack(">64H", *table[2], 300)),
        plain.replace(b"\xff\xc0\0\x11\x08", b"\xff\xc1\0\x11\x08"),
        flags=re.DOTALL,
    )
    yield Case("tables of 16 bits.jpg", wide, "extended", pixels=rgb)
    y, x = np.mgrid[0:16, 0:16]
    ramps = np.stack([16 * x, 16 * y, 255 - 8 * x - 8 * y], axis=-1).astype(np.uint8)
    yield Case("arithmetic.jpg", ARITHMETIC, "arithmetic", pixels=ramps)
    yield Case("separate scans.jpg", SEPARATE_SCANS, "scans", pixels=ramps)
    codes = make_segment(0xC4, b"\0\1" + bytes(16))  # a single code, 0, of one bit: equal to the prediction, mid-gray
    scan = make_segment(0xDA, b"\1\1\0\1\0\0") + bytes(8) + b"\xff\xd9"
    lossless = b"\xff\xd8" + make_segment(0xC3, b"\x08\0\x08\0\x08\1\1\x11\0") + codes + scan
    yield Case("lossless.jpg", lossless, "lossless", is_kept=False, pixels=np.full((8, 8, 3), 128, np.uint8))
    yield Case("stored as RGB.jpg", encode(rgb, keep_rgb=True), "rgb", pixels=rgb)

    inks = np.concatenate([255 - rgb, rgb[:, :, 1:2]], axis=-1)
    printed = np.rint((255.0 - inks[..., :3]) * (255.0 - inks[..., 3:]) / 255).astype(np.uint8)
    yield Case(
        "cmyk.jpg", encode(Image.frombytes("CMYK", (WIDTH, HEIGHT), inks.tobytes())), "cmyk", pixels=printed
    )  # Pillow stores inks inverted, as Adobe
    ycck = simplejpeg.encode_jpeg(np.ascontiguousarray(255 - inks), 90, "CMYK", "444")
    yield Case("ycck.jpg", ycck, "cmyk", pixels=printed)

    yield Case("several.jpg", encode(rgb, "MPO", save_all=True, append_images=[Image.fromarray(255 - rgb)]), "mpo", pixels=rgb)
    yield Case("revision 0.jpg", plain.replace(b"JFIF\0\1", b"JFIF\0\0"), "jfif", pixels=rgb)
    yield Case("huge comments.jpg", insert_into_header(plain, make_segment(0xFE, b"!" * 60_000) * 50), "metadata", pixels=rgb)
    yield Case("huge exif.jpg", insert_into_header(plain, make_segment(0xE1, b"Exif\0\0" + bytes(60_000)) * 50), "metadata", pixels=rgb)
    yield Case("huge tail.jpg", plain + bytes(1_000_000), "metadata", pixels=rgb)


def _list_other_formats() -> Iterator[Case]:
    """Yields files of other formats."""
    rgb = draw_gradient()
    image = Image.fromarray(rgb)
    gray = np.asarray(image.convert("L"))
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    fine = (65_535 * (x + y) / (WIDTH + HEIGHT - 2)).astype(np.uint16)  # all of the 16 bits
    scaled = np.stack([np.rint(fine / 257)] * 3, axis=-1).astype(np.uint8)
    alpha = (255 * x / (WIDTH - 1)).astype(np.uint8)
    share = alpha[..., None] / 255
    rgba = np.concatenate([rgb, alpha[..., None]], axis=-1)
    on_white = np.rint(share * rgb + (1 - share) * 255).astype(np.uint8)
    gray_on_white = np.stack([np.rint(share[..., 0] * gray + (1 - share[..., 0]) * 255)] * 3, axis=-1).astype(np.uint8)
    few = Image.fromarray((rgb // 64 * 64).astype(np.uint8)).quantize(64)
    seen = np.asarray(few.convert("RGB"))
    black_white = np.asarray(image.convert("1").convert("RGB"))
    reversed_too = {"save_all": True, "append_images": [Image.fromarray(255 - rgb)]}

    yield Case("colors.png", encode(rgb, "PNG"), "png", pixels=rgb)
    yield Case("png.jpg", encode(rgb, "PNG"), "png", pixels=rgb)
    yield Case("gray.png", encode(gray, "PNG"), "png", pixels=np.stack([gray] * 3, axis=-1))
    yield Case("16 bits.png", encode(fine, "PNG"), "png", pixels=scaled)
    yield Case("palette.png", encode(few, "PNG"), "png", pixels=seen)
    yield Case("1 bit.png", encode(image.convert("1"), "PNG"), "png", pixels=black_white)
    yield Case("alpha.png", encode(rgba, "PNG"), "png", pixels=on_white)
    yield Case(
        "gray alpha.png", encode(Image.merge("LA", [Image.fromarray(gray), Image.fromarray(alpha)]), "PNG"), "png", pixels=gray_on_white
    )
    clear = np.where((np.asarray(few) == 0)[..., None], 255, seen).astype(np.uint8)
    yield Case("palette alpha.png", encode(few, "PNG", transparency=0), "png", pixels=clear)
    yield Case("animated.png", encode(rgb, "PNG", **reversed_too), "png", pixels=rgb)
    yield Case("on its side.png", encode(rgb, "PNG", exif=make_exif(6)), "png+rotated", pixels=UPRIGHT[6](rgb))
    yield Case("1x1.png", encode(rgb[:1, :1], "PNG"), "png", pixels=rgb[:1, :1])
    yield Case("still.gif", encode(few, "GIF"), "gif", is_kept=False, pixels=seen)
    yield Case("animated.gif", encode(few, "GIF", save_all=True, append_images=[few.rotate(180)]), "gif", is_kept=False, pixels=seen)
    yield Case("gif.JPEG", encode(few, "GIF"), "gif", is_kept=False, pixels=seen)
    yield Case("lossless.webp", encode(rgb, "WEBP", lossless=True), "webp", pixels=rgb)
    yield Case("lossy.webp", encode(rgb, "WEBP"), "webp")
    yield Case("alpha.webp", encode(rgba, "WEBP", lossless=True, exact=True), "webp", pixels=on_white)
    yield Case("animated.webp", encode(rgb, "WEBP", lossless=True, **reversed_too), "webp", pixels=rgb)
    yield Case("colors.bmp", encode(rgb, "BMP"), "bmp", is_kept=False, pixels=rgb)
    yield Case("colors.tif", encode(rgb, "TIFF"), "tiff", is_kept=False, pixels=rgb)
    yield Case("deflate.tiff", encode(rgb, "TIFF", compression="tiff_adobe_deflate"), "tiff", is_kept=False, pixels=rgb)
    yield Case("16 bits.tif", encode(fine, "TIFF"), "tiff", is_kept=False, pixels=scaled)
    yield Case("pages.tif", encode(rgb, "TIFF", **reversed_too), "tiff", is_kept=False, pixels=rgb)
    inks = np.concatenate([255 - rgb, rgb[:, :, 1:2]], axis=-1)
    printed = np.rint((255.0 - inks[..., :3]) * (255.0 - inks[..., 3:]) / 255).astype(np.uint8)
    yield Case("cmyk.tif", encode(Image.frombytes("CMYK", (WIDTH, HEIGHT), inks.tobytes()), "TIFF"), "tiff", is_kept=False, pixels=printed)
    yield Case("on its side.tif", encode(rgb, "TIFF", tiffinfo={0x0112: 6}), "tiff", is_kept=False, pixels=UPRIGHT[6](rgb))


def _list_bad() -> Iterator[Case]:
    """Yields files that must be rejected."""
    rgb = draw_gradient()
    plain = encode(rgb)
    scan = re.search(rb"\xff\xda\0\x0c", plain).end() + 10  # type: ignore[union-attr]
    yield Case("empty.jpg", b"", bad="empty")
    yield Case("text.jpg", b"Not found\n", bad="begins with b'Not found")
    yield Case(
        "error page.jpg", b"<!DOCTYPE html><html><head><title>403 Forbidden</title></head></html>", bad="begins with b'<!DOCTYPE ht'"
    )
    yield Case("zeros.jpg", bytes(5000), bad="not an image")
    yield Case("drawing.svg", b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', bad="not an image")
    yield Case("print.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", bad="not an image")
    for part in range(1, 20):
        yield Case(f"cut {part}.jpg", plain[: len(plain) * part // 20], bad="truncated|[Pp]remature|damaged")
    yield Case("no end.jpg", plain[:-2], bad="Premature end")
    yield Case("zeros at the tail.jpg", plain[:-150] + bytes(150), bad="Corrupt JPEG data|Premature end")
    yield Case("zeros within.jpg", plain[: scan + 90] + bytes(60) + plain[scan + 150 :], bad="Corrupt JPEG data")
    yield Case("cut progressive.jpg", encode(rgb, progressive=True)[:-300], bad="Premature end")
    yield Case("garbage in the header.jpg", insert_into_header(plain, b"abc"), bad="header is damaged")
    yield Case("restart in the header.jpg", insert_into_header(plain, b"\xff\xd0"), bad="header is damaged")
    yield Case("no tables.jpg", re.sub(rb"\xff\xdb\0C.{65}", b"", plain, flags=re.DOTALL), bad="Quantization table")
    yield Case("12 bits.jpg", plain.replace(b"\xff\xc0\0\x11\x08", b"\xff\xc1\0\x11\x0c"), bad="precision 12")
    yield Case("bomb.jpg", set_header_size(plain, 20_000, 20_000), bad="20000 x 20000 pixels")
    yield Case("progressive bomb.jpg", set_header_size(encode(rgb, progressive=True), 20_000, 20_000), bad="20000 x 20000 pixels")
    yield Case("bomb.png", make_png(20_000, 20_000), bad="decompression bomb")
    yield Case("smaller bomb.png", make_png(10_000, 10_000), bad="10000 x 10000 pixels")
    yield Case("bomb.gif", b"GIF89a" + struct.pack("<HH", 20_000, 20_000) + encode(rgb, "GIF")[10:], bad="decompression bomb")
    bmp = encode(rgb, "BMP")
    yield Case("bomb.bmp", bmp[:18] + struct.pack("<ii", 20_000, 20_000) + bmp[26:], bad="decompression bomb")
    megabytes = zlib.compress(bytes(30 << 20), 9)
    for chunk, start in ((b"zTXt", b"a\0\0"), (b"iTXt", b"a\0\1\0\0\0"), (b"iCCP", b"a\0\0")):
        yield Case(
            f"bomb in {chunk.decode()}.png", make_png(1, 1, (chunk, start + megabytes), data=zlib.compress(b"\0\0")), bad="too large"
        )
    yield Case("long.png", make_png(65_501, 1, data=zlib.compress(bytes(65_502))), bad="at most 65500")
    lossless = {"WEBP": {"lossless": True}}
    for kind in ("PNG", "GIF", "WEBP", "BMP", "TIFF"):
        whole = encode(rgb, kind, **lossless.get(kind, {}))
        for part in range(1, 8):
            cut = whole[: len(whole) * part // 8]
            if kind != "TIFF" or part > 1:
                yield Case(f"cut {part}.{kind.lower()}", cut, bad=".")
    yield Case("zeros at the tail.png", encode(rgb, "PNG")[:-200] + bytes(200), bad=".")
    whole = encode(rgb, "PNG")
    checksum = len(whole) - 16  # of the data: before IEND's 12 bytes
    wrong = whole[:checksum] + bytes([whole[checksum] ^ 1]) + whole[checksum + 1 :]
    yield Case("wrong checksum.png", wrong, bad="broken PNG file")
    yield Case("float.tif", encode(Image.new("F", (9, 9)), "TIFF"), bad="32-bit samples")


@functools.cache
def load_corpus() -> tuple[Case, ...]:
    """Returns all cases; names are unique."""
    return (*_list_jpegs(), *_list_other_formats(), *_list_bad())


WAYS = ("cut", "end", "bit", "bits", "byte", "zeros", "insert", "remove", "splice", "segment", "again", "marker", "after")


def damage_files(count: int, seed: int, cases: tuple[Case, ...] | None = None) -> Iterator[bytes]:
    """Yields usable files of the corpus (or of `cases`), each damaged in one or two random ways."""
    usable = [case.encoded for case in cases or load_corpus() if case.bad is None and len(case.encoded) < 20_000]
    for number in range(count):
        chance = random.Random(f"{seed} {number}")
        encoded = chance.choice(usable)
        for _ in range(chance.choice((1, 1, 2))):
            encoded = _damage(encoded, usable, chance)
        yield encoded


def _damage(encoded: bytes, others: list[bytes], chance: random.Random) -> bytes:
    damaged = bytearray(encoded)
    reach = chance.choice((len(damaged), min(len(damaged), 700)))  # anywhere, or in the header
    position = chance.randrange(reach)
    markers = [match.start() for match in re.finditer(rb"\xff[\xc0-\xfe]", encoded[:700])] or [0]
    marker = chance.choice(markers)
    match chance.choice(WAYS):
        case "cut":
            del damaged[position:]
        case "end":
            del damaged[-chance.randrange(1, 40) :]
        case "bit":
            damaged[position] ^= 1 << chance.randrange(8)
        case "bits":
            for _ in range(chance.randrange(2, 20)):
                damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
        case "byte":
            damaged[position] = chance.choice((0, 255, chance.randrange(256)))
        case "zeros":
            end = chance.choice((len(damaged), position + chance.randrange(200)))
            damaged[position:end] = bytes(len(damaged[position:end]))
        case "insert":
            damaged[position:position] = chance.randbytes(chance.randrange(1, 30))
        case "remove":
            del damaged[position : position + chance.randrange(1, 60)]
        case "splice":
            other = chance.choice(others)
            damaged[position:] = other[chance.randrange(len(other)) :]
        case "segment":
            odd = (b"\xff\xd0", b"\xff\x01", b"\xff\xd8", b"\xff", make_segment(0xE1, b"Exif\0\0" + chance.randbytes(20)))
            more = (
                make_segment(0xEE, b"Adobe\0d\0\0\0\0" + bytes([chance.randrange(4)])),
                make_segment(0xDD, bytes([0, chance.randrange(4)])),
            )
            damaged[marker:marker] = chance.choice(odd + more)
        case "again":
            damaged[marker:marker] = encoded[chance.choice(markers) :][: chance.randrange(4, 100)]
        case "marker":
            damaged[marker + 1 : marker + 2] = bytes([chance.choice((0xC0, 0xC1, 0xC2, 0xC4, 0xDB, 0xDD, 0xE1, chance.randrange(256)))])
        case "after":
            damaged += chance.choice((bytes(100), chance.randbytes(200), b"\xff", chance.choice(others)))
    return bytes(damaged) or b"\0"
