"""Images that sampling starts from: image-to-image, and inpainting with a mask."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import adaptive_max_pool2d

if TYPE_CHECKING:
    from PIL.Image import Image

DEFAULT_STRENGTH = 0.6
DEFAULT_CORRECTIONS = 2


@dataclass(frozen=True, eq=False)
class Edit:
    """Images that sampling starts from, and the parts of them that are repainted.

    Args:
        image: Images (1 or B, 3, H, W) in [-1, 1]; one is for all samples.
        strength: Share of the sampling steps that are made, in (0, 1].
        mask: 1 where pixels are repainted, 0 where they are kept, (1 or B, 1, H, W); between, both
            are mixed. None = the whole image is repainted.
        corrections: Number of corrections of `InpaintingDenoiser`.
    """

    image: Tensor
    strength: float
    mask: Tensor | None = None
    corrections: int = DEFAULT_CORRECTIONS

    def first_step(self, num_steps: int) -> int:
        """Return how many of the first steps are left out.

        Raises:
            ValueError: None would be left.
        """
        left = math.floor(self.strength * num_steps + 1e-9)
        if left == 0:
            raise ValueError(
                f"strength={self.strength} of {num_steps} steps leaves no step: wanted at least "
                f"{math.ceil(1 / self.strength - 1e-9)} steps, or a strength of at least "
                f"1 / {num_steps}."
            )
        return num_steps - left

    def size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Return the height and width of the images.

        Raises:
            ValueError: Another height or width is given.
        """
        size = self.image.shape[-2], self.image.shape[-1]
        for name, given, side in zip(("height", "width"), (height, width), size, strict=True):
            if given not in (None, side):
                raise ValueError(
                    f"{name}={given}, but the image is {size[0]} x {size[1]} (height x width): "
                    "wanted the image's size. Resize the image, or leave height and width out."
                )
        return size

    def rows(self, rows: slice) -> Edit:
        """Return the edits of some samples."""
        mask = self.mask
        return replace(
            self,
            image=self.image[rows] if len(self.image) > 1 else self.image,
            mask=mask[rows] if mask is not None and len(mask) > 1 else mask,
        )

    def repainted(self, height: int, width: int) -> Tensor | None:
        """Return which latents are sampled: those with any repainted pixel, (1 or B, 1, h, w)."""
        if self.mask is None:
            return None
        return adaptive_max_pool2d((self.mask >= 0.5).float(), (height, width)) > 0

    def keep(self, pixels: Tensor, row: int) -> Tensor:
        """Put the kept pixels of one sample's image into its repainted one, (3, H, W)."""
        if self.mask is None:
            return pixels
        image, mask = (part[row if len(part) > 1 else 0] for part in (self.image, self.mask))
        image, mask = image.to(pixels), mask.to(pixels)
        return torch.where(mask == 0, image, mask * pixels + (1 - mask) * image)

    def facts(self) -> dict[str, Any]:
        """Return the settings as plain values, with digests of the pixels."""
        facts = {"strength": self.strength, "image_sha256": _digest(self.image)}
        if self.mask is None:
            return facts
        return {**facts, "mask_sha256": _digest(self.mask), "mask_corrections": self.corrections}


def read_edit(
    image: Tensor | Image | Sequence[Image] | None,
    strength: float | None,
    mask: Tensor | Image | None,
    corrections: int,
    count: int,
) -> Edit | None:
    """Check the images to start from, and convert them to tensors.

    Args:
        image: Images (B, 3, H, W) in [-1, 1], an image of PIL, or a list of them; one for all
            samples, or one for each. None = sampling starts from noise.
        strength: See `Edit`. None = 1 with a mask, else 0.6.
        mask: 1 or white = repaint: (H, W), (B, H, W) or (B, 1, H, W), of bool or in [0, 1]; or an
            image of PIL.
        corrections: See `Edit`.
        count: Number of samples.

    Raises:
        ValueError: A part is missing, out of range or of another size.
    """
    if image is None:
        for name, value in (("mask", mask), ("strength", strength)):
            if value is not None:
                raise ValueError(
                    f"{name} without image: wanted an image to start from. Pass image, or leave "
                    f"{name} out."
                )
        return None
    if strength is None:
        strength = DEFAULT_STRENGTH if mask is None else 1.0
    if isinstance(strength, bool) or not isinstance(strength, int | float) or not 0 < strength <= 1:
        raise ValueError(
            f"strength={strength!r}: wanted a number above 0, up to 1: the share of the sampling "
            "steps that are made."
        )
    if type(corrections) is not int or corrections < 0:
        raise ValueError(f"mask_corrections={corrections!r}: wanted 0 or more.")
    pixels = _pixels(image)
    masked = None if mask is None else _mask(mask, (pixels.shape[-2], pixels.shape[-1]))
    for name, part in (("images", pixels), ("masks", masked)):
        if part is not None and len(part) not in (1, count):
            raise ValueError(
                f"{len(part)} {name} for {count} prompts: wanted one for all, or one for each."
            )
    return Edit(pixels, float(strength), masked, corrections)


def _pixels(image: Any) -> Tensor:
    """Convert images to (B, 3, H, W) in [-1, 1]."""
    if not isinstance(image, Tensor):
        images = list(image) if isinstance(image, list | tuple) else [image]
        if not images:
            raise ValueError("image is an empty list: wanted one image, or one for each prompt.")
        sizes = {getattr(each, "size", None) for each in images}
        if len(sizes) != 1:
            raise ValueError(f"The images have the sizes {sizes}: wanted one size for all.")
        return torch.stack([_levels(each) for each in images]) / 127.5 - 1
    if image.ndim != 4 or image.shape[1] != 3:
        raise ValueError(
            f"image has the shape {tuple(image.shape)}: wanted (B, 3, H, W), or an image of PIL."
        )
    low, high = (float(end) for end in image.aminmax())
    if not (image.is_floating_point() and low >= -1 and high <= 1):
        raise ValueError(
            f"image is {image.dtype} from {low:g} to {high:g}: wanted floating point numbers in "
            "[-1, 1], such as levels / 127.5 - 1."
        )
    return image.detach().float().cpu()


def _mask(mask: Any, size: tuple[int, int]) -> Tensor:
    """Convert a mask to (B, 1, H, W) in [0, 1]."""
    if not isinstance(mask, Tensor):
        values = _levels(_on_black(mask)).float().mean(0)[None, None] / 255
    else:
        values = mask.detach().float().cpu()
        values = values[None] if values.ndim == 2 else values
        values = values[:, None] if values.ndim == 3 else values
        if values.ndim != 4 or values.shape[1] != 1:
            raise ValueError(
                f"mask has the shape {tuple(mask.shape)}: wanted (H, W) or (B, 1, H, W), or an "
                "image of PIL."
            )
        if not bool(((values >= 0) & (values <= 1)).all()):
            raise ValueError(
                "mask has values outside of [0, 1]: wanted 1 where the image is repainted, and 0 "
                "where it is kept."
            )
    if values.shape[-2:] != size:
        raise ValueError(
            f"The mask is {values.shape[-2]} x {values.shape[-1]} (height x width), but the image "
            f"is {size[0]} x {size[1]}: wanted equal sizes. Resize one of them."
        )
    return values


def _levels(image: Any) -> Tensor:
    """Convert an image of PIL to 8-bit levels, (3, H, W)."""
    import PIL.Image

    from zsnr.data.images import image_levels

    if not isinstance(image, PIL.Image.Image):
        raise ValueError(
            f"image is a {type(image).__name__}: wanted a tensor (B, 3, H, W) in [-1, 1], or an "
            "image of PIL."
        )
    return image_levels(image)


def _on_black(mask: Any) -> Any:
    """Make transparent parts of a mask black, so that they are kept."""
    from PIL import Image

    if not isinstance(mask, Image.Image):
        raise ValueError(
            f"mask is a {type(mask).__name__}: wanted a tensor (H, W) in [0, 1], or an image of "
            "PIL."
        )
    if not mask.has_transparency_data:
        return mask
    mask = mask.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", mask.size, "black"), mask).convert("RGB")


def _digest(values: Tensor) -> str:
    return hashlib.sha256(values.contiguous().numpy().tobytes()).hexdigest()
