"""Encoded pictures to tensors."""

from __future__ import annotations

import io
import os
import re
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor

MAX_PIXELS = 64_000_000
"""Pixels of the largest image that is decoded, unless a caller says otherwise, and of all images
that the threads of a process decode at once."""

_KINDS = {  # Pillow's names of formats and modules; others are rare, or start other programs
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
_MOST_SCANS = 300  # of a JPEG; encoders write about ten, and each passes over the whole image
_SCANS_OF_ALL = 50  # of a JPEG of `MAX_PIXELS`
_MOST_SLOW = 2_000_000  # pixels for a decoder written in Python, at 2 to 6 s a million
_MOST_JPEG2000 = 20_000_000  # pixels, at 0.3 s and 12 MB a million
_MOST_TEXT = 1 << 20  # bytes of a PNG's texts, or of its color profile, that Pillow accepts
_MOST_PROFILE = 4 << 20  # bytes of a color profile
_BAND = 1 << 20  # pixels that are converted at a time


class HeaderCut(ValueError):  # noqa: N818 - a state of the bytes, which the reader mends
    """The bytes end before the picture's header does: more of the file may say its size."""


def image_size(data: bytes, max_pixels: int | None = None) -> tuple[int, int]:
    """Read a picture's size as it is seen, EXIF orientation obeyed, without decoding it.

    Args:
        data: A JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF, JPEG 2000, PPM, QOI, SGI, PSD, PCX or TGA
            file, or its first bytes.
        max_pixels: Refuse larger pictures. None = none is too large.

    Returns:
        Height and width, in pixels.

    Raises:
        HeaderCut: `data` ends within the header. A WebP file with metadata has to be whole: it
            keeps its orientation at the end.
        ValueError: Not a readable picture, or too large a one.
    """
    size = _webp_size(data)
    if size is None:
        image = _open(data, max_pixels)
        turned = _orientation(image) >= 5
        size = image.size[::-1] if turned else image.size
    else:
        _check_pixels(size, max_pixels)
    width, height = size
    return height, width


def decode_image(
    data: bytes,
    height: int,
    width: int,
    *,
    crop: tuple[float, float] = (0.5, 0.5),
    flip: bool = False,
    max_pixels: int = MAX_PIXELS,
    scaled_decoding: bool = True,
) -> Tensor:
    """Decode a picture, scale it until it just covers `height` x `width`, and crop it to that.

    Scaling is bicubic with antialiasing; a picture that needs none keeps its values. The crop lies
    on whole pixels of the decoded picture. EXIF orientation is obeyed, transparent parts become
    white, colors of an embedded ICC profile become those of sRGB, of several frames the first is
    taken. Threads wait for each other where their images have over `MAX_PIXELS` pixels together.

    Args:
        data: As for `image_size`, whole.
        height: Height of the result, in pixels.
        width: Width of the result, in pixels.
        crop: Where the crop lies in the room it has, down and across: (0, 0) is the top left
            corner, (0.5, 0.5) the centre, (1, 1) the bottom right corner.
        flip: Mirror the crop left to right.
        max_pixels: Refuse larger pictures before they are decoded.
        scaled_decoding: Let the JPEG decoder itself halve a picture, up to three times, while it
            still covers the result: quicker, and on photographs about 40 dB from scaling all of it.

    Returns:
        (3, height, width) uint8, RGB.

    Raises:
        ValueError: Not a readable picture, or too large a one.
    """
    image = _open(data, max_pixels)
    if image.format == "JPEG":
        _check_scans(data, image.size[0] * image.size[1])
    orientation = _orientation(image)
    transposed = orientation >= 5
    mirrored, upside_down = orientation in (2, 3, 6, 7), orientation in (3, 4, 7, 8)
    asked = (height, width) if transposed else (width, height)
    stored = image.size  # a progressive JPEG keeps the coefficients of all of it
    with _readable():
        size = _halve(image, asked) if scaled_decoding else image.size
    w, h = size[::-1] if transposed else size
    top, left, crop_h, crop_w = _crop(h, w, height, width, crop)
    if upside_down:  # crop and scale what is stored, then turn the small result
        top = h - crop_h - top
    if mirrored:
        left = w - crop_w - left
    if transposed:
        left, top, crop_w, crop_h = top, left, crop_h, crop_w
    with _readable():
        cost = _cost(image, stored if image.info.get("progressive") else image.size)
    with _UNDER_WAY.room(cost):
        with _readable():
            image.load()
            profile = _Profile(image)
            pixels = _rgb(image, (left, top, left + crop_w, top + crop_h), profile)
        del image
        pixels = profile.finish(_resize(pixels, *asked))
    if transposed:
        pixels = pixels.swapaxes(0, 1)
    if upside_down:
        pixels = pixels[::-1]
    if mirrored != flip:
        pixels = pixels[:, ::-1]
    return torch.from_numpy(np.array(pixels.transpose(2, 0, 1), order="C"))


def to_unit_range(images: Tensor) -> Tensor:
    """Map levels to the range networks work in: x / 127.5 - 1.

    Args:
        images: (B, 3, H, W) uint8.

    Returns:
        (B, 3, H, W) float32 in [-1, 1], on the same device.

    Raises:
        ValueError: Another dtype.
    """
    if images.dtype != torch.uint8:
        raise ValueError(f"images are {images.dtype}: wanted torch.uint8, as decode_image gives.")
    return images.float().div_(127.5).sub_(1)


def size_facts(size: tuple[int, int], height: int, width: int, crop: tuple[float, float]) -> Tensor:
    """Say how `decode_image` cuts a picture, as SDXL's network is told (Conditioning's sizes).

    The crop's offsets are in pixels of the picture as it is scaled, before it is cropped. A
    mirrored picture keeps them: what was cut away is told, not on which side it shows.

    Args:
        size: Height and width of the picture as it is seen.
        height: Of the result, in pixels.
        width: Likewise.
        crop: Where the crop lies, as there.

    Returns:
        Original height and width, crop top and left, target height and width: (6,) int64.
    """
    top, left, _, _ = _crop(*size, height, width, crop)
    scale = _scale(*size, height, width)
    return torch.tensor([*size, round(top * scale), round(left * scale), height, width])


def _scale(h: int, w: int, height: int, width: int) -> float:
    """Say by what a picture of h x w is multiplied to just cover height x width."""
    return max(height / h, width / w)


def _crop(
    h: int, w: int, height: int, width: int, crop: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Place the crop in a picture of h x w, in its own whole pixels: top, left, height, width."""
    scale = _scale(h, w, height, width)
    crop_h, crop_w = min(h, round(height / scale)), min(w, round(width / scale))
    crop_h, crop_w = max(1, crop_h), max(1, crop_w)
    return round((h - crop_h) * crop[0]), round((w - crop_w) * crop[1]), crop_h, crop_w


@contextmanager
def _readable() -> Iterator[None]:
    """Turn whatever Pillow raises at damaged bytes into a ValueError of one line.

    Where the machine fails, by memory, a disk, or open files, the bytes are not to blame.
    """
    try:
        yield
    except (MemoryError, ImportError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"not a readable picture: {reason}") from error


def _open(data: bytes, max_pixels: int | None) -> Any:
    """Read the header into a PIL image whose pixels are still encoded.

    The decoders are called by name: Image.open would warn of large pictures, or refuse them,
    before `max_pixels` is asked, and knows formats that start other programs.
    """
    if not data:
        raise ValueError("the picture is empty (0 bytes).")
    decoder = _decoder(data)
    if decoder is None:
        kind = HeaderCut if len(data) < 16 else ValueError
        raise kind(
            "not a readable picture: wanted a JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF, JPEG 2000, "
            "PPM, QOI, SGI, PSD, PCX or TGA file."
        )
    canvas = _webp_canvas(data)
    if canvas is not None:  # its decoder makes room for the picture at once
        _check_pixels(canvas, max_pixels)
    stream = io.BytesIO(_without_text(data) if data.startswith(b"\x89PNG") else data)
    try:
        with _readable():
            image = decoder(stream)
    except ValueError as error:
        if stream.tell() >= len(stream.getbuffer()):
            raise HeaderCut(*error.args) from error
        raise
    _check_pixels(image.size, max_pixels)
    with _readable():
        _check_levels(image)
    return image


def _decoder(data: bytes) -> Any:
    """Find the class that reads a file, by its first bytes; None = there is none."""
    for decoder, accepts in _decoders():
        answer = accepts(data[:18])
        if isinstance(answer, str):  # this Pillow was built without it
            raise ValueError(f"not a readable picture: {answer}.")
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
    """Leave out of a PNG what Pillow would refuse the image for: much text, a large profile.

    Small texts stay: some programs keep the orientation there.
    """
    pieces, start, at, left = [], 0, 8, _MOST_TEXT // 2
    while at + 8 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        name = data[at + 4 : at + 8]
        if name in (b"tEXt", b"zTXt", b"iTXt", b"iCCP"):
            content = data[at + 8 : end - 4]
            keyword, _, rest = content.partition(b"\0")
            packed = name != b"tEXt" and not (name == b"iTXt" and rest[:1] == b"\0")
            size = _inflated(rest[1:]) if packed and name != b"iTXt" else len(content)
            if name == b"iCCP":
                drop = size >= _MOST_TEXT
                if drop:
                    _ignore_profile("it is too large")
            else:
                left -= size + len(keyword)
                drop = left < 0 or (packed and name == b"iTXt")
            if drop:
                pieces.append(data[start:at])
                start = end
        at = end
    return b"".join([*pieces, data[start:]]) if pieces else data


def _inflated(data: bytes) -> int:
    """Count the bytes that zlib unpacks, up to `_MOST_TEXT`."""
    try:
        return len(zlib.decompressobj().decompress(data, _MOST_TEXT))
    except zlib.error:
        return 0  # Pillow leaves it out


_MARKER = re.compile(rb"\xff+([^\x00\xd0-\xd7\xff])")  # within the coefficients of a scan


def _check_scans(data: bytes, pixels: int) -> None:
    """Refuse a JPEG of so many scans that decoding takes minutes."""
    most = min(_MOST_SCANS, max(_SCANS_OF_ALL, _SCANS_OF_ALL * MAX_PIXELS // max(1, pixels)))
    if data.count(b"\xff\xda") <= most:
        return
    at, scans = 2, 0
    while found := _MARKER.search(data, at):
        kind, at = found[1][0], found.end()
        if kind == 0xD9:  # the end; thumbnails and other images come in segments or behind it
            return
        scans += kind == 0xDA
        at += int.from_bytes(data[at : at + 2], "big")
        if scans > most:
            raise ValueError(f"{scans} or more scans: wanted at most {most} of so many pixels.")


def _check_pixels(size: tuple[int, int], max_pixels: int | None) -> None:
    width, height = size
    if max_pixels is not None and width * height > max_pixels:
        raise ValueError(
            f"{width} x {height} pixels: wanted at most {max_pixels} (data.pixels.max_pixels)."
        )


def _check_levels(image: Any) -> None:
    """Refuse levels whose range nobody says, and images that take minutes to decode."""
    from PIL import Image

    tags = getattr(image, "tag_v2", {})
    if image.mode == "F" or (image.mode == "I" and 32 in tags.get(258, ())):
        raise ValueError("wanted levels of 8 or 16 bits.")
    most = _MOST_JPEG2000 if image.format == "JPEG2000" else None
    if any(tile.codec_name in Image.DECODERS for tile in image.tile):
        most = _MOST_SLOW
    if most is not None and image.width * image.height > most:
        raise ValueError(
            f"{image.width} x {image.height} pixels: of {image.format} files of this encoding, "
            f"which is slow to read, wanted at most {most}."
        )


def _cost(image: Any, size: tuple[int, int]) -> int:
    """Count the pixels that decoding has in memory."""
    tags = getattr(image, "tag_v2", {})  # a TIFF's tile may be larger than the image
    return max(size[0] * size[1], int(tags.get(322, 0)) * int(tags.get(323, 0)))


class _UnderWay:
    """Pixels that are decoded at once: who wants more than are left waits."""

    def __init__(self, most: int) -> None:
        self._most = most
        self.reset()

    def reset(self) -> None:
        """Start with all of them: the threads that held some do not survive a fork."""
        self._left, self._changed = self._most, threading.Condition()

    @contextmanager
    def room(self, pixels: int) -> Iterator[None]:
        """Hold so many; more than there are is all of them."""
        pixels = min(pixels, self._most)
        with self._changed:
            self._changed.wait_for(lambda: self._left >= pixels)
            self._left -= pixels
        try:
            yield
        finally:
            with self._changed:
                self._left += pixels
                self._changed.notify_all()


_UNDER_WAY = _UnderWay(MAX_PIXELS)
os.register_at_fork(after_in_child=_UNDER_WAY.reset)


def _orientation(image: Any) -> int:
    """Return EXIF's orientation, 1 to 8; 1 where there is none that can be read."""
    from PIL import Image

    if image.format == "TIFF":  # Pillow turns it by itself
        return 1
    try:
        # The base class's: PNG's own decodes the picture to look for EXIF behind it.
        orientation = Image.Image.getexif(image).get(0x0112)
    except Exception:  # damaged metadata do not make the pixels unreadable
        return 1
    return orientation if orientation in range(1, 9) else 1


def _webp_canvas(data: bytes) -> tuple[int, int] | None:
    """Read width and height of a WebP file as they are stored; None = not one, or cut short."""
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
    """Read width and height of a WebP file without metadata, which may turn it; None = as above."""
    with_metadata = data[12:16] == b"VP8X" and data[20:21] > b"" and data[20] & 0b1100
    return None if with_metadata else _webp_canvas(data)


def _halve(image: Any, size: tuple[int, int]) -> tuple[int, int]:
    """Let a JPEG be decoded at 1/2, 1/4 or 1/8, while it covers `size`, and return its new size.

    In whole pixels: one that is only partly inside the picture is left out.
    """
    drafted = image.draft(None, size) if image.format == "JPEG" else None
    if drafted is None:
        whole: tuple[int, int] = image.size
        return whole
    width, height = drafted[1][2:]
    return int(width), int(height)


class _Profile:
    """The color profile of an image, and the conversion to sRGB.

    What has three channels, or one, is converted after it was scaled, since the result is small;
    CMYK is converted before, since no one can scale what is not yet a color. A profile that cannot
    be read, or is of another kind of colors than the image, is ignored with a warning.
    """

    def __init__(self, image: Any) -> None:
        self.cmyk: Any = None
        self._after: Any = None
        self._mode = "RGB"
        profile = image.info.get("icc_profile")
        if not profile:
            return
        space, transform = _to_srgb(bytes(profile))
        grey = image.mode[0] in "1LI"
        if space == "CMYK" == image.mode:
            self.cmyk = transform
        elif image.mode != "CMYK" and (space == "RGB" or (space == "GRAY" and grey)):
            self._after, self._mode = transform, "RGB" if space == "RGB" else "L"
        elif space:
            _ignore_profile(f"it is of {space}, the image of {image.mode}")

    def finish(self, pixels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Convert scaled pixels, (h, w, 3) uint8."""
        from PIL import Image, ImageCms

        if self._after is None:
            return pixels
        image = Image.fromarray(pixels if self._mode == "RGB" else pixels[..., 0].copy())
        return np.asarray(ImageCms.applyTransform(image, self._after))


def _ignore_profile(reason: str) -> None:
    warnings.warn(f"An embedded color profile is ignored: {reason}.", stacklevel=2)


@lru_cache(maxsize=16)
def _to_srgb(profile: bytes) -> tuple[str, Any]:
    """Return a profile's color space and the transform to sRGB.

    None = it is the same within two levels; "" = it was ignored.
    """
    from PIL import Image, ImageCms

    if len(profile) > _MOST_PROFILE:
        _ignore_profile("it is too large")
        return "", None
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = opened.profile.xcolor_space.strip()
        mode = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}.get(space)
        if mode is None:
            raise ValueError(f"it is of {space}")
        srgb = ImageCms.createProfile("sRGB")
        transform = ImageCms.buildTransform(opened, srgb, mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError) as error:
        _ignore_profile(" ".join(str(error).split()) or "it is unreadable")
        return "", None
    if mode != "CMYK":
        levels = np.arange(0, 256, 17, dtype=np.uint8)
        cube = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(16, -1, 3)
        probe = Image.fromarray(cube if mode == "RGB" else levels[None].copy())
        wanted = np.asarray(probe.convert("RGB"), np.int16)
        if np.abs(np.asarray(ImageCms.applyTransform(probe, transform)) - wanted).max() <= 2:
            return space, None
    return space, transform


def _rgb(image: Any, box: tuple[int, int, int, int], profile: _Profile) -> np.ndarray[Any, Any]:
    """Crop a decoded image and convert it to (h, w, 3) uint8, some rows at a time."""
    left, top, right, bottom = box
    pixels = np.empty((bottom - top, right - left, 3), np.uint8)
    rows = max(1, _BAND // (right - left))
    for y in range(top, bottom, rows):
        part = (left, y, right, min(y + rows, bottom))
        band = image if part == (0, 0, *image.size) else image.crop(part)
        pixels[y - top : part[3] - top] = np.asarray(_to_rgb(band, profile))
    return pixels


def _to_rgb(image: Any, profile: _Profile) -> Any:
    from PIL import Image, ImageCms

    if image.mode.startswith("I"):  # 16 bits: Pillow would clip them to 8
        levels = np.asarray(image).astype(np.int32).clip(0, 65535)
        image = Image.fromarray(((levels + 128) // 257).astype(np.uint8))
    if image.mode == "CMYK" and profile.cmyk is not None:
        return ImageCms.applyTransform(image, profile.cmyk)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _resize(
    pixels: np.ndarray[Any, Any], width: int, height: int
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Scale RGB pixels to (height, width, 3), bicubic, antialiased.

    By torch: its levels are Pillow's within 1, and it is several times as fast.
    """
    if pixels.shape[:2] == (height, width):
        return pixels
    planes = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    scaled = torch.nn.functional.interpolate(
        planes, size=(height, width), mode="bicubic", antialias=True
    )
    return scaled[0].permute(1, 2, 0).numpy()
