"""HTML and Markdown from Jinja2 templates, in which every value is escaped.

Prompts, captions, file names and titles were often written by others. A value stays text in the
language of its template, whatever it holds: HTML is escaped in .html templates, Markdown and HTML
in .md templates, and in both the characters that steer a terminal or reorder text become visible
escapes, see `printable`. Only `markupsafe.Markup` is inserted as it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zsnr.untrusted import printable

if TYPE_CHECKING:
    from jinja2 import Environment

# An underscore inside a word is plain text in Markdown.
_MARKDOWN = re.compile(r"[\\`*\[\]|#~$]|(?<![^\W_])_|_(?![^\W_])")
_HTML = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


def render(template: Path, values: Mapping[str, Any]) -> str:
    """Render a template.

    Args:
        template: A file that ends in .html or .md. What it includes is in the same folder.
        values: What it names; a name that is missing is an error.
    """
    return _environment(template.parent, template.suffix).get_template(template.name).render(values)


def escape_markdown(text: str) -> str:
    """Escape text for one line of Markdown, such as a title or a cell of a table."""
    text = printable(re.sub(r"\s+", " ", text))
    text = "".join(_HTML.get(c, c) for c in text)
    return _MARKDOWN.sub(r"\\\g<0>", text)


@cache
def _environment(folder: Path, suffix: str) -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=_finalize_markdown if suffix == ".md" else _finalize_html,
    )
    environment.filters["number"] = lambda x, digits=3: f"{x:.{digits}f}"
    environment.filters["signed"] = lambda x, digits=3: f"{x:+.{digits}f}"
    return environment


def _finalize_html(value: Any) -> Any:
    return printable(value) if type(value) is str else value


def _finalize_markdown(value: Any) -> Any:
    from markupsafe import Markup

    # What is already Markup, such as the result of a macro, is inserted as it is.
    return value if hasattr(value, "__html__") else Markup(escape_markdown(str(value)))
