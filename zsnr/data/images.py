"""Encoded pictures to tensors."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

MAX_PIXELS = 64_000_000
"""Pixels of the largest picture that is decoded, unless a caller says otherwise."""


class HeaderCut(ValueError):  # noqa: N818 - a state of the bytes, which the reader mends
    """The bytes end before the picture's header does: more of the file may say its size."""


def image_size(data: bytes, max_pixels: int | None = None) -> tuple[int, int]:
    """Read a picture's size as it is seen, EXIF orientation obeyed, without decoding it.

    Args:
        data: A JPEG, PNG, WebP or GIF file, or its first bytes.
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
    white, of an animation the first frame is taken.

    Args:
        data: A JPEG, PNG, WebP or GIF file.
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
    orientation = _orientation(image)
    transposed = orientation >= 5
    mirrored, upside_down = orientation in (2, 3, 6, 7), orientation in (3, 4, 7, 8)
    asked = (height, width) if transposed else (width, height)
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
        image.load()
        if (crop_w, crop_h) != image.size:
            image = image.crop((left, top, left + crop_w, top + crop_h))
        image = _to_rgb(image)
    pixels = _resize(image, *asked)
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
    """Turn whatever Pillow raises at damaged bytes into a ValueError of one line."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"not a readable picture: {reason}") from error


def _open(data: bytes, max_pixels: int | None) -> Any:
    """Read the header into a PIL image whose pixels are still encoded.

    The decoders are called by name: Image.open would warn of large pictures, or refuse them,
    before `max_pixels` is asked, and knows formats that start other programs.
    """
    from PIL import GifImagePlugin, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

    if not data:
        raise ValueError("the picture is empty (0 bytes).")
    if data.startswith(b"\xff\xd8\xff"):
        decoder: Any = JpegImagePlugin.JpegImageFile
    elif data.startswith(b"\x89PNG\r\n\x1a\n"):
        decoder = PngImagePlugin.PngImageFile
    elif data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        decoder = WebPImagePlugin.WebPImageFile
    elif data.startswith((b"GIF87a", b"GIF89a")):
        decoder = GifImagePlugin.GifImageFile
    else:
        kind = HeaderCut if len(data) < 12 else ValueError
        raise kind("not a readable picture: wanted a JPEG, PNG, WebP or GIF file.")
    size = _webp_size(data)
    if size is not None:  # its decoder makes room for the picture at once
        _check_pixels(size, max_pixels)
    stream = io.BytesIO(data)
    try:
        with _readable():
            image = decoder(stream)
    except ValueError as error:
        if stream.tell() >= len(data):
            raise HeaderCut(*error.args) from error
        raise
    _check_pixels(image.size, max_pixels)
    return image


def _check_pixels(size: tuple[int, int], max_pixels: int | None) -> None:
    width, height = size
    if max_pixels is not None and width * height > max_pixels:
        raise ValueError(
            f"{width} x {height} pixels: wanted at most {max_pixels} (data.pixels.max_pixels)."
        )


def _orientation(image: Any) -> int:
    """Return EXIF's orientation, 1 to 8; 1 where there is none that can be read."""
    from PIL import Image

    try:
        # The base class's: PNG's own decodes the picture to look for EXIF behind it.
        orientation = Image.Image.getexif(image).get(0x0112)
    except Exception:  # damaged metadata do not make the pixels unreadable
        return 1
    return orientation if orientation in range(1, 9) else 1


def _webp_size(data: bytes) -> tuple[int, int] | None:
    """Read width and height of a WebP file without metadata; None = not one, or cut short."""
    if len(data) < 30 or data[:4] != b"RIFF" or data[8:12] != b"WEBP":
        return None
    kind = data[12:16]
    if kind == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":
        sides = int.from_bytes(data[26:28], "little"), int.from_bytes(data[28:30], "little")
        width, height = sides[0] & 0x3FFF, sides[1] & 0x3FFF
    elif kind == b"VP8L" and data[20] == 0x2F:
        bits = int.from_bytes(data[21:25], "little")
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    elif kind == b"VP8X" and not data[20] & 0b1100:  # neither EXIF nor XMP
        width = int.from_bytes(data[24:27], "little") + 1
        height = int.from_bytes(data[27:30], "little") + 1
    else:
        return None
    return (width, height) if width and height else None


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


def _to_rgb(image: Any) -> Any:
    from PIL import Image

    if image.mode.startswith("I"):  # 16 bits: Pillow would clip them to 8
        levels = np.asarray(image, dtype=np.float64) / 65535 * 255
        image = Image.fromarray(levels.round().clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _resize(image: Any, width: int, height: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Scale an RGB picture to (height, width, 3), bicubic, antialiased.

    By torch: its levels are Pillow's within 1, and it is several times as fast.
    """
    if image.size == (width, height):
        return np.asarray(image)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    scaled = torch.nn.functional.interpolate(
        pixels, size=(height, width), mode="bicubic", antialias=True
    )
    return scaled[0].permute(1, 2, 0).numpy()
