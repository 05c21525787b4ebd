"""`decode`: the right pixels of every kind of file, and a clear error for all the rest."""

from __future__ import annotations

import contextlib
import os
import struct
import subprocess
import sys
import threading
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, ImageOps, TiffImagePlugin

from fruits_dask.decode import decode, thumbnail
from fruits_dask.errors import (
    ConfigError,
    DecodeError,
    EmptyObjectError,
    NotAnImageError,
    PixelBombError,
    TruncatedImageError,
)
from fruits_dask.records import Pixels

pytestmark = pytest.mark.filterwarnings("error")

SHARED = Path(os.environ.get("FRUITS_SHARED", Path(__file__).resolve().parents[2] / "shared"))
PHOTOS_PER_SET = 32
ORIENTATION = 0x0112
WHITE = (255, 255, 255)

# What the eight values of the EXIF orientation mean, without Pillow: how to store a picture so that
# a reader who obeys shows it upright (CIPA DC-008, section 4.6.5.1: where row 0 and column 0 are).
SHOW: dict[int, Callable[[Pixels], Pixels]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


# ---------------------------------------------------------------- files


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    """Save with Pillow."""
    stream = BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def noise(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Make an image that no shortcut can decode to the same pixels by luck."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def chunk(name: bytes, body: bytes) -> bytes:
    """Write one chunk of a PNG."""
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(
    size: tuple[int, int], *, n_bits: int, colour: int, row: bytes = b"", before: bytes = b""
) -> bytes:
    """Write a PNG by hand: every row is `row`; `before` holds chunks in front of the pixels."""
    header = struct.pack(">IIBBBBB", *size, n_bits, colour, 0, 0, 0)
    rows = zlib.compress((b"\0" + row) * size[1]) if row else b""
    body = chunk(b"IHDR", header) + before + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def tiff(tags: Mapping[int, int | Sequence[int]], strip: bytes) -> bytes:
    """Write an uncompressed little-endian TIFF by hand; the tags 256 and 257 give its size."""
    directory = TiffImagePlugin.ImageFileDirectory_v2()
    defaults = {259: 1, 262: 1, 273: (0,), 277: 1, 278: tags[257], 279: (len(strip),)}
    for tag, value in {**defaults, **tags}.items():
        directory.tagtype[tag] = 3 if tag in (258, 262, 277, 338, 339) else 4
        directory[tag] = value
    return b"II*\0\x08\0\0\0" + directory.tobytes(8) + strip


def exif(orientation: int) -> bytes:
    """Write an EXIF block that holds an orientation."""
    block = Image.Exif()
    block[ORIENTATION] = orientation
    return block.tobytes()


def colours(data: bytes, **options: float) -> list[tuple[int, ...]]:
    """List the distinct colours of a decoded file."""
    pixels = decode(data, image_px=4, **options)
    assert pixels.shape == (4, 4, 3)
    assert pixels.dtype == np.uint8
    return sorted({tuple(map(int, pixel)) for row in pixels for pixel in row})


def is_near(data: bytes, expected: Sequence[int], tolerance: int) -> bool:
    """Tell whether all pixels of a lossy file have one colour."""
    pixels = decode(data, image_px=4).astype(int)
    return bool(np.abs(pixels - np.array(expected)).max() <= tolerance)


def plain_pillow(data: bytes, image_px: int) -> Pixels:
    """Do it as a notebook would: open, turn, convert, resize."""
    image: Image.Image = Image.open(BytesIO(data))
    image = ImageOps.exif_transpose(image).convert("RGB")
    return np.asarray(image.resize((image_px, image_px), Image.Resampling.BILINEAR))


# ---------------------------------------------------------------- the same pixels as Keras


ORDINARY = {
    "jpeg": encode(noise(100, 100), "JPEG"),
    "jpeg-444": encode(noise(61, 33), "JPEG", quality=95, subsampling=0),
    "jpeg-progressive": encode(noise(300, 211), "JPEG", progressive=True),
    "jpeg-gray": encode(noise(50, 70, "L"), "JPEG"),
    "jpeg-cmyk": encode(noise(40, 30, "CMYK"), "JPEG"),
    "jpeg-turned": encode(noise(90, 40), "JPEG", exif=exif(6)),
    "png": encode(noise(37, 91), "PNG"),
    "png-gray": encode(noise(37, 91, "L"), "PNG"),
    "png-1bit": encode(noise(37, 91, "1"), "PNG"),
    "png-palette": encode(noise(37, 91).quantize(60), "PNG"),
    "png-exif": encode(noise(20, 31), "PNG", exif=exif(5)),
    "webp": encode(noise(64, 30), "WEBP"),
    "webp-exif": encode(noise(64, 30), "WEBP", exif=exif(8)),
    "bmp": encode(noise(33, 44), "BMP"),
    "bmp-palette": encode(noise(33, 44).quantize(9), "BMP"),
    "tiff": encode(noise(33, 44), "TIFF"),
    "tiff-lzw": encode(noise(33, 44), "TIFF", compression="tiff_lzw"),
    "tiff-jpeg": encode(noise(33, 44), "TIFF", compression="jpeg"),
    "tiff-turned": encode(noise(33, 44), "TIFF", tiffinfo={ORIENTATION: 8}),
}


@pytest.mark.parametrize("image_px", [1, 32, 224])
@pytest.mark.parametrize("name", ORDINARY)
def test_pixels_equal_plain_pillow(name: str, image_px: int) -> None:
    found = decode(ORDINARY[name], image_px=image_px)
    np.testing.assert_array_equal(found, plain_pillow(ORDINARY[name], image_px))


def photos() -> list[Path]:
    """Spread `PHOTOS_PER_SET` photos over each of the two real sets."""
    chosen = []
    for name in ("fruits360", "grocery"):
        paths = sorted((SHARED / "data" / name).glob("*/*/*.jpg"))
        chosen += paths[:: max(1, len(paths) // PHOTOS_PER_SET)][:PHOTOS_PER_SET]
    return chosen


@pytest.mark.slow
def test_pixels_equal_keras_for_real_photos() -> None:
    paths = photos()
    if not paths:
        pytest.skip(f"no photos: {SHARED / 'data'} is absent; set FRUITS_SHARED")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of importing TensorFlow
        load_img = import_module("keras.utils").load_img
    assert len(paths) == 2 * PHOTOS_PER_SET
    for path in paths:
        expected = load_img(path, target_size=(224, 224), interpolation="bilinear")
        found = decode(path.read_bytes(), image_px=224)
        np.testing.assert_array_equal(found, np.asarray(expected), err_msg=str(path))


def test_the_caller_cannot_change_the_pixels_by_accident() -> None:
    assert not decode(ORDINARY["png"], image_px=4).flags.writeable


# ---------------------------------------------------------------- modes


MODES = {
    "RGB": (encode(Image.new("RGB", (5, 5), (10, 20, 30)), "PNG"), (10, 20, 30)),
    "L": (encode(Image.new("L", (5, 5), 77), "PNG"), (77, 77, 77)),
    "1": (encode(Image.new("1", (5, 5), 1), "PNG"), WHITE),
    "P": (encode(Image.new("RGB", (5, 5), (9, 8, 7)).quantize(2), "PNG"), (9, 8, 7)),
    # Over white: 200 * 128/255 + 255 * 127/255 = 227.4, and 255 * 127/255 = 127.
    "RGBA": (encode(Image.new("RGBA", (5, 5), (200, 0, 0, 128)), "PNG"), (227, 127, 127)),
    "RGBA-clear": (encode(Image.new("RGBA", (5, 5), (200, 0, 0, 0)), "PNG"), WHITE),
    "RGBA-webp": (
        encode(Image.new("RGBA", (5, 5), (200, 0, 0, 128)), "WEBP", lossless=True),
        (227, 127, 127),
    ),
    "RGBA-bmp": (
        encode(Image.new("RGBA", (5, 5), (10, 20, 30, 255)), "BMP"),
        (10, 20, 30),
    ),
    "LA": (encode(Image.new("LA", (5, 5), (100, 128)), "PNG"), (177, 177, 177)),
    "PA": (
        encode(Image.new("RGBA", (5, 5), (200, 0, 0, 128)).convert("PA"), "TIFF"),
        (227, 127, 127),
    ),
    "La-tiff": (  # premultiplied: 50 is 100 at half opacity
        tiff({256: 5, 257: 5, 258: (8, 8), 277: 2, 338: 1}, bytes((50, 128)) * 25),
        (177, 177, 177),
    ),
    "RGBa-tiff": (  # premultiplied: 100 is 199 at half opacity
        tiff({256: 5, 257: 5, 258: (8,) * 4, 262: 2, 277: 4, 338: 1}, bytes((100, 0, 0, 128)) * 25),
        (227, 127, 127),
    ),
    "P-one-clear-colour": (
        png(
            (4, 4),
            n_bits=8,
            colour=3,
            row=b"\1" * 4,
            before=chunk(b"PLTE", bytes(6)) + chunk(b"tRNS", bytes((255, 0))),
        ),
        WHITE,
    ),
    "P-half-clear-colours": (
        png(
            (4, 4),
            n_bits=8,
            colour=3,
            row=b"\1" * 4,
            before=chunk(b"PLTE", bytes((0, 0, 0, 200, 0, 0))) + chunk(b"tRNS", bytes((9, 128))),
        ),
        (227, 127, 127),
    ),
    "RGB-clear-colour": (
        encode(Image.new("RGB", (5, 5), (1, 2, 3)), "PNG", transparency=(1, 2, 3)),
        WHITE,
    ),
    "RGB-other-clear-colour": (
        encode(Image.new("RGB", (5, 5), (1, 2, 3)), "PNG", transparency=(1, 2, 4)),
        (1, 2, 3),
    ),
    "L-clear-colour": (encode(Image.new("L", (5, 5), 7), "PNG", transparency=7), WHITE),
    "1-clear-colour": (
        png((4, 4), n_bits=1, colour=0, row=b"\0", before=chunk(b"tRNS", b"\0\0")),
        WHITE,
    ),
    "L-4bit-clear-colour": (
        png((4, 4), n_bits=4, colour=0, row=b"\x77\x77", before=chunk(b"tRNS", b"\0\7")),
        WHITE,
    ),
    "L-4bit": (png((4, 4), n_bits=4, colour=0, row=b"\x77\x77"), (119, 119, 119)),
    "16bit-clear-colour": (
        png((4, 4), n_bits=16, colour=0, row=b"\x9c\x40" * 4, before=chunk(b"tRNS", b"\x9c\x40")),
        WHITE,
    ),
    "16bit-RGB-clear-colour": (
        png(
            (4, 4),
            n_bits=16,
            colour=2,
            row=b"\x9c\x40\x01\x02\xff\xff" * 4,
            before=chunk(b"tRNS", b"\x9c\x40\x01\x02\xff\xff"),
        ),
        WHITE,
    ),
    "text-called-transparency": (
        png((4, 4), n_bits=8, colour=2, row=b"abc" * 4, before=chunk(b"tEXt", b"transparency\0x")),
        (97, 98, 99),
    ),
    # 16 bits: 40000 = 0x9c40, the upper byte is 156. Clipping would give 255.
    "I;16-png": (png((4, 4), n_bits=16, colour=0, row=b"\x9c\x40" * 4), (156, 156, 156)),
    "I;16-png-black": (png((4, 4), n_bits=16, colour=0, row=b"\0\xff" * 4), (0, 0, 0)),
    "I;16-png-white": (png((4, 4), n_bits=16, colour=0, row=b"\xff\xff" * 4), WHITE),
    "RGB-16bit-png": (
        png((4, 4), n_bits=16, colour=2, row=b"\x9c\x40\x01\xff\xff\x00" * 4),
        (156, 1, 255),
    ),
    "LA-16bit-png": (
        png((4, 4), n_bits=16, colour=4, row=b"\x64\x00\x80\x00" * 4),
        (177, 177, 177),
    ),
    "RGBA-16bit-png": (
        png((4, 4), n_bits=16, colour=6, row=b"\xc8\x00\x00\x00\x00\x00\x80\x00" * 4),
        (227, 127, 127),
    ),
    "I;16-tiff": (encode(Image.new("I;16", (5, 5), 40000), "TIFF"), (156, 156, 156)),
    "I;16-tiff-lzw": (
        encode(Image.new("I;16", (5, 5), 40000), "TIFF", compression="tiff_lzw"),
        (156, 156, 156),
    ),
    "I;16B-tiff": (encode(Image.new("I;16B", (5, 5), 40000), "TIFF"), (156, 156, 156)),
    "I;12-tiff": (  # two values of 12 bits in three bytes: 0x9c4, the upper 8 bits are 0x9c
        tiff({256: 4, 257: 4, 258: 12}, b"\x9c\x49\xc4" * 8),
        (156, 156, 156),
    ),
    "RGB-16bit-tiff": (
        tiff({256: 4, 257: 4, 258: (16,) * 3, 262: 2, 277: 3}, b"\x40\x9c\xff\x01\x00\xff" * 16),
        (156, 1, 255),
    ),
    # 32 bits and signed: the smallest usual white that holds every value.
    "I-to-255": (encode(Image.new("I", (5, 5), 200), "TIFF"), (200, 200, 200)),
    "I-to-65535": (encode(Image.new("I", (5, 5), 40000), "TIFF"), (156, 156, 156)),
    "I-unsigned": (  # 4294967295 is white, not -1; a constant image has no range of its own
        tiff({256: 4, 257: 4, 258: 32}, b"\xff\xff\xff\xff" * 8 + b"\0" * 32),
        None,
    ),
    "I-signed-16": (
        tiff({256: 4, 257: 4, 258: 16, 339: 2}, struct.pack("<h", 129) * 16),
        (129, 129, 129),
    ),
    "F-to-1": (encode(Image.new("F", (5, 5), 0.2), "TIFF"), (51, 51, 51)),
    "F-to-255": (encode(Image.new("F", (5, 5), 200.4), "TIFF"), (200, 200, 200)),
    "F-to-65535": (encode(Image.new("F", (5, 5), 40000.0), "TIFF"), (156, 156, 156)),
    "F-constant-below-0": (encode(Image.new("F", (5, 5), -3.0), "TIFF"), (0, 0, 0)),
    "F-nan": (encode(Image.new("F", (5, 5), float("nan")), "TIFF"), (0, 0, 0)),
    "F-infinite": (encode(Image.new("F", (5, 5), float("inf")), "TIFF"), WHITE),
    "YCbCr-tiff": (encode(Image.new("YCbCr", (5, 5), (81, 90, 240)), "TIFF"), (238, 14, 13)),
    "CMYK-tiff": (encode(Image.new("CMYK", (5, 5), (0, 255, 255, 0)), "TIFF"), (255, 0, 0)),
    "white-is-zero": (tiff({256: 4, 257: 4, 258: 8, 262: 0}, b"\1" * 16), (254, 254, 254)),
}


@pytest.mark.parametrize("name", [name for name, (_, colour) in MODES.items() if colour])
def test_mode(name: str) -> None:
    data, expected = MODES[name]
    assert colours(data) == [expected]


def test_lab_tiff() -> None:
    # L* = 50.2 without colour: Y = 0.1858 (CIE 15), and sRGB 119 of it (IEC 61966-2-1).
    lab = encode(Image.new("LAB", (5, 5), (128, 128, 128)), "TIFF")
    assert is_near(lab, (119, 119, 119), tolerance=1)


def test_unsigned_32_bits_do_not_wrap() -> None:
    pixels = decode(MODES["I-unsigned"][0], image_px=4)
    assert pixels[:2].min() == np.iinfo(np.uint8).max
    assert pixels[2:].max() == 0


def test_wide_or_negative_values_stretch_to_their_own_range() -> None:
    ramp = np.array([[-1e38, -1e38], [3e38, np.nan]], dtype=np.float32)
    pixels = decode(encode(Image.fromarray(ramp), "TIFF"), image_px=2)
    assert pixels[..., 0].tolist() == [[0, 0], [255, 0]]
    counts = np.array([[-100, 0], [101, 300]], dtype=np.int32)
    pixels = decode(encode(Image.fromarray(counts), "TIFF"), image_px=2)
    assert pixels[..., 0].tolist() == [[0, 64], [128, 255]]


def cmyk_jpeg(stored: tuple[int, int, int, int], *, transform: int) -> bytes:
    """Write a JPEG with four components, stored inverted as Adobe does; 2 says they are YCCK."""
    cmyk = tuple(255 - value for value in stored)
    data = bytearray(encode(Image.new("CMYK", (16, 16), cmyk), "JPEG", quality=100))
    adobe = data.index(b"Adobe")
    assert data[adobe + 11] == 0
    data[adobe + 11] = transform
    return bytes(data)


def test_cmyk_jpeg_is_inverted_as_adobe_writes_it() -> None:
    assert is_near(cmyk_jpeg((255, 20, 20, 255), transform=0), (255, 20, 20), tolerance=2)


def test_ycck_jpeg() -> None:
    # Y, Cb, Cr of pure red; inverted once more by the CMY of YCCK.
    assert is_near(cmyk_jpeg((76, 85, 255, 255), transform=2), (0, 255, 255), tolerance=3)


def test_bmp_of_every_depth() -> None:
    for mode in ("1", "L", "P", "RGB"):
        assert colours(encode(Image.new(mode, (6, 6)), "BMP")) == [(0, 0, 0)]


@pytest.mark.parametrize(
    ("kind", "options"),
    [("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {}), ("TIFF", {"compression": "jpeg"})],
)
def test_first_picture_of_many(kind: str, options: dict[str, object]) -> None:
    first, second = (Image.new("RGB", (16, 16), colour) for colour in ("red", "blue"))
    data = encode(first, kind, save_all=True, append_images=[second], **options)
    with Image.open(BytesIO(data)) as image:
        assert getattr(image, "n_frames", 1) == len([first, second])
    assert is_near(data, (255, 0, 0), tolerance=3)


# ---------------------------------------------------------------- orientation


PICTURE = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [90, 90, 90]]], dtype=np.uint8)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", SHOW)
def test_orientation(orientation: int, kind: str) -> None:
    lossless = {"lossless": True} if kind == "WEBP" else {}
    data = encode(Image.fromarray(PICTURE), kind, exif=exif(orientation), **lossless)
    np.testing.assert_array_equal(decode(data, image_px=2), SHOW[orientation](PICTURE))


@pytest.mark.parametrize("orientation", SHOW)
def test_orientation_of_jpeg(orientation: int) -> None:
    blocks = Image.fromarray(PICTURE.repeat(16, axis=0).repeat(16, axis=1))
    data = encode(blocks, "JPEG", quality=100, subsampling=0, exif=exif(orientation))
    corners = decode(data, image_px=32)[4:32:24, 4:32:24].astype(int)
    assert np.abs(corners - SHOW[orientation](PICTURE)).max() <= 3


@pytest.mark.parametrize("size", [(9, 4), (4, 9)])
@pytest.mark.parametrize("orientation", SHOW)
def test_turn_comes_before_resize(orientation: int, size: tuple[int, int]) -> None:
    data = encode(noise(*size), "PNG", exif=exif(orientation))
    np.testing.assert_array_equal(decode(data, image_px=7), plain_pillow(data, 7))


def test_orientation_in_xmp_when_exif_has_none() -> None:
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="3"/></x:xmpmeta>'
    turned = SHOW[3](PICTURE)
    picture = Image.fromarray(PICTURE)
    webp = encode(picture, "WEBP", lossless=True, xmp=xmp)
    text = chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp)
    plain = encode(picture, "PNG")
    first = plain.index(b"IDAT") - 4
    for data in (webp, plain[:first] + text + plain[first:]):
        np.testing.assert_array_equal(decode(data, image_px=2), turned)
        np.testing.assert_array_equal(plain_pillow(data, 2), turned)


def test_orientation_of_tiff_comes_before_its_xmp() -> None:
    tags = {ORIENTATION: 1, 700: b'<rdf:Description tiff:Orientation="3"/>'}
    data = encode(Image.fromarray(PICTURE), "TIFF", tiffinfo=tags)
    np.testing.assert_array_equal(decode(data, image_px=2), PICTURE)
    np.testing.assert_array_equal(plain_pillow(data, 2), PICTURE)


def test_orientation_as_imagemagick_writes_it_into_png() -> None:
    block = exif(6)
    text = f"\nexif\n{len(block):8}\n{block.hex()}\n".encode()
    plain = encode(Image.fromarray(PICTURE), "PNG")
    first = plain.index(b"IDAT") - 4
    data = plain[:first] + chunk(b"tEXt", b"Raw profile type exif\0" + text) + plain[first:]
    np.testing.assert_array_equal(decode(data, image_px=2), SHOW[6](PICTURE))
    broken = chunk(b"tEXt", b"Raw profile type exif\0" + text.replace(b"45", b"zz"))
    data = plain[:first] + broken + plain[first:]
    np.testing.assert_array_equal(decode(data, image_px=2), PICTURE)


BROKEN_EXIF = {
    "empty": b"Exif\0\0",
    "no header": b"Exif\0\0nonsense",
    "cut in the header": b"Exif\0\0II*\0",
    "directory far away": b"Exif\0\0II*\0\xff\xff\xff\x7f",
    "cut in the directory": b"Exif\0\0II*\0\x08\0\0\0\x05\0",
    "value far away": b"Exif\0\0II*\0\x08\0\0\0\1\0\x0e\1\2\0\x40\0\0\0\xff\xff\0\0\0\0\0\0",
    "no such orientation": exif(0),
    "orientation 99": exif(99),
}


@pytest.mark.parametrize("name", BROKEN_EXIF)
def test_broken_exif_counts_as_none(name: str) -> None:
    picture = Image.fromarray(PICTURE)
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True})):
        data = encode(picture, kind, exif=BROKEN_EXIF[name], **options)
        assert BROKEN_EXIF[name][6:] in data
        np.testing.assert_array_equal(decode(data, image_px=2), PICTURE)
    jpeg = encode(picture, "JPEG", exif=BROKEN_EXIF[name])
    plain = encode(picture, "JPEG")
    np.testing.assert_array_equal(decode(jpeg, image_px=2), decode(plain, image_px=2))


NUMBERS = {1: "B", 3: "H", 4: "L", 6: "b", 8: "h", 9: "l"}


@st.composite
def exif_blocks(draw: st.DrawFn) -> bytes:
    """Build EXIF of either byte order, with distinct tags in any order, perhaps cut."""
    order = draw(st.sampled_from("<>"))
    tags = draw(st.permutations([0x0100, ORIENTATION, 0x0131]))[: draw(st.integers(0, 3))]
    head = {"<": b"II*\0", ">": b"MM\0*"}[order]
    gap = draw(st.integers(0, 4))
    block = head + struct.pack(order + "L", 8 + gap) + bytes(gap)
    block += struct.pack(order + "H", len(tags))
    for tag in tags:
        number = draw(st.sampled_from(sorted(NUMBERS)))
        value = struct.pack(order + NUMBERS[number], draw(st.integers(0, 9)))
        block += struct.pack(order + "HHL", tag, number, 1) + value.ljust(4, b"\0")
    block += bytes(4)
    keep = draw(st.integers(1, len(block))) if draw(st.booleans()) else len(block)
    return b"Exif\0\0" * draw(st.integers(1, 2)) + block[:keep]


@given(exif_blocks())
@settings(max_examples=400, deadline=None)
def test_exif_is_read_as_pillow_reads_it(block: bytes) -> None:
    data = encode(Image.fromarray(PICTURE), "WEBP", lossless=True, exif=block)
    found = decode(data, image_px=2)
    with warnings.catch_warnings(), Image.open(BytesIO(data)) as image:
        warnings.simplefilter("ignore")
        try:
            orientation = image.getexif().get(ORIENTATION, 1)
        except (SyntaxError, struct.error):  # Pillow fails where `decode` must not
            orientation = 1
    expected = SHOW.get(orientation, SHOW[1])(PICTURE)
    np.testing.assert_array_equal(found, expected)


# ---------------------------------------------------------------- shapes


@pytest.mark.parametrize("size", [(1, 1), (1, 60000), (60000, 1), (2, 9)])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "TIFF"])
def test_narrow_images(kind: str, size: tuple[int, int]) -> None:
    assert is_near(encode(Image.new("RGB", size, (9, 99, 199)), kind), (9, 99, 199), tolerance=2)


@pytest.mark.parametrize("image_px", [0, -1])
def test_side_below_one_is_the_callers_mistake(image_px: int) -> None:
    with pytest.raises(ConfigError, match="image_px"):
        decode(ORDINARY["png"], image_px=image_px)


# ---------------------------------------------------------------- files that are no usable image


def test_empty() -> None:
    with pytest.raises(EmptyObjectError, match=r"0 bytes.*copy it again"):
        decode(b"", image_px=4)


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (encode(Image.new("P", (3, 3)), "GIF"), "a GIF image"),
        (encode(Image.new("RGB", (3, 3)), "AVIF"), "an AVIF image"),
        (encode(Image.new("RGB", (3, 3)), "JPEG2000"), "a JPEG 2000 image"),
        (encode(Image.new("RGB", (16, 16)), "ICO"), "an icon"),
        (encode(Image.new("RGB", (3, 3)), "PPM"), r"20|38 bytes that begin with b'P6"),
        (b"%PDF-1.7\n", "a PDF"),
        (b"<!DOCTYPE html><html>", "HTML"),
        (b"RIFF\x24\0\0\0WAVEfmt ", "sound"),
        (b"BMW and Volkswagen", "18 bytes that begin with b'BMW and"),
        (b"path,label\n", r"11 bytes that begin with b'path,label"),
        (bytes(100), "100 bytes that begin with"),
    ],
)
def test_other_formats_are_named(data: bytes, found: str) -> None:
    with pytest.raises(NotAnImageError, match=f"found .*{found}.*expected") as caught:
        decode(data, image_px=4)
    assert "JPEG, PNG, WebP, BMP or TIFF" in str(caught.value)


@pytest.mark.parametrize(
    "data",
    [
        ORDINARY["bmp"][:28] + b"\7" + ORDINARY["bmp"][29:],  # 7 bits a pixel
        tiff({256: 4, 257: 4, 258: 7}, bytes(100)),
        ORDINARY["jpeg"].replace(b"\xff\xc0\0\x11\x08", b"\xff\xc0\0\x11\x0c"),  # 12 bits a colour
    ],
    ids=["bmp", "tiff", "jpeg"],
)
def test_unusual_kinds_are_refused_with_what_to_do(data: bytes) -> None:
    with pytest.raises(NotAnImageError, match=r"kind not read here .*; save it as"):
        decode(data, image_px=4)


@pytest.mark.parametrize("keep", [2, 3, 12, 30, 60, 0.5, 0.9])
@pytest.mark.parametrize("name", ["jpeg", "png", "webp", "bmp", "tiff", "tiff-lzw"])
def test_truncated(name: str, keep: float) -> None:
    data = ORDINARY[name]
    part = data[: keep if isinstance(keep, int) else int(len(data) * keep)]
    kind = NotAnImageError if name == "webp" and part in (b"RI", b"RIF") else TruncatedImageError
    with pytest.raises(kind):
        decode(part, image_px=4)


def test_truncated_says_how_much_is_there() -> None:
    data = ORDINARY["jpeg"][:1234]
    with pytest.raises(TruncatedImageError) as caught:
        decode(data, image_px=4)
    assert str(caught.value) == (
        "the file ends too early: only 1,234 bytes of a JPEG of 100x100 px are there; copy it again"
    )
    assert isinstance(caught.value.__cause__, OSError)


def test_damage_to_png_pixels_is_found() -> None:
    data = ORDINARY["png"]
    start, stop = data.index(b"IDAT") + 4, data.index(b"IEND") - 8
    n_refused = 0
    for position in range(start, stop, 97):
        damaged = data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]
        try:
            pixels = decode(damaged, image_px=91)
        except TruncatedImageError:
            n_refused += 1
        else:  # a bit of padding
            np.testing.assert_array_equal(pixels, decode(data, image_px=91))
    assert n_refused >= len(range(start, stop, 97)) - 1


@pytest.mark.parametrize(
    "data",
    [
        png((0, 4), n_bits=8, colour=0, row=b"\0"),
        png((4, 0), n_bits=8, colour=0),
        encode(Image.new("RGB", (4, 4)), "BMP").replace(b"\x04\0\0\0\x04\0\0\0", bytes(8)),
        tiff({256: 0, 257: 4, 258: 8}, b""),
        ORDINARY["jpeg"].replace(b"\0\x64\0\x64\x03", b"\0\x64\0\0\x03"),
    ],
    ids=["png-width", "png-height", "bmp", "tiff", "jpeg"],
)
def test_no_pixels(data: bytes) -> None:
    with pytest.raises(TruncatedImageError, match="no usable width, height"):
        decode(data, image_px=4)


def test_accepting_truncated_images_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(ConfigError, match="LOAD_TRUNCATED_IMAGES"):
        decode(ORDINARY["jpeg"], image_px=4)


@pytest.mark.parametrize("error", [MemoryError, RuntimeError, KeyError, ZeroDivisionError])
def test_every_exception_is_translated(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(Image.Image, "resize", fail)
    with pytest.raises(DecodeError, match="PNG of 37x91 px") as caught:
        decode(ORDINARY["png"], image_px=4)
    assert isinstance(caught.value.__cause__, error)


def test_an_interrupt_is_not_an_image_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "resize", fail)
    with pytest.raises(KeyboardInterrupt):
        decode(ORDINARY["png"], image_px=4)


# ---------------------------------------------------------------- bombs


def webp(form: bytes, head: bytes) -> bytes:
    """Write a WebP that ends after its header."""
    return b"RIFF\xff\0\0\0WEBP" + form + b"\xff\0\0\0" + head + bytes(20)


SIDE = 16000
HUGE = {
    "png": png((SIDE, SIDE), n_bits=8, colour=2),
    "jpeg": ORDINARY["jpeg"].replace(b"\0\x64\0\x64\x03", struct.pack(">HHB", SIDE, SIDE, 3)),
    "bmp": ORDINARY["bmp"][:18] + struct.pack("<II", SIDE, SIDE) + ORDINARY["bmp"][26:],
    "tiff": tiff({256: SIDE, 257: SIDE, 258: 8}, b""),
    "webp-lossy": webp(b"VP8 ", b"\0\0\0\x9d\1\x2a" + struct.pack("<HH", SIDE, SIDE)),
    "webp-lossless": webp(b"VP8L", b"\x2f" + struct.pack("<I", (SIDE - 1) | (SIDE - 1) << 14)),
    "webp-extended": webp(b"VP8X", bytes(4) + (SIDE - 1).to_bytes(3, "little") * 2),
}


@pytest.mark.parametrize("name", HUGE)
def test_pixel_bomb_is_refused_before_decoding(name: str) -> None:
    # There are no such pixels in these files: decoding them would end in another error.
    with pytest.raises(PixelBombError, match=r"16000x16000 px, 256.0 megapixels.*at most 64 "):
        decode(HUGE[name], image_px=4)


@pytest.mark.parametrize("name", ["png", "jpeg", "bmp", "tiff", "webp"])
def test_limit_is_exact(name: str) -> None:
    data = ORDINARY[name]
    with Image.open(BytesIO(data)) as image:
        n_pixels = image.width * image.height
    decode(data, image_px=4, max_megapixels=n_pixels / 1e6)
    with pytest.raises(PixelBombError, match="raise max_megapixels"):
        decode(data, image_px=4, max_megapixels=(n_pixels - 1) / 1e6)


def test_tile_larger_than_the_image() -> None:
    tile = {322: 40000, 323: 40000, 324: 8, 325: 1}
    data = tiff({256: 4, 257: 4, 258: 8, 259: 8, **tile}, b"\0")
    with pytest.raises(PixelBombError, match="TIFF tile has 40000x40000"):
        decode(data, image_px=4)


@pytest.mark.parametrize("name", ["png", "jpeg", "bmp", "tiff", "tiff-lzw", "webp"])
def test_pillows_own_limit_neither_warns_nor_fails(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = decode(ORDINARY[name], image_px=4)
    with Image.open(BytesIO(ORDINARY[name])) as image:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", image.width * image.height * 2 // 3)
    with pytest.raises(Image.DecompressionBombWarning):
        Image.open(BytesIO(ORDINARY[name]))
    np.testing.assert_array_equal(decode(ORDINARY[name], image_px=4), expected)


def test_pillows_hard_limit_is_translated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1)
    for name in ("tiff", "webp"):
        with pytest.raises(PixelBombError, match="more pixels than Pillow agrees to decode"):
            decode(ORDINARY[name], image_px=4)
    for name in ("png", "jpeg", "bmp"):
        decode(ORDINARY[name], image_px=4)


@pytest.mark.parametrize("name", [b"zTXt", b"iCCP"])
def test_packed_text_or_profile_bomb(name: bytes) -> None:
    packed = chunk(name, b"name\0\0" + zlib.compress(bytes(3_000_000)))
    data = png((4, 4), n_bits=8, colour=0, row=bytes(4), before=packed)
    with pytest.raises(PixelBombError, match="unpacks to far more"):
        decode(data, image_px=4)
    harmless = chunk(name, b"name\0\0" + zlib.compress(bytes(3_000)))
    data = png((4, 4), n_bits=8, colour=0, row=bytes(4), before=harmless)
    assert colours(data) == [(0, 0, 0)]


# ---------------------------------------------------------------- warnings, threads, import


WARNS = {
    "jpeg-exif": encode(
        Image.new("RGB", (8, 8)), "JPEG", exif=BROKEN_EXIF["value far away"]
    ).replace(b"\x01\x01\0\0\x01\0\x01\0\0", b"\x01\0\0\0\x01\0\x01\0\0"),
    "apng": png(
        (4, 4), n_bits=8, colour=0, row=bytes(4), before=chunk(b"acTL", struct.pack(">II", 0, 0))
    ),
    "apng-twice": png(
        (4, 4),
        n_bits=8,
        colour=0,
        row=bytes(4),
        before=chunk(b"acTL", struct.pack(">II", 1, 0)) * 2,
    ),
    "tiff-tag": tiff({256: 4, 257: 4, 258: 8, 40000: tuple(range(90))}, bytes(16)).replace(
        struct.pack("<HHL", 40000, 4, 90), struct.pack("<HHL", 40000, 4, 9000)
    ),
}


@pytest.mark.parametrize("name", WARNS)
def test_what_pillow_warns_of_is_read_in_silence(name: str) -> None:
    message = r"Invalid APNG|corrupt EXIF|larger than file|Truncated File Read"
    with pytest.warns(UserWarning, match=message), Image.open(BytesIO(WARNS[name])) as image:
        image.getexif()  # so Pillow alone does warn of this file
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert colours(WARNS[name]) == [(0, 0, 0)]
    assert not caught


def test_palette_transparency_does_not_warn() -> None:
    data = MODES["P-half-clear-colours"][0]
    with pytest.warns(UserWarning, match="Transparency"), Image.open(BytesIO(data)) as image:
        image.convert("RGB")
    assert colours(data) == [(227, 127, 127)]


def test_threads_leave_the_warning_filters_alone() -> None:
    filters = list(warnings.filters)
    files = [*WARNS.values(), ORDINARY["jpeg-turned"], ORDINARY["tiff-turned"]] * 30
    expected = [decode(data, image_px=4) for data in files]
    barrier = threading.Barrier(8)
    with ThreadPoolExecutor(8, initializer=barrier.wait) as pool:
        found = list(pool.map(lambda data: decode(data, image_px=4), files))
    np.testing.assert_array_equal(found, expected)
    assert list(warnings.filters) == filters


def test_import_changes_nothing_and_needs_no_keras() -> None:
    program = """
import sys, warnings
import numpy  # sets filters of its own
from PIL import Image, ImageFile
before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters)
import fruits_dask.decode
assert before == (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters))
print(sorted({"keras", "tensorflow", "cv2", "dask"} & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr


# ---------------------------------------------------------------- any bytes


SAMPLES = [
    *(ORDINARY[name] for name in ORDINARY if name != "jpeg-progressive"),
    *(data for data, _ in MODES.values()),
    *WARNS.values(),
    encode(noise(12, 9), "PNG", save_all=True, append_images=[noise(12, 9, seed=1)]),
    encode(noise(12, 9), "WEBP", save_all=True, append_images=[noise(12, 9, seed=1)]),
]


def assert_pixels_or_decode_error(data: bytes) -> None:
    """Accept nothing else."""
    with contextlib.suppress(DecodeError):
        pixels = decode(data, image_px=3, max_megapixels=1)
        assert pixels.shape == (3, 3, 3)
        assert pixels.dtype == np.uint8


@given(
    st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"BM", b"II*\0", b"MM\0*"]),
    st.binary(max_size=200),
)
@settings(max_examples=300, deadline=None)
def test_random_bytes(head: bytes, tail: bytes) -> None:
    assert_pixels_or_decode_error(head + tail)


@given(st.data())
@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.large_base_example])
def test_mutated_and_truncated_files(draw: st.DataObject) -> None:
    data = bytearray(draw.draw(st.sampled_from(SAMPLES)))
    # Three in four changes hit the headers, where the decisions are.
    last = draw.draw(st.sampled_from([40, 120, 250, len(data)]))
    position = st.integers(0, min(last, len(data)) - 1)
    for at, value in draw.draw(st.lists(st.tuples(position, st.integers(0, 255)), max_size=6)):
        data[at] = value
    if draw.draw(st.booleans()):
        data = data[: draw.draw(position)]
    assert_pixels_or_decode_error(bytes(data))


# ---------------------------------------------------------------- thumbnail


def test_thumbnail_is_a_small_jpeg_of_the_same_picture() -> None:
    pixels = np.asarray(Image.fromarray(PICTURE).resize((224, 224), Image.Resampling.NEAREST))
    with Image.open(BytesIO(thumbnail(pixels))) as image:
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (48, 48))
        corners = np.asarray(image)[8:48:32, 8:48:32].astype(int)
    assert np.abs(corners - PICTURE).max() <= 12


@pytest.mark.parametrize(("side_px", "expected"), [(16, 16), (500, 30)])
def test_thumbnail_has_the_side_asked_for_and_never_grows(side_px: int, expected: int) -> None:
    pixels = decode(ORDINARY["jpeg"], image_px=30)
    with Image.open(BytesIO(thumbnail(pixels, side_px=side_px))) as image:
        assert image.size == (expected, expected)


def test_thumbnail_of_a_photo_stays_small() -> None:
    pixels = decode(ORDINARY["jpeg"], image_px=224)
    assert len(thumbnail(pixels)) < 4000
    assert thumbnail(pixels) == thumbnail(pixels)
