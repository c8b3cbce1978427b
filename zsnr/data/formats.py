"""Encoded images: format, size, orientation, and limits that are checked before decoding."""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib import import_module
from typing import Any

from zsnr.data.colors import ignore_profile

MAX_PIXELS = 64_000_000
"""Default maximum of pixels of one image, and of all images that the threads of a process decode
at once."""

_KINDS = {  # Pillow's names of formats and modules; other formats are rare, or start programs
    "JPEG": "Jpeg",
    "PNG": "Png",
    "WEBP": "WebP",
    "GIF": "Gif",
    "BMP": "Bmp",
    "TIFF": "Tiff",
    "AVIF": "Avif",
    "JPEG2000": "Jpeg2K",
    "PPM": "Ppm",
    "QOI": "Qoi",
    "SGI": "Sgi",
    "PSD": "Psd",
    "PCX": "Pcx",
    "TGA": "Tga",
}
_MAX_SCANS = 300  # of a JPEG; encoders write about ten, and each covers the whole image
_SCANS_AT_LIMIT = 50  # maximum for a JPEG of `MAX_PIXELS`
_MAX_SLOW_PIXELS = 2_000_000  # for decoders written in Python, at 2 to 6 s per million pixels
_MAX_JPEG2000_PIXELS = 20_000_000  # at 0.3 s and 12 MB per million pixels
_MAX_TEXT_BYTES = 1 << 20  # limit of Pillow for a PNG's texts, and for its color profile


class HeaderCut(ValueError):  # noqa: N818 - not an error yet: the reader then reads more bytes
    """The bytes end within the image's header; more of the file may tell its size."""


def image_size(data: bytes, max_pixels: int | None = None) -> tuple[int, int]:
    """Read an image's size, after applying its EXIF orientation, without decoding it.

    Args:
        data: A JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF, JPEG 2000, PPM, QOI, SGI, PSD, PCX or TGA
            file, or its first bytes.
        max_pixels: Refuse larger images. None = no limit.

    Returns:
        Height and width, in pixels.

    Raises:
        HeaderCut: `data` ends within the header. A WebP file with metadata must be complete,
            because its orientation is stored at the end.
        ValueError: The image is not readable, or too large.
    """
    size = _webp_size(data)
    if size is None:
        image = open_image(data, max_pixels)
        turned = orientation_of(image) >= 5
        size = image.size[::-1] if turned else image.size
    else:
        _check_pixels(size, max_pixels)
    width, height = size
    return height, width


def open_image(data: bytes, max_pixels: int | None) -> Any:
    """Read the header into a PIL image whose pixels are still encoded.

    The decoders are called by name: Image.open would warn about large images, or refuse them,
    before `max_pixels` is checked, and it supports formats that start other programs.
    """
    if not data:
        raise ValueError("the image is empty (0 bytes).")
    decoder = _decoder(data)
    if decoder is None:
        kind = HeaderCut if len(data) < 16 else ValueError
        raise kind(
            "not a readable image: wanted a JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF, JPEG 2000, "
            "PPM, QOI, SGI, PSD, PCX or TGA file."
        )
    canvas = _webp_canvas(data)
    if canvas is not None:  # its decoder allocates the whole image immediately
        _check_pixels(canvas, max_pixels)
    stream = io.BytesIO(_without_text(data) if data.startswith(b"\x89PNG") else data)
    try:
        with readable():
            image = decoder(stream)
    except ValueError as error:
        if stream.tell() >= len(stream.getbuffer()):
            raise HeaderCut(*error.args) from error
        raise
    _check_pixels(image.size, max_pixels)
    with readable():
        _check_levels(image)
    return image


def _decoder(data: bytes) -> Any:
    """Find the decoder for a file's first bytes; None = the format is not supported."""
    for decoder, accepts in _decoders():
        answer = accepts(data[:18])
        if isinstance(answer, str):  # this Pillow was built without it
            raise ValueError(f"not a readable image: {answer}.")
        if answer:
            return decoder
    return None


@lru_cache(maxsize=1)
def _decoders() -> list[tuple[Any, Callable[[bytes], bool | str]]]:
    from PIL import Image

    decoders = []
    for kind, module in _KINDS.items():
        plugin = import_module(f"PIL.{module}ImagePlugin")
        decoder, accepts = Image.OPEN[kind]
        if kind == "JPEG":  # not the one that counts the frames of several cameras
            decoder = plugin.JpegImageFile
        decoders.append((decoder, accepts or _is_tga))
    return decoders


def _is_tga(head: bytes) -> bool:
    """Whether these are the first 18 bytes of a TGA file, which has no signature."""
    return (
        len(head) >= 18
        and head[1] in (0, 1)
        and head[2] in (1, 2, 3, 9, 10, 11)
        and head[16] in (8, 16, 24, 32)
        and not head[17] & 0xC0
    )


def _without_text(data: bytes) -> bytes:
    """Remove large texts and profiles from a PNG, for which Pillow would refuse the image.

    Small texts stay, because some programs store the orientation there.
    """
    pieces, start, position, text_bytes_left = [], 0, 8, _MAX_TEXT_BYTES // 2
    while position + 8 <= len(data):
        end = position + 12 + int.from_bytes(data[position : position + 4], "big")
        name = data[position + 4 : position + 8]
        if name in (b"tEXt", b"zTXt", b"iTXt", b"iCCP"):
            content = data[position + 8 : end - 4]
            keyword, _, value = content.partition(b"\0")
            packed = name != b"tEXt" and not (name == b"iTXt" and value[:1] == b"\0")
            size = _inflated(value[1:]) if packed and name != b"iTXt" else len(content)
            if name == b"iCCP":
                drop = size >= _MAX_TEXT_BYTES
                if drop:
                    ignore_profile("it is too large")
            else:
                text_bytes_left -= size + len(keyword)
                drop = text_bytes_left < 0 or (packed and name == b"iTXt")
            if drop:
                pieces.append(data[start:position])
                start = end
        position = end
    return b"".join([*pieces, data[start:]]) if pieces else data


def _inflated(data: bytes) -> int:
    """Count the bytes that zlib unpacks, up to `_MAX_TEXT_BYTES`."""
    try:
        return len(zlib.decompressobj().decompress(data, _MAX_TEXT_BYTES))
    except zlib.error:
        return 0  # Pillow ignores it


_MARKER = re.compile(rb"\xff+([^\x00\xd0-\xd7\xff])")  # within the coefficients of a scan


def check_scans(data: bytes, pixels: int) -> None:
    """Refuse a JPEG with so many scans that decoding would take minutes."""
    limit = min(_MAX_SCANS, max(_SCANS_AT_LIMIT, _SCANS_AT_LIMIT * MAX_PIXELS // max(1, pixels)))
    if data.count(b"\xff\xda") <= limit:
        return
    position, scans = 2, 0
    while marker := _MARKER.search(data, position):
        kind, position = marker[1][0], marker.end()
        if kind == 0xD9:  # the end; thumbnails and other images are in segments or after it
            return
        scans += kind == 0xDA
        position += int.from_bytes(data[position : position + 2], "big")
        if scans > limit:
            raise ValueError(f"{scans} or more scans: wanted at most {limit} for this size.")


def _check_pixels(size: tuple[int, int], max_pixels: int | None) -> None:
    width, height = size
    if max_pixels is not None and width * height > max_pixels:
        raise ValueError(
            f"{width} x {height} pixels: wanted at most {max_pixels} (data.pixels.max_pixels)."
        )


def _check_levels(image: Any) -> None:
    """Refuse levels of unknown range, and images that take minutes to decode."""
    from PIL import Image

    tags = getattr(image, "tag_v2", {})
    if image.mode == "F" or (image.mode == "I" and 32 in tags.get(258, ())):
        raise ValueError("wanted levels of 8 or 16 bits.")
    limit = _MAX_JPEG2000_PIXELS if image.format == "JPEG2000" else None
    if any(tile.codec_name in Image.DECODERS for tile in image.tile):
        limit = _MAX_SLOW_PIXELS
    if limit is not None and image.width * image.height > limit:
        raise ValueError(
            f"{image.width} x {image.height} pixels: wanted at most {limit} in a {image.format} "
            "file of this encoding, which is slow to decode."
        )


def orientation_of(image: Any) -> int:
    """Return the EXIF orientation, 1 to 8; 1 if it is missing or unreadable."""
    from PIL import Image

    if image.format == "TIFF":  # Pillow rotates it by itself
        return 1
    try:
        # The base class's method: PNG's override decodes the image to look for EXIF after it.
        orientation = Image.Image.getexif(image).get(0x0112)
    except Exception:  # damaged metadata do not make the pixels unreadable
        return 1
    return orientation if orientation in range(1, 9) else 1


def _webp_canvas(data: bytes) -> tuple[int, int] | None:
    """Read the stored width and height of a WebP file; None = not a WebP file, or truncated."""
    if len(data) < 30 or data[:4] != b"RIFF" or data[8:12] != b"WEBP":
        return None
    kind = data[12:16]
    if kind == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":
        sides = int.from_bytes(data[26:28], "little"), int.from_bytes(data[28:30], "little")
        width, height = sides[0] & 0x3FFF, sides[1] & 0x3FFF
    elif kind == b"VP8L" and data[20] == 0x2F:
        bits = int.from_bytes(data[21:25], "little")
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    elif kind == b"VP8X":
        width = int.from_bytes(data[24:27], "little") + 1
        height = int.from_bytes(data[27:30], "little") + 1
    else:
        return None
    return (width, height) if width and height else None


def _webp_size(data: bytes) -> tuple[int, int] | None:
    """Read the size of a WebP file without metadata, which may rotate it; None = as above."""
    with_metadata = data[12:16] == b"VP8X" and data[20:21] > b"" and data[20] & 0b1100
    return None if with_metadata else _webp_canvas(data)


@contextmanager
def readable() -> Iterator[None]:
    """Convert any exception of Pillow for damaged bytes to a ValueError of one line.

    Failures of the machine (memory, disk, open files) are raised unchanged.
    """
    try:
        yield
    except (MemoryError, ImportError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"not a readable image: {reason}") from error
