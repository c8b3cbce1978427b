"""Conversion of decoded images to sRGB: embedded profiles, 16-bit levels, transparency."""

from __future__ import annotations

import io
import warnings
from functools import lru_cache
from typing import Any

import numpy as np

_MAX_PROFILE = 4 << 20  # bytes of a color profile


class Profile:
    """The color profile of an image, and the conversion to sRGB.

    Images with one or three channels are converted after scaling, when they are small. CMYK images
    are converted before scaling, because scaling is defined on RGB. A profile that cannot be read,
    or is for another color space than the image's, is ignored with a warning.
    """

    def __init__(self, image: Any) -> None:
        self.cmyk: Any = None
        self._after: Any = None
        self._mode = "RGB"
        profile = image.info.get("icc_profile")
        if not profile:
            return
        space, transform = _to_srgb(bytes(profile))
        is_gray = image.mode[0] in "1LI"
        if space == "CMYK" == image.mode:
            self.cmyk = transform
        elif image.mode != "CMYK" and (space == "RGB" or (space == "GRAY" and is_gray)):
            self._after, self._mode = transform, "RGB" if space == "RGB" else "L"
        elif space:
            ignore_profile(f"it is for {space}, but the image is {image.mode}")

    def finish(self, pixels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Convert scaled pixels, (h, w, 3) uint8."""
        from PIL import Image, ImageCms

        if self._after is None:
            return pixels
        image = Image.fromarray(pixels if self._mode == "RGB" else pixels[..., 0].copy())
        return np.asarray(ImageCms.applyTransform(image, self._after))


def ignore_profile(reason: str) -> None:
    """Warn that an image is read as if it had no color profile."""
    warnings.warn(f"The embedded color profile of an image is ignored: {reason}.", stacklevel=2)


@lru_cache(maxsize=16)
def _to_srgb(profile: bytes) -> tuple[str, Any]:
    """Return a profile's color space and the transform to sRGB.

    None = the transform changes no level by more than two; "" = the profile was ignored.
    """
    from PIL import Image, ImageCms

    if len(profile) > _MAX_PROFILE:
        ignore_profile("it is too large")
        return "", None
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = opened.profile.xcolor_space.strip()
        mode = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}.get(space)
        if mode is None:
            raise ValueError(f"it is for {space}")
        srgb = ImageCms.createProfile("sRGB")
        transform = ImageCms.buildTransform(opened, srgb, mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError) as error:
        ignore_profile(" ".join(str(error).split()) or "it is unreadable")
        return "", None
    if mode != "CMYK":
        levels = np.arange(0, 256, 17, dtype=np.uint8)
        cube = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(16, -1, 3)
        probe = Image.fromarray(cube if mode == "RGB" else levels[None].copy())
        unchanged = np.asarray(probe.convert("RGB"), np.int16)
        if np.abs(np.asarray(ImageCms.applyTransform(probe, transform)) - unchanged).max() <= 2:
            return space, None
    return space, transform


def to_rgb(image: Any, profile: Profile) -> Any:
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
