"""Bytes of an image file to a square of 8-bit RGB pixels.

The pixels are those of `keras.utils.load_img` after the EXIF turn, bit for bit: Pillow decodes,
converts to RGB at full size, turns, and shrinks last. JPEG draft mode, `reducing_gap` and OpenCV
are faster and give other pixels, so none of them is used.

Pillow's format classes are called directly instead of through `PIL.Image.open`. No bytes can reach
a decoder that is not named here, the pixel limit is this module's own (the check in `Image.open`
warns at 89 million pixels by a setting that belongs to the whole process), and it saves time.

Pillow tells of minor defects by `warnings.warn`, which any ``-W error`` turns into a failed image.
Warnings cannot be silenced for one thread before Python 3.14, so the formats that come by the
million are read in a way that never reaches such a line: EXIF is read here, not by Pillow. What is
left, TIFF and animated PNG, is read with warnings off, one at a time in a process (`_silence`).
"""

from __future__ import annotations

import re
import struct
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import (
    BmpImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from fruits_dask.errors import (
    ConfigError,
    DecodeError,
    EmptyObjectError,
    NotAnImageError,
    PixelBombError,
    TruncatedImageError,
)
from fruits_dask.records import Pixels

_EXPECTED = "a JPEG, PNG, WebP, BMP or TIFF image was expected"
_SAVE_AGAIN = "save it as an 8-bit JPEG or PNG"
_COPY_AGAIN = "copy it again"

_SIGNATURES = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),
    (b"MM\0+", "TIFF"),
)
_FOREIGN = (
    (0, b"GIF8", "a GIF image"),
    (0, b"8BPS", "a Photoshop image"),
    (0, b"\0\0\1\0", "an icon (ICO)"),
    (0, b"\0\0\0\x0cjP  ", "a JPEG 2000 image"),
    (0, b"\xff\x0a", "a JPEG XL image"),
    (0, b"\0\0\0\x0cJXL ", "a JPEG XL image"),
    (4, b"ftypavi", "an AVIF image"),
    (4, b"ftyphei", "a HEIC image"),
    (4, b"ftypmif1", "a HEIF image"),
    (4, b"ftyp", "a video or HEIF file"),
    (0, b"RIFF", "a RIFF file (sound or video)"),
    (0, b"%PDF", "a PDF document"),
    (0, b"PK\3\4", "a ZIP archive"),
    (0, b"\x1f\x8b", "a gzip archive"),
    (0, b"PAR1", "a Parquet file"),
    (0, b"<", "HTML, XML or SVG text"),
    (0, b"{", "JSON text"),
)
_MIN_SIGNATURE_BYTES = 2
_MAX_BMP_HEADER_BYTES = 124

# Words of Pillow's messages, which are all that tells the cases apart.
_BOMB_WORDS = ("MAX_TEXT_CHUNK", "MAX_TEXT_MEMORY")
_UNSUPPORTED_WORDS = ("nsupported", "cannot handle", "unknown pixel mode", "not yet supported")
_CUT_WORDS = ("truncated", "Truncated", "chunk b''")
_NO_SIZE = "not identified by this driver"

_ORIENTATION_TAG = 0x0112
_IFD_ENTRY_BYTES = 12
# The second of each pair is wrong, and known to exist.
_EXIF_ORDERS = {b"II*\0": "<", b"II\0*": "<", b"MM\0*": ">", b"MM*\0": ">"}
# SHORT, which is right, and what Pillow takes for a number too: LONG, SBYTE, SSHORT, SLONG.
_EXIF_NUMBERS = {3: "H", 4: "L", 6: "b", 8: "h", 9: "l"}
_EXIF_PREFIX = re.compile(rb"^(?:Exif\0\0){1,2}")
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_BYTE_BITS = 8
_SHORT_BITS = 16
_USUAL_WHITES = {"I": (255.0, 65535.0), "F": (1.0, 255.0, 65535.0)}

_WARNINGS_LOCK = threading.Lock()
_NOTHING = nullcontext()


def decode(data: bytes, *, image_px: int, max_megapixels: float = 64.0) -> Pixels:
    """Decode one image file into a square of RGB pixels.

    Parameters
    ----------
    data : bytes
        The whole file: JPEG, PNG, WebP, BMP or TIFF, whatever its name says.
    image_px : int
        Side of the square to return, in pixels.
    max_megapixels : float, default 64.0
        Largest image to decode, in million pixels, by the size in its header. Decoding takes at
        most about 24 bytes of memory a pixel (measured: JPEG 4 to 8, WebP 16, 32-bit TIFF 22).

    Returns
    -------
    Pixels
        ``(image_px, image_px, 3) uint8``, RGB, read-only. The whole image, squeezed to the square
        by Pillow's bilinear filter as `keras.utils.load_img` does, after the EXIF turn.

    Raises
    ------
    EmptyObjectError
        There are no bytes.
    NotAnImageError
        The bytes are of no format that is read here, or of an unusual kind of one.
    TruncatedImageError
        The file ends too early, or is damaged inside. A JPEG has no checksum: damage that still
        decodes cannot be told from a picture.
    PixelBombError
        The image, or what is packed inside it, is larger than allowed.
    DecodeError
        The memory does not suffice; also the root of the errors above, and no other is raised for
        any bytes.
    ConfigError
        `image_px` is below 1, or Pillow was told to accept truncated images.

    Notes
    -----
    Animations and multi-page files give their first picture. Transparency is laid over white. Of
    16 bits for each colour, and of 12-bit gray, the upper 8 are kept, as Pillow does for RGB.
    32-bit and signed gray (Pillow's modes I and F) does not say which value is white: the smallest
    of 1 (F only), 255 and 65535 that no value exceeds is taken for white; with a larger or a
    negative value, the image's own minimum becomes black and its maximum white. NaN is black.

    TIFF and animated PNG are decoded one at a time in a process, because warnings have to be off.
    """
    _check_request(image_px)
    kind = _recognise(data)
    image: ImageFile.ImageFile | None = None
    try:
        with _silence_if_needed(kind, data):
            image = _open(kind, data, max_megapixels)
            image.load()
        upright = _turn(_to_rgb(image, data), kind, image.info)
        square = upright.resize((image_px, image_px), Image.Resampling.BILINEAR)
        return np.asarray(square)
    except DecodeError:
        raise
    except Exception as exc:  # Pillow raises nearly every builtin for hostile bytes
        raise _explain(exc, data, kind, image) from exc


def thumbnail(pixels: Pixels, *, side_px: int = 48) -> bytes:
    """Encode square pixels as a small JPEG, for the report.

    Parameters
    ----------
    pixels : Pixels
        ``(n, n, 3) uint8``, RGB, as `decode` returns them.
    side_px : int, default 48
        Side of the thumbnail in pixels; it never becomes larger than `pixels` is.

    Returns
    -------
    bytes
        A JPEG file.
    """
    side = min(side_px, len(pixels))
    quick = Image.Resampling.HAMMING  # of the filters that leave no jagged edges
    image = Image.fromarray(pixels).resize((side, side), quick, reducing_gap=2.0)
    stream = BytesIO()
    image.save(stream, "JPEG", quality=80, optimize=True)
    return stream.getvalue()


def _check_request(image_px: int) -> None:
    """Refuse settings under which no image, or a damaged one, would pass."""
    if image_px < 1:
        raise ConfigError(f"image_px is {image_px}, but must be at least 1")
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        # Set by another library, for the whole process: half an image would pass as a whole one.
        raise ConfigError(
            "PIL.ImageFile.LOAD_TRUNCATED_IMAGES is True in this process, so damaged images would "
            "pass unnoticed; find who sets it, and set it to False"
        )


def _recognise(data: bytes) -> str:
    """Name the format by its first bytes; an error when it is not one that is read here."""
    for signature, kind in _SIGNATURES:
        if data.startswith(signature):
            return kind
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "WebP"
    if data.startswith(b"BM") and int.from_bytes(data[14:18], "little") <= _MAX_BMP_HEADER_BYTES:
        return "BMP"  # two letters alone also begin a text
    raise _unrecognised(data)


def _unrecognised(data: bytes) -> DecodeError:
    """Say what the bytes are instead of an image, as far as that is cheap to tell."""
    if not data:
        return EmptyObjectError(f"the file is empty (0 bytes), but {_EXPECTED}; {_COPY_AGAIN}")
    if len(data) >= _MIN_SIGNATURE_BYTES:
        for signature, kind in _SIGNATURES:
            if signature.startswith(data):
                return TruncatedImageError(
                    f"the file ends too early: only the first {len(data)} bytes of a {kind} are "
                    f"there; {_COPY_AGAIN}"
                )
    for offset, mark, name in _FOREIGN:
        if data.startswith(mark, offset):
            return NotAnImageError(f"found {name}, but {_EXPECTED}; convert or remove it")
    return NotAnImageError(
        f"found {len(data):,} bytes that begin with {data[:12]!r}, but {_EXPECTED}; remove it"
    )


class _QuietJpegFile(JpegImagePlugin.JpegImageFile):
    """A JPEG whose EXIF block is not parsed for the resolution (Pillow 10.3 to 13).

    Pillow parses it while opening and warns when it is broken; nobody here asks for the resolution.
    """

    def _read_dpi_from_exif(self) -> None:
        """Leave it."""


_Info = Mapping[str | tuple[int, int], object]
_Opener = Callable[[BytesIO], ImageFile.ImageFile]
_OPENERS: Mapping[str, _Opener] = {
    "JPEG": _QuietJpegFile,
    "PNG": PngImagePlugin.PngImageFile,
    "WebP": WebPImagePlugin.WebPImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
}


def _open(kind: str, data: bytes, max_megapixels: float) -> ImageFile.ImageFile:
    """Read the header, and refuse an image that is too large before any pixel is decoded."""
    if kind == "WebP":
        # Its class makes room for all pixels while opening.
        _check_size(kind, _webp_size(data), max_megapixels)
    image = _OPENERS[kind](BytesIO(data))
    _check_size(kind, image.size, max_megapixels)
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        _check_size("TIFF tile", _tile_size(image), max_megapixels)
    return image


def _check_size(kind: str, size: tuple[int, int], max_megapixels: float) -> None:
    width, height = size
    if width * height > max_megapixels * 1e6:
        raise PixelBombError(
            f"the {kind} has {width}x{height} px, {width * height / 1e6:,.1f} megapixels, but at "
            f"most {max_megapixels:g} are decoded; make it smaller, or raise max_megapixels"
        )


def _webp_size(data: bytes) -> tuple[int, int]:
    """Width and height by a WebP header; (0, 0) when there is none, which libwebp refuses later.

    References
    ----------
    RFC 9649, WebP Image Format, sections 2.5 to 2.7.
    """
    form, head = data[12:16], data[20:30]
    if form == b"VP8X":
        return int.from_bytes(head[4:7], "little") + 1, int.from_bytes(head[7:10], "little") + 1
    if form == b"VP8L":
        bits = int.from_bytes(head[1:5], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    width, height = (int.from_bytes(part, "little") & 0x3FFF for part in (head[6:8], head[8:10]))
    return width, height


def _tile_size(image: TiffImagePlugin.TiffImageFile) -> tuple[int, int]:
    """Width and height of a TIFF tile, which may exceed the image and is unpacked as a whole."""
    width: object = image.tag_v2.get(TiffImagePlugin.TILEWIDTH)
    height: object = image.tag_v2.get(TiffImagePlugin.TILELENGTH)
    if isinstance(width, int) and isinstance(height, int):
        return width, height
    return 0, 0


def _silence_if_needed(kind: str, data: bytes) -> AbstractContextManager[None]:
    """Turn warnings off for what may warn, and cost the other images nothing."""
    if kind == "TIFF" or (kind == "PNG" and b"acTL" in data):
        return _silence()
    return _NOTHING


@contextmanager
def _silence() -> Iterator[None]:
    """Ignore warnings, in one thread at a time.

    `warnings.catch_warnings` changes the filters of the whole process before Python 3.14. The lock
    keeps the threads that decode from undoing each other's change; a thread that uses
    `catch_warnings` elsewhere at the same moment may still see warnings ignored.
    """
    with _WARNINGS_LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _to_rgb(image: ImageFile.ImageFile, data: bytes) -> Image.Image:
    """Convert any mode to RGB at full size."""
    if isinstance(image, PngImagePlugin.PngImageFile):
        _mend_transparency(image, n_bits=data[24])
    if image.mode == "F" or image.mode.startswith("I"):
        return _deep_to_rgb(image)
    if image.has_transparency_data:
        return _over_white(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _mend_transparency(image: PngImagePlugin.PngImageFile, *, n_bits: int) -> None:
    """Bring the transparent colour of a PNG to the 8 bits that its pixels were brought to.

    Pillow (13.0) scales pixels of 2, 4 and 16 bits to 8 and leaves this colour as it was. It also
    files a text chunk that is called "transparency" in the same place.
    """
    key: object = image.info.get("transparency")
    if image.mode == "L" and isinstance(key, int) and n_bits < _BYTE_BITS:
        image.info["transparency"] = min(255, key * 255 // (2**n_bits - 1))
    elif image.mode == "RGB" and isinstance(key, tuple) and n_bits > _BYTE_BITS:
        image.info["transparency"] = tuple(value >> _BYTE_BITS for value in key)
    elif isinstance(key, str):
        del image.info["transparency"]


def _over_white(image: Image.Image) -> Image.Image:
    """Lay an image with transparency over a white ground."""
    if image.mode == "La":
        image = image.convert("LA")
    elif image.mode not in ("LA", "RGBA"):
        image = image.convert("RGBA")
    ground = Image.new("RGB", image.size, "white")
    ground.paste(image, (0, 0), image)
    return ground


def _deep_to_rgb(image: ImageFile.ImageFile) -> Image.Image:
    """Scale gray of 12 to 32 bits to 8; Pillow's own conversion would clip at 255."""
    values = np.asarray(image)
    n_bits, signed = _gray_bits(image)
    if image.mode == "I" and n_bits > _SHORT_BITS and not signed:
        values = values.view(np.uint32)
    if image.mode == "F" or n_bits > _SHORT_BITS or signed:
        gray = _stretch(values, _USUAL_WHITES[image.mode])
    else:
        gray = (values >> (n_bits - _BYTE_BITS)).astype(np.uint8)
    key: object = image.info.get("transparency")
    if isinstance(key, int):
        gray[values == key] = 255
    return Image.fromarray(gray).convert("RGB")


def _gray_bits(image: ImageFile.ImageFile) -> tuple[int, bool]:
    """Bits of one gray value as stored, and whether it is signed."""
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return _SHORT_BITS, False
    bits: tuple[int, ...] = image.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE, (_SHORT_BITS,))
    sample_format: tuple[int, ...] = image.tag_v2.get(TiffImagePlugin.SAMPLEFORMAT, (1,))
    return bits[0], sample_format[0] != 1


def _stretch(values: NDArray[np.generic], whites: tuple[float, ...]) -> Pixels:
    """Scale values of an unknown range to 0..255, ``(height, width)`` to the same, uint8."""
    scaled = values.astype(np.float64)
    finite = np.isfinite(scaled)
    black = float(np.min(scaled, where=finite, initial=np.inf))
    peak = float(np.max(scaled, where=finite, initial=-np.inf))
    if black > peak:  # no finite value at all
        black = peak = 0.0
    usual = [white for white in whites if black >= 0 and peak <= white]
    black, white = (0.0, usual[0]) if usual else (black, peak)
    np.nan_to_num(scaled, copy=False, nan=black, posinf=white, neginf=black)
    scaled -= black
    scaled *= 255 / ((white - black) or 1.0)
    return np.rint(scaled, out=scaled).astype(np.uint8)


def _turn(image: Image.Image, kind: str, info: _Info) -> Image.Image:
    """Turn the image as its EXIF or XMP block says; Pillow has already done it for TIFF."""
    if kind == "TIFF":
        return image
    turn = _TURNS.get(_orientation(info))
    return image if turn is None else image.transpose(turn)


def _orientation(info: _Info) -> int:
    """Orientation by EXIF, else by XMP, else 1; a broken block counts as none.

    It follows `PIL.ImageOps.exif_transpose`, which warns or fails for a broken block.
    """
    exif = info.get("exif")
    if exif is None and "Raw profile type exif" in info:
        exif = _raw_profile(info["Raw profile type exif"])
    found = _exif_orientation(exif) if isinstance(exif, bytes) else None
    if found is not None:
        return found
    xmp = info.get("XML:com.adobe.xmp") or info.get("xmp")
    text = xmp.encode() if isinstance(xmp, str) else xmp
    match = _XMP_ORIENTATION.search(text) if isinstance(text, bytes) else None
    return int(match[1]) if match else 1


def _raw_profile(text: object) -> bytes:
    """EXIF as ImageMagick writes it into a PNG: three lines, then hexadecimal."""
    try:
        return bytes.fromhex("".join(str(text).split("\n")[3:]))
    except ValueError:
        return b""


def _exif_orientation(exif: bytes) -> int | None:
    """Value of the orientation tag in the first directory, or None.

    References
    ----------
    TIFF 6.0, section 2; CIPA DC-008 (EXIF 2.3), section 4.5.
    """
    block = _EXIF_PREFIX.sub(b"", exif)
    order = _EXIF_ORDERS.get(block[:4])
    try:
        if order is None:
            return None
        (start,) = struct.unpack_from(order + "L", block, 4)
        (n_entries,) = struct.unpack_from(order + "H", block, start)
        for at in range(start + 2, start + 2 + n_entries * _IFD_ENTRY_BYTES, _IFD_ENTRY_BYTES):
            tag, number, count, value = struct.unpack_from(order + "HHL4s", block, at)
            if tag == _ORIENTATION_TAG and count == 1 and number in _EXIF_NUMBERS:
                return int(struct.unpack_from(order + _EXIF_NUMBERS[number], value)[0])
    except struct.error:  # the block ends too early
        return None
    return None


def _explain(
    exc: Exception, data: bytes, kind: str, image: ImageFile.ImageFile | None
) -> DecodeError:
    """Translate an exception of Pillow into what a person can act on."""
    reason = str(exc) or type(exc).__name__
    if isinstance(exc, Image.DecompressionBombError):
        return PixelBombError(
            f"the {kind} has more pixels than Pillow agrees to decode ({reason}); make it smaller"
        )
    if any(word in reason for word in _BOMB_WORDS):
        return PixelBombError(
            f"the {kind} holds a text or colour profile that unpacks to far more than an image "
            f"needs ({reason}); {_SAVE_AGAIN}"
        )
    if isinstance(exc, MemoryError):
        return DecodeError(f"not enough memory to decode the {_describe(data, kind, image)}")
    if any(word in reason for word in _UNSUPPORTED_WORDS):
        return NotAnImageError(f"found a {kind} of a kind not read here ({reason}); {_SAVE_AGAIN}")
    return _explain_damage(exc, reason, _describe(data, kind, image), has_header=image is not None)


def _explain_damage(
    exc: Exception, reason: str, description: str, *, has_header: bool
) -> TruncatedImageError:
    """Tell a file that was cut from one that is damaged, as far as Pillow knows."""
    if not has_header:
        reason = "no usable width, height or pixel format" if _NO_SIZE in reason else reason
        return TruncatedImageError(
            f"the file ends too early, or its header is damaged: {description} ({reason}); "
            f"{_COPY_AGAIN}"
        )
    if isinstance(exc, struct.error) or any(word in reason for word in _CUT_WORDS):
        return TruncatedImageError(
            f"the file ends too early: only {description} are there; {_COPY_AGAIN}"
        )
    return TruncatedImageError(f"damaged inside: {description} ({reason}); {_COPY_AGAIN}")


def _describe(data: bytes, kind: str, image: ImageFile.ImageFile | None) -> str:
    """Words for the file: how many bytes, of what, of which size."""
    size = f" of {image.width}x{image.height} px" if image is not None else ""
    return f"{len(data):,} bytes of a {kind}{size}"
