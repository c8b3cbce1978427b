"""An HTML page that stands alone: no network, no other files."""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zsnr.render import render
from zsnr.reports.images import stacked_axes

if TYPE_CHECKING:
    from markupsafe import Markup
    from PIL.Image import Image

WIDTH = 1190  # pixels of the page's text
INK = "#010203"
"""Color of what a chart draws in the color of the page's text, which is light on a dark screen."""

_SMALL, _LARGE = 128, 288  # pixels of an image's longer side on the page
_RC_PARAMS = {
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK
    ),
    "svg.fonttype": "none",
    "svg.hashsalt": "zsnr",
}


@dataclass(frozen=True)
class EmbeddedImage:
    """An image as a page holds it.

    Args:
        url: A data: URL.
        width: Width on the page, in pixels.
        height: Height on the page, in pixels.
        pixelated: Whether it is enlarged, so that each pixel is a square.
    """

    url: str
    width: int
    height: int
    pixelated: bool


def render_page(template: str, values: Mapping[str, Any]) -> str:
    """Render a page from one of the templates beside this file."""
    return render(Path(__file__).parent / "templates" / template, values)


def embed(image: Image) -> EmbeddedImage:
    """Embed an image; small ones are enlarged and large ones reduced."""
    data, factor = io.BytesIO(), _zoom(image)
    if factor < 1:
        image.reduce(max(1, int(1 / factor))).save(data, "JPEG", quality=90)
    else:
        image.save(data, "PNG")
    kind = "jpeg" if factor < 1 else "png"
    url = f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode()}"
    width, height = (round(side * factor) for side in image.size)
    return EmbeddedImage(url, width, height, factor > 1)


def images_per_column(image: Image, columns: int) -> int:
    """Count how many such images fit side by side in each of several columns of the page."""
    return max(1, int(WIDTH / columns / (image.width * _zoom(image) + 4)))


def draw_chart(
    draw: Callable[[Any], None], width: float, height: float, rows: int = 1, sharex: bool = True
) -> Markup:
    """Draw a chart as SVG whose text and axes have the color of the page's text.

    Args:
        draw: Draws on the axes: one, or an array of as many as there are rows.
        width: In inches.
        height: In inches.
        rows: Axes, one below the other.
        sharex: Whether they share the x axis.
    """
    import matplotlib
    from markupsafe import Markup

    text = io.StringIO()
    with matplotlib.rc_context(_RC_PARAMS), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # the browser has more fonts
        figure, axes = stacked_axes(width, height, rows, sharex)
        draw(axes)
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(text, format="svg", metadata=no_metadata, transparent=True)
    svg = text.getvalue().replace(INK, "currentColor")
    return Markup(svg[svg.index("<svg") :])  # matplotlib escapes the text in it


def _zoom(image: Image) -> float:
    longer: int = max(image.size)
    return _LARGE / longer if longer > _LARGE else max(1, _SMALL // longer)
