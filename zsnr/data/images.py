"""Encoded images to tensors: decoded, scaled and cropped to a shape."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
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
    """Decode an image, scale it until it just covers `height` x `width`, and crop it to that.

    Scaling is bicubic with antialiasing; an image that needs none keeps its values. The crop lies
    on whole pixels of the decoded image. EXIF orientation is obeyed, transparent parts become
    white, colors of an embedded ICC profile become those of sRGB, of several frames the first is
    taken. Threads wait for each other where their images have over `MAX_PIXELS` pixels together.

    Args:
        data: As for `image_size`, whole.
        height: Height of the result, in pixels.
        width: Width of the result, in pixels.
        crop: Where the crop lies in the room it has, down and across: (0, 0) is the top left
            corner, (0.5, 0.5) the centre, (1, 1) the bottom right corner.
        flip: Mirror the crop left to right.
        max_pixels: Refuse larger images before they are decoded.
        scaled_decoding: Let the JPEG decoder itself halve an image, up to three times, while it
            still covers the result: quicker, and on photographs about 40 dB from scaling all of it.

    Returns:
        (3, height, width) uint8, RGB.

    Raises:
        ValueError: Not a readable image, or too large a one.
    """
    image = open_image(data, max_pixels)
    if image.format == "JPEG":
        check_scans(data, image.size[0] * image.size[1])
    orientation = orientation_of(image)
    transposed = orientation >= 5
    mirrored, upside_down = orientation in (2, 3, 6, 7), orientation in (3, 4, 7, 8)
    asked = (height, width) if transposed else (width, height)
    stored = image.size  # a progressive JPEG keeps the coefficients of all of it
    with readable():
        size = _halve(image, asked) if scaled_decoding else image.size
    w, h = size[::-1] if transposed else size
    top, left, crop_h, crop_w = _crop(h, w, height, width, crop)
    if upside_down:  # crop and scale what is stored, then turn the small result
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
    """Say how `decode_image` cuts an image, as SDXL's network is told (Conditioning's sizes).

    The crop's offsets are in pixels of the image as it is scaled, before it is cropped. A
    mirrored image keeps them: what was cut away is told, not on which side it shows.

    Args:
        size: Height and width of the image as it is seen.
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
    """Say by what an image of h x w is multiplied to just cover height x width."""
    return max(height / h, width / w)


def _crop(
    h: int, w: int, height: int, width: int, crop: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Place the crop in an image of h x w, in its own whole pixels: top, left, height, width."""
    scale = _scale(h, w, height, width)
    crop_h, crop_w = min(h, round(height / scale)), min(w, round(width / scale))
    crop_h, crop_w = max(1, crop_h), max(1, crop_w)
    return round((h - crop_h) * crop[0]), round((w - crop_w) * crop[1]), crop_h, crop_w


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


def _halve(image: Any, size: tuple[int, int]) -> tuple[int, int]:
    """Let a JPEG be decoded at 1/2, 1/4 or 1/8, while it covers `size`, and return its new size.

    In whole pixels: one that is only partly inside the image is left out.
    """
    drafted = image.draft(None, size) if image.format == "JPEG" else None
    if drafted is None:
        whole: tuple[int, int] = image.size
        return whole
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

    By torch: its levels are Pillow's within 1, and it is several times as fast.
    """
    if pixels.shape[:2] == (height, width):
        return pixels
    planes = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    scaled = torch.nn.functional.interpolate(
        planes, size=(height, width), mode="bicubic", antialias=True
    )
    return scaled[0].permute(1, 2, 0).numpy()
