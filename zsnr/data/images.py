"""Encoded pictures to tensors."""

from __future__ import annotations

import io

import numpy as np
import torch
from torch import Tensor


def decode_image(data: bytes, size: int) -> Tensor:
    """Decode a picture, resize its short side to `size` and crop the centre square.

    Antialiased (bicubic); transparent parts become white.

    Args:
        data: A JPEG, PNG or WebP file.
        size: Height and width of the result, in pixels.

    Returns:
        (3, size, size) in [-1, 1], float32.

    Raises:
        ValueError: Not a readable picture.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(data)) as opened:
            opened.load()
            image = ImageOps.exif_transpose(opened)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"not a readable picture: {error}") from error
    if image.mode.startswith("I"):  # 16 bits: Pillow would clip them to 8
        levels = np.asarray(image, dtype=np.float64) / 65535 * 255
        image = Image.fromarray(levels.round().clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    image = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
    return pixels.float() / 127.5 - 1
