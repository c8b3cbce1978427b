"""Pieces of an HTML page that stands alone: no network, no other files."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

WIDTH = 1190  # pixels of the page's text
_SMALL, _LARGE = 128, 288  # pixels of a picture's longer side on the page

_STYLE = """
:root { color-scheme: light; --line: #d9dde3; --soft: #f4f6f8; --text: #1c2430; --dim: #5b6675; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem; max-width: 1240px; color: var(--text); background: #fff;
  font: 15px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; margin: 0 0 .3rem; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; border-bottom: 2px solid var(--line);
  padding-bottom: .25rem; }
p, ul { margin: .4rem 0; }
h3 { font-size: 1rem; margin: 1.2rem 0 .4rem; }
.dim, figcaption { color: var(--dim); }
.verdict { background: var(--soft); border-left: 4px solid #0072b2; padding: .7rem 1rem;
  margin: 1rem 0; }
.verdict p { margin: .2rem 0; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { padding: .35rem .55rem; text-align: right; border-bottom: 1px solid var(--line);
  vertical-align: top; font-variant-numeric: tabular-nums; }
th:first-child, td:first-child, td.path { text-align: left; }
td { overflow-wrap: normal; }
td.path { overflow-wrap: anywhere; font-size: .9em; }
thead th { background: var(--soft); vertical-align: bottom; overflow-wrap: normal; }
td .differs, td.differs { background: #fff1cc; }
td.best { font-weight: 700; }
td span.interval { display: block; color: var(--dim); font-weight: 400; font-size: .85em; }
figure { margin: .8rem 0; }
svg { width: 100%; height: auto; display: block; }
.swatch { display: inline-block; width: .75em; height: .75em; border-radius: 2px;
  margin-right: .4em; vertical-align: -.05em; }
.pictures { display: grid; gap: .4rem .8rem; align-items: start; }
.pictures .name { font-weight: 600; font-size: .9rem; position: sticky; top: 0; background: #fff;
  padding: .35rem 0; border-bottom: 2px solid var(--line); }
.pictures .prompt { grid-column: 1 / -1; margin-top: .7rem; font-size: .9rem; }
.group { background: var(--soft); border: 1px solid var(--line); border-radius: 3px;
  padding: 0 .4em; margin-right: .4em; color: var(--dim); font-size: .85em; }
.cell { display: flex; flex-wrap: wrap; gap: 4px; }
.cell img { display: block; max-width: 100%; height: auto; border: 1px solid var(--line); }
img.pixels { image-rendering: pixelated; }
details { margin: .6rem 0; }
summary { cursor: pointer; }
@media print { body { max-width: none; } .pictures .prompt { break-after: avoid; } }
"""


def document(title: str, sections: Sequence[str]) -> str:
    """Put sections, already HTML, into a page."""
    body = "\n".join(sections)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n"
        "</body>\n</html>\n"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a table; cells are HTML, and a cell that begins with <td is taken as it is."""
    lines = ["<table>", "<thead><tr>", *(f"<th>{cell}</th>" for cell in head), "</tr></thead>"]
    for row in rows:
        cells = (cell if cell.startswith("<td") else f"<td>{cell}</td>" for cell in row)
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return "\n".join([*lines, "</table>"])


def embedded(image: Image, text: str) -> str:
    """Write a picture into the page itself, small ones enlarged, large ones reduced.

    Args:
        image: The picture.
        text: What it says of itself to those who do not see it, and under the pointer.
    """
    data, factor = io.BytesIO(), _zoom(image)
    if factor < 1:
        image.reduce(max(1, int(1 / factor))).save(data, "JPEG", quality=90)
    else:
        image.save(data, "PNG")
    kind = "jpeg" if factor < 1 else "png"
    url = f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode()}"
    pixels = ' class="pixels"' if factor > 1 else ""
    return (
        f'<img{pixels} src="{url}" width="{round(image.width * factor)}" '
        f'height="{round(image.height * factor)}" alt="{escape(text)}" title="{escape(text)}">'
    )


def fitting(image: Image, columns: int) -> int:
    """Say how many such pictures stand side by side in each of so many columns of the page."""
    return max(1, int(WIDTH / columns / (image.width * _zoom(image) + 4)))


def _zoom(image: Image) -> float:
    longer: int = max(image.size)
    return _LARGE / longer if longer > _LARGE else max(1, _SMALL // longer)


def chart(figure: Any) -> str:
    """Write a figure into the page as SVG."""
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "zsnr"}):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(text, format="svg", metadata=nothing)
    svg = text.getvalue()
    return f"<figure>{svg[svg.index('<svg') :]}</figure>"
