"""An HTML page as a browser has it: what it would load, show and run."""

from html.parser import HTMLParser

VOID = {"meta", "img", "br", "hr", "input", "wbr"}
NEVER = {"script", "link", "iframe", "object", "embed", "base", "audio", "video", "form", "input"}
ADDRESSES = ("src", "href", "xlink:href", "srcset", "data", "action", "poster")

HOSTILE = "<script>alert(1)</script> \"q\" 'a' onload=x \x1b[31m \u202egpj.exe {{ 7 * 7 }} [x](y) |"
"""What a prompt, a caption, a file name or a title of somebody else may be."""


class Page(HTMLParser):
    """Parse a page, which must be well formed, stand alone and run nothing.

    Attributes:
        text: All that is shown, with single spaces.
        rows: The cells of each row of each table.
        headings: Of all levels.
        captions: Of figures, in their order.
        images: Attributes of each <img>.
        svgs: The text of each <svg>.
    """

    def __init__(self, path):
        super().__init__()
        self.open, self.images = [], []
        self._texts, self._rows, self._headings, self._captions, self._svgs = [], [], [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []
        self.text = " ".join("".join(self._texts).split())
        self.rows = [[" ".join(cell.split()) for cell in row] for row in self._rows]
        self.headings, self.captions, self.svgs = (
            [" ".join(each.split()) for each in texts]
            for texts in (self._headings, self._captions, self._svgs)
        )

    def handle_starttag(self, tag, attributes):
        self._check(tag, dict(attributes))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self._rows.append([])
        for tags, texts in self._parts():
            if tag in tags:
                texts.append("")

    def handle_startendtag(self, tag, attributes):
        self._check(tag, dict(attributes))

    def _check(self, tag, attributes):
        assert tag not in NEVER
        assert not any(name.startswith("on") for name in attributes)
        for name in ADDRESSES:
            assert attributes.get(name, "#").startswith(("#", "data:image/"))
        assert "url(" not in attributes.get("style", "").replace("url(#", "")
        if tag == "img":
            assert attributes["alt"]
            self.images.append(attributes)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"style", "title"} & set(self.open):
            assert "url(" not in data.replace("url(#", "")
            return
        self._texts.append(data)
        for tags, texts in self._parts():
            if tags & set(self.open):
                texts[-1] += data

    def _parts(self):
        yield {"h1", "h2", "h3"}, self._headings
        yield {"figcaption"}, self._captions
        yield {"svg"}, self._svgs
        if self._rows:
            yield {"td", "th"}, self._rows[-1]

    def row(self, name, *, last=False):
        """Find the first (or last) row whose first cell begins with a name."""
        rows = [row for row in self.rows if row and row[0].startswith(name)]
        return rows[-1 if last else 0]
