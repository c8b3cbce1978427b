"""Conversion of encoded images to tensors: decoded, scaled and cropped to a shape."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zsnr.data.colors import Profile, to_rgb
from zsnr.data.formats import MAX_PIXELS, check_scans, open_image, orientation_of, readable

_BAND = 1 << 20  # pixels that are converted at a time


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
    """Decode an image, scale it to just cover `height` x `width`, and crop it to that size.

    Scaling is bicubic with antialiasing; an image that already fits is not resampled. The crop is
    aligned to whole pixels of the decoded image. EXIF orientation is applied, transparent parts
    become white, colors of an embedded ICC profile are converted to sRGB, and the first of several
    frames is used. Threads wait while their images together exceed `MAX_PIXELS` pixels.

    Args:
        data: The complete file, of a format that `image_size` supports.
        height: Height of the result, in pixels.
        width: Width of the result, in pixels.
        crop: Relative position of the crop, vertical and horizontal: (0, 0) is the top left corner,
            (0.5, 0.5) the center, (1, 1) the bottom right corner.
        flip: Mirror the crop horizontally.
        max_pixels: Refuse larger images before they are decoded.
        scaled_decoding: Let the JPEG decoder halve an image, up to three times, while it still
            covers the result. Faster; on photographs the PSNR against scaling the full image is
            about 40 dB.

    Returns:
        (3, height, width) uint8, RGB.

    Raises:
        ValueError: The image is not readable, or too large.
    """
    image = open_image(data, max_pixels)
    if image.format == "JPEG":
        check_scans(data, image.size[0] * image.size[1])
    orientation = orientation_of(image)
    transposed = orientation >= 5
    mirrored, upside_down = orientation in (2, 3, 6, 7), orientation in (3, 4, 7, 8)
    target = (height, width) if transposed else (width, height)
    stored = image.size  # a progressive JPEG holds the coefficients of the full image in memory
    with readable():
        size = _halve(image, target) if scaled_decoding else image.size
    w, h = size[::-1] if transposed else size
    top, left, crop_h, crop_w = _crop(h, w, height, width, crop)
    if upside_down:  # crop and scale the stored pixels, then rotate the small result
        top = h - crop_h - top
    if mirrored:
        left = w - crop_w - left
    if transposed:
        left, top, crop_w, crop_h = top, left, crop_h, crop_w
    with readable():
        cost = _cost(image, stored if image.info.get("progressive") else image.size)
    with _UNDER_WAY.room(cost):
        with readable():
            image.load()
            profile = Profile(image)
            pixels = _rgb(image, (left, top, left + crop_w, top + crop_h), profile)
        del image
        pixels = profile.finish(_resize(pixels, *target))
    if transposed:
        pixels = pixels.swapaxes(0, 1)
    if upside_down:
        pixels = pixels[::-1]
    if mirrored != flip:
        pixels = pixels[:, ::-1]
    return torch.from_numpy(np.array(pixels.transpose(2, 0, 1), order="C"))


def read_image(path: str | Path) -> Any:
    """Read an image file of any supported format, as an image of PIL.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not a readable image, or too large.
    """
    path = Path(path).expanduser()
    try:
        with readable():
            image = open_image(path.read_bytes(), MAX_PIXELS)
            image.load()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return image


def image_levels(image: Any) -> Tensor:
    """Convert an image of PIL to RGB, as `decode_image` does, but without scaling and cropping.

    Returns:
        (3, H, W) uint8, RGB.

    Raises:
        ValueError: The image is not readable.
    """
    from PIL import ImageOps

    with readable():
        image = ImageOps.exif_transpose(image)
        profile = Profile(image)
        pixels = profile.finish(np.asarray(to_rgb(image, profile)))
    return torch.from_numpy(np.array(pixels.transpose(2, 0, 1), order="C"))


def to_unit_range(images: Tensor) -> Tensor:
    """Map 8-bit levels to the input range of networks: x / 127.5 - 1.

    Args:
        images: (B, 3, H, W) uint8.

    Returns:
        (B, 3, H, W) float32 in [-1, 1], on the same device.

    Raises:
        ValueError: The dtype is not uint8.
    """
    if images.dtype != torch.uint8:
        raise ValueError(f"images are {images.dtype}: wanted torch.uint8.")
    return images.float().div_(127.5).sub_(1)


def size_facts(size: tuple[int, int], height: int, width: int, crop: tuple[float, float]) -> Tensor:
    """Return the size conditioning of SDXL for an image that `decode_image` crops.

    The crop's offsets are in pixels of the scaled image, before cropping. Mirroring does not
    change them.

    Args:
        size: Height and width of the image, after applying its EXIF orientation.
        height: Height of the result, in pixels.
        width: Width of the result, in pixels.
        crop: Relative position of the crop, as for `decode_image`.

    Returns:
        Original height and width, crop top and left, target height and width: (6,) int64.
    """
    top, left, _, _ = _crop(*size, height, width, crop)
    scale = _scale(*size, height, width)
    return torch.tensor([*size, round(top * scale), round(left * scale), height, width])


def _scale(h: int, w: int, height: int, width: int) -> float:
    """Return the factor that scales an image of h x w to just cover height x width."""
    return max(height / h, width / w)


def _crop(
    h: int, w: int, height: int, width: int, crop: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Place the crop in an image of h x w, in whole pixels: top, left, height, width."""
    scale = _scale(h, w, height, width)
    crop_h, crop_w = min(h, round(height / scale)), min(w, round(width / scale))
    crop_h, crop_w = max(1, crop_h), max(1, crop_w)
    return round((h - crop_h) * crop[0]), round((w - crop_w) * crop[1]), crop_h, crop_w


def _cost(image: Any, size: tuple[int, int]) -> int:
    """Count the pixels that decoding holds in memory."""
    tags = getattr(image, "tag_v2", {})  # a TIFF's tile may be larger than the image
    return max(size[0] * size[1], int(tags.get(322, 0)) * int(tags.get(323, 0)))


class _UnderWay:
    """A limit on the pixels that are decoded at once; threads wait until enough are free."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.reset()

    def reset(self) -> None:
        """Free all pixels: the threads that held some do not survive a fork."""
        self._free, self._changed = self._limit, threading.Condition()

    @contextmanager
    def room(self, pixels: int) -> Iterator[None]:
        """Hold this number of pixels, or all of them if it exceeds the limit."""
        pixels = min(pixels, self._limit)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= pixels)
            self._free -= pixels
        try:
            yield
        finally:
            with self._changed:
                self._free += pixels
                self._changed.notify_all()


_UNDER_WAY = _UnderWay(MAX_PIXELS)
os.register_at_fork(after_in_child=_UNDER_WAY.reset)


def _halve(image: Any, size: tuple[int, int]) -> tuple[int, int]:
    """Set a JPEG to be decoded at 1/2, 1/4 or 1/8, if that covers `size`; return its new size.

    Pixels that are only partly inside the image are not counted.
    """
    drafted = image.draft(None, size) if image.format == "JPEG" else None
    if drafted is None:
        full_size: tuple[int, int] = image.size
        return full_size
    width, height = drafted[1][2:]
    return int(width), int(height)


def _rgb(image: Any, box: tuple[int, int, int, int], profile: Profile) -> np.ndarray[Any, Any]:
    """Crop a decoded image and convert it to (h, w, 3) uint8, some rows at a time."""
    left, top, right, bottom = box
    pixels = np.empty((bottom - top, right - left, 3), np.uint8)
    rows = max(1, _BAND // (right - left))
    for y in range(top, bottom, rows):
        part = (left, y, right, min(y + rows, bottom))
        band = image if part == (0, 0, *image.size) else image.crop(part)
        pixels[y - top : part[3] - top] = np.asarray(to_rgb(band, profile))
    return pixels


def _resize(
    pixels: np.ndarray[Any, Any], width: int, height: int
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Scale RGB pixels to (height, width, 3), bicubic, antialiased.

    Torch's levels are within 1 of Pillow's, and it is several times as fast.
    """
    if pixels.shape[:2] == (height, width):
        return pixels
    planes = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    scaled = torch.nn.functional.interpolate(
        planes, size=(height, width), mode="bicubic", antialias=True
    )
    return scaled[0].permute(1, 2, 0).numpy()
