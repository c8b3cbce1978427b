"""Inputs for benchmarks/fuzz.py: small valid files of each format, and structured damage.

Everything is a function of a `Draw`, whose seed is (seed, reader, number). There are two kinds of
damage: to the format's structure (a value of a JSON, an opcode of a pickle, a member of a tar, a
chunk of a PNG with a correct checksum) and to bytes (flips, truncation, splices, special integers,
repeats).
"""

from __future__ import annotations

import copy
import gzip
import io
import json
import os
import pickletools
import random
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

NUMBERS = (
    *(0, 1, -1, 2, 7, 63, 127, 128, 255, 256, 1000, 4095, 65535, 65536, 100_001, 999_983),
    *(2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, -(2**31), -(2**63)),
)
FLOATS = (0.0, -0.0, 0.5, 1e-320, 1e308, -1e308, float("inf"), float("-inf"), float("nan"))
TEXTS = (
    *("", " ", "x", "None", "true", "1e999", "-1", "999999999999999999999", "a" * 300, "a\nb\r\nc"),
    *(
        "\x1b[31mred\x1b[0m",
        "\x1b]0;title\x07",
        "\u202egnp.exe\u2066",
        "nul\x00",
        "\x9b5n",
        "\ud800",
    ),
    *(
        "../../../outside",
        "/tmp/outside",
        "~",
        "pipe:touch outside",
        "http://127.0.0.1:1/x",
        "%s{0}",
    ),
    *("zsnr.files.replacing", "os.system", "builtins.eval", "\u2028", "\ufeff", "e\u0301" * 50),
)


class Raw(str):
    """Text that is written to a JSON or YAML file verbatim."""

    __slots__ = ()


_JSON_RAW: tuple[Callable[[], str], ...] = (
    lambda: "NaN",
    lambda: "-Infinity",
    lambda: "1E400",
    lambda: "1" + "0" * 400,
    lambda: "-" + "9" * 5000,
    lambda: '"\\ud800"',
    lambda: '{"a": 1, "a": 2}',
    lambda: "[" * 500 + "]" * 500,
    lambda: "[" * 200_000,
    lambda: '{"a":' * 100_000 + "1" + "}" * 100_000,
    lambda: "[" + "0," * 300_000 + "0]",
    lambda: '"' + "a" * 2_000_000 + '"',
    lambda: "01",
    lambda: "'text'",
    lambda: "\x00",
)
_YAML_WORDS = (
    *("0x1F", "0o17", "1_000", "1:30:30", ".inf", "-.inf", ".nan", "1e-4", "2024-01-01", "~"),
    *("yes", "!!binary aGVsbG8=", "!!set {a, b}", "!!timestamp 2024", "*unknown", "&a [*a]"),
    *('!!python/object/apply:os.system ["touch outside"]', "!!python/name:os.system", "!x y"),
    *("!!int x", "!!float 1:99999999999999", "!!omap [a: 1]", "? [a, b]", "{<<: {a: 1}}"),
    *("{<<: 3}", "{? {a: 1} : 2}", "[1, 2", "1" + "0" * 400, "- a\n- b", "\t", "%", "@", "|\n a"),
)
_YAML_RAW: tuple[Callable[[], str], ...] = (
    *(partial(str, word) for word in _YAML_WORDS),
    lambda: "[" * 3000 + "]" * 3000,
    lambda: (
        "["
        + ",".join(["&a0 [x]"] + [f"&a{i} [{','.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 25)])
        + "]"
    ),
    lambda: "[" + "a, " * 50_000 + "a]",
)


class Draw(random.Random):
    """The random source of one input."""

    def chance(self, probability: float) -> bool:
        return self.random() < probability

    def number(self) -> int:
        return self.choice(NUMBERS) + self.choice((0, 0, 0, 1, -1))

    def text(self) -> str:
        return self.choice(TEXTS)

    def odd(self, raw: Sequence[Callable[[], str]] = ()) -> Any:
        """Draw an unexpected value."""
        kind = self.randrange(10)
        if raw and kind < 3:
            return Raw(self.choice(raw)())
        if kind < 5:
            return self.number()
        if kind < 6:
            return self.choice(FLOATS)
        if kind < 8:
            return self.text()
        return self.choice(
            (None, True, False, [], {}, [[]], [1, "a", None], {"a": {"b": []}}, [0] * 1000, 10**400)
        )


def damaged(draw: Draw, value: Any, raw: Sequence[Callable[[], str]] = ()) -> Any:
    """Change one to three places of a plain value."""
    value = copy.deepcopy(value)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        places = list(_places(value))
        if not places or draw.chance(0.02):
            return draw.odd(raw)
        container, key = draw.choice(places)
        old = container[key]
        match draw.randrange(9):
            case 0 | 1 | 2 | 3:
                container[key] = draw.odd(raw)
            case 4:
                del container[key]
            case 5:
                container[key] = draw.choice(([old], {"a": old}, [old] * 3, str(old)))
            case 6 if isinstance(container, dict):
                container[draw.text()] = draw.odd(raw)
            case 7 if isinstance(old, (int, float)):
                container[key] = draw.choice(
                    (-old, old + 1, old * 1000, str(old), bool(old), draw.choice(NUMBERS))
                )
            case 8:
                container[key] = draw.choice(places)[0]
                if _circular(value):
                    container[key] = old
            case _:
                container[key] = draw.choice([c[k] for c, k in places])
                if _circular(value):
                    container[key] = old
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, child in items:
        yield value, key
        yield from _places(child)


def _circular(value: Any, above: tuple[int, ...] = ()) -> bool:
    if id(value) in above or len(above) > 40:
        return True
    children = (
        value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    )
    return any(_circular(child, (*above, id(value))) for child in children)


def to_json(draw: Draw | None, value: Any) -> bytes:
    """Write a value as JSON; with a draw, some keys are repeated."""
    text = _json(draw, value)
    return text.encode("utf-8", "surrogatepass")


def _json(draw: Draw | None, value: Any) -> str:
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, dict):
        pairs = [f"{json.dumps(str(key))}: {_json(draw, item)}" for key, item in value.items()]
        if draw is not None and pairs and draw.chance(0.02):
            pairs.append(draw.choice(pairs))
        return "{" + ", ".join(pairs) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_json(draw, item) for item in value) + "]"
    if type(value) is int and abs(value) > 10**300:
        return f"1{'0' * 400}"
    return json.dumps(value, ensure_ascii=draw is None or draw.chance(0.7))


def json_bytes(draw: Draw, value: Any, valid: bool) -> bytes:
    """Write a JSON file, damaged unless `valid`."""
    if valid:
        return to_json(None, value)
    data = to_json(draw, damaged(draw, value, _JSON_RAW))
    if draw.chance(0.1):
        data = draw.choice((b"\xef\xbb\xbf", b"\xff\xfe", b"\n\n", b"[", b"#x\n")) + data
    return damaged_bytes(draw, data) if draw.chance(0.15) else data


def json_lines(draw: Draw, values: Sequence[Any], valid: bool) -> bytes:
    """Write one JSON per line, some of them damaged unless `valid`."""
    hurt = set() if valid else {draw.randrange(len(values)) for _ in range(draw.randint(1, 3))}
    lines = [json_bytes(draw, value, i not in hurt) for i, value in enumerate(values)]
    data = (b"\n" if valid else draw.choice((b"\n", b"\n", b"\r\n", b"\n\n"))).join(lines) + b"\n"
    return data if valid or draw.chance(0.9) else damaged_bytes(draw, data)


def yaml_bytes(draw: Draw, value: Any, valid: bool) -> bytes:
    """Write a YAML file, damaged unless `valid`."""
    import yaml

    if valid:
        return str(yaml.safe_dump(value, sort_keys=False)).encode()
    raw = _YAML_RAW if draw.chance(0.8) else _JSON_RAW
    data = _json(draw, damaged(draw, value, raw)).encode("utf-8", "surrogatepass")
    if draw.chance(0.1):
        data += draw.choice((b"\n---\na: 1\n", b"\n...\n", b"\nx: y", b"# \x00", b"\xff"))
    return damaged_bytes(draw, data) if draw.chance(0.1) else data


def damaged_bytes(draw: Draw, data: bytes) -> bytes:
    """Damage bytes without knowing what they are."""
    out = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 4, 16))):
        place = draw.randrange(len(out) + 1)
        length = min(len(out) - place, draw.choice((1, 2, 4, 8, 64, 1000)))
        match draw.randrange(7):
            case 0 | 1 if place < len(out):
                out[place] ^= 1 << draw.randrange(8)
            case 2:
                del out[place:]
            case 3:
                del out[place : place + length]
            case 4:
                out[place : place + length] = out[place : place + length] * draw.choice((2, 3, 50))
            case 5:
                kind = draw.choice(("<B", "<H", ">H", "<I", ">I", "<Q", ">Q"))
                size = struct.calcsize(kind)
                out[place : place + size] = struct.pack(kind, draw.number() % 256**size)
            case _:
                other = draw.randrange(len(out) + 1)
                out[place : place + length] = out[other : other + length]
    return bytes(out)


def write(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files by their names inside a folder."""
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def damaged_place(draw: Draw, path: Path) -> None:
    """Replace a file by something else: a pipe, a folder, a link, a huge sparse file."""
    data = path.read_bytes()
    path.unlink()
    match draw.randrange(7):
        case 0:
            os.mkfifo(path)
        case 1:
            path.mkdir()
        case 2:
            path.symlink_to(
                draw.choice(("nothing", path.name, "/dev/zero", "..", "/etc/hostname", "loop/loop"))
            )
        case 3:
            path.touch()
        case 4:
            path.write_bytes(data)
            os.truncate(path, draw.choice((len(data) + 1, 1 << 20, 3 << 30)))
        case 5:
            path.write_bytes(gzip.compress(data, mtime=0))
        case _:
            path.write_bytes(data + data)


# Images


@cache
def _image(kind: str, variant: int) -> bytes:
    """Encode a small image; equal arguments give equal bytes."""
    from PIL import Image, PngImagePlugin

    draw = random.Random(f"{kind} {variant}")
    side = draw.choice((1, 7, 16, 33)), draw.choice((1, 8, 20, 40))
    modes = {
        "JPEG": ("RGB", "L", "CMYK"),
        "PNG": ("RGB", "L", "RGBA", "P", "1", "LA", "I;16"),
        "WEBP": ("RGB", "RGBA"),
        "GIF": ("P", "L"),
        "TIFF": ("RGB", "L", "I;16", "CMYK", "1"),
        "BMP": ("RGB", "L", "1"),
    }
    mode = draw.choice(modes[kind])
    wide = {"I;16": 2, "RGB": 3, "RGBA": 4, "LA": 2, "CMYK": 4}.get(mode, 1)
    if mode == "1":
        image = Image.new("1", side)
    else:
        image = Image.frombytes(mode, side, draw.randbytes(side[0] * side[1] * wide))
    options: dict[str, Any] = {}
    exif = Image.Exif()
    exif[0x0112] = draw.randint(0, 9)
    if kind in ("JPEG", "WEBP", "PNG", "TIFF") and draw.random() < 0.4:
        options["exif"] = exif.tobytes()
    if kind in ("JPEG", "PNG", "WEBP", "TIFF") and draw.random() < 0.3 and mode in ("RGB", "RGBA"):
        from PIL import ImageCms

        options["icc_profile"] = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    if kind == "JPEG":
        options |= {"quality": draw.randint(1, 95), "progressive": draw.random() < 0.5}
    if kind == "WEBP":
        options["lossless"] = draw.random() < 0.5
    if kind == "PNG":
        info = PngImagePlugin.PngInfo()
        for _ in range(draw.randint(0, 3)):
            info.add_text("Comment", "text " * draw.randint(0, 99), zip=draw.random() < 0.5)
        options["pnginfo"] = info
        if mode == "P" and draw.random() < 0.5:
            options["transparency"] = 0
    if kind in ("GIF", "WEBP", "PNG", "TIFF") and draw.random() < 0.3 and mode in ("RGB", "P", "L"):
        options |= {"save_all": True, "append_images": [image.rotate(180)] * draw.randint(1, 3)}
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


IMAGE_KINDS = {
    **{"jpg": "JPEG", "jfif": "JPEG", "png": "PNG", "webp": "WEBP", "gif": "GIF"},
    **{"bmp": "BMP", "tif": "TIFF"},
}


def image_bytes(draw: Draw, suffix: str, valid: bool) -> bytes:
    """Draw an encoded image, damaged unless `valid`."""
    kind = IMAGE_KINDS[suffix]
    if not valid and draw.chance(0.1):
        kind = draw.choice(("TIFF", "BMP", *IMAGE_KINDS.values()))
    data = _image(kind, draw.randrange(60))
    if valid:
        return data
    if draw.chance(0.3):
        return damaged_bytes(draw, data)
    if kind == "PNG":
        return _png(draw, data)
    if kind == "JPEG":
        return _jpeg(draw, data)
    if kind == "WEBP":
        return _webp(draw, data)
    place = draw.choice((6, 8, 10, 4, 12, 18, 22, draw.randrange(len(data) - 4)))
    code = draw.choice(("<H", "<I"))
    size = struct.calcsize(code)
    return data[:place] + struct.pack(code, draw.number() % 256**size) + data[place + size :]


def png_chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    chunks, place = [], 8
    while place < len(data):
        (length,) = struct.unpack(">I", data[place : place + 4])
        chunks.append((data[place + 4 : place + 8], data[place + 8 : place + 8 + length]))
        place += 12 + length
    return chunks


def png_file(chunks: Sequence[tuple[bytes, bytes]]) -> bytes:
    out = [b"\x89PNG\r\n\x1a\n"]
    for kind, body in chunks:
        out.append(struct.pack(">I", len(body)) + kind + body)
        out.append(struct.pack(">I", zlib.crc32(kind + body)))
    return b"".join(out)


@cache
def _zeros(size: int) -> bytes:
    packer = zlib.compressobj(9)
    block = bytes(1 << 20)
    parts = [
        packer.compress(block[: min(len(block), size - i)]) for i in range(0, size, len(block))
    ]
    return b"".join([*parts, packer.flush()])


def _png(draw: Draw, data: bytes) -> bytes:
    chunks = png_chunks(data)
    head = bytearray(chunks[0][1])
    match draw.randrange(10):
        case 0 | 1:  # a size that does not match the pixels
            side = draw.choice((0, 1, 3, 8000, 65535, 2**24, 2**31 - 1, 2**32 - 1))
            place = draw.choice((0, 4))
            head[place : place + 4] = struct.pack(">I", side)
        case 2:  # bit depth, color type, compression, filter, interlace
            head[draw.randrange(8, 13)] = draw.choice((0, 1, 2, 3, 4, 6, 7, 8, 16, 255))
        case 3:
            bomb = _zeros(draw.choice((1 << 20, 100 << 20)))
            kind, body = draw.choice(
                ((b"zTXt", b"Comment\0\0"), (b"iCCP", b"icc\0\0"), (b"iTXt", b"XML\0\1\0\0\0"))
            )
            chunks.insert(1, (kind, body + bomb))
        case 4:
            chunks[1:1] = [(b"tEXt", b"Comment\0" + b"x" * draw.choice((10, 10**6)))] * draw.choice(
                (1, 90)
            )
        case 5 if draw.chance(0.2):  # large and valid
            head = bytearray(struct.pack(">IIBBBBB", 7900, 8000, 16, draw.choice((0, 2)), 0, 0, 0))
            wide = 1 + 7900 * (2 if head[9] == 0 else 6)
            chunks = [chunks[0], (b"IDAT", _zeros(8000 * wide)), (b"IEND", b"")]
        case 6:
            place = draw.randrange(len(chunks))
            chunks.insert(draw.randrange(len(chunks) + 1), chunks[place])
        case 7:
            del chunks[draw.randrange(len(chunks))]
        case 8:
            frames = struct.pack(">II", draw.number() % 2**32, 0)
            chunks.insert(
                1, (draw.choice((b"acTL", b"eXIf", b"tRNS", b"PLTE", b"gAMA", b"cHRM")), frames)
            )
        case _:
            place = draw.randrange(len(chunks))
            kind, body = chunks[place]
            chunks[place] = (kind, damaged_bytes(draw, body))
    if chunks and chunks[0][0] == b"IHDR":
        chunks[0] = (b"IHDR", bytes(head))
    return png_file(chunks)


def _jpeg(draw: Draw, data: bytes) -> bytes:
    """Change the segments of a JPEG; a start of scan includes the data after it."""
    segments, place = [], 2
    while place + 4 <= len(data) and data[place] == 0xFF and data[place + 1] != 0xD9:
        (length,) = struct.unpack(">H", data[place + 2 : place + 4])
        end = place + 2 + length
        if data[place + 1] == 0xDA:
            while not (data[end] == 0xFF and data[end + 1] not in (0, *range(0xD0, 0xD8))):
                end += 1
        segments.append(data[place:end])
        place = end
    match draw.randrange(9):
        case 0 | 1:
            sizes = [i for i, s in enumerate(segments) if s[1] in (0xC0, 0xC1, 0xC2)]
            i = draw.choice(sizes)
            side = struct.pack(">H", draw.choice((0, 1, 8000, 65535)))
            at = draw.choice((5, 7))
            segments[i] = segments[i][:at] + side + segments[i][at + 2 :]
        case 2:
            body = draw.choice((b"Exif\0\0", b"ICC_PROFILE\0\1\xff", b"Adobe\0", b"MPF\0", b""))
            body += damaged_bytes(draw, b"II*\0\x08\0\0\0\x01\0\x12\x01\3\0\1\0\0\0\6\0\0\0" * 3)
            mark = bytes([0xFF, draw.choice((0xE0, 0xE1, 0xE2, 0xED, 0xEE, 0xFE))])
            segments.insert(0, mark + struct.pack(">H", len(body) + 2) + body)
        case 3 if draw.chance(0.3):  # each scan takes time, but few bytes
            large = _many_scans()
            return large[:-2] + (large[large.rindex(b"\xff\xda") : -2]) * 4000 + b"\xff\xd9"
        case 4:
            segments.insert(draw.randrange(len(segments)), draw.choice(segments))
        case 5:
            del segments[draw.randrange(len(segments))]
        case 6:
            segments += [segments[-1]] * draw.choice((1, 50))
        case _:
            i = draw.randrange(len(segments))
            segments[i] = damaged_bytes(draw, segments[i])
    return b"\xff\xd8" + b"".join(segments) + b"\xff\xd9"


@cache
def _many_scans() -> bytes:
    from PIL import Image

    data = io.BytesIO()
    Image.new("RGB", (2000, 2000), (60, 150, 60)).save(data, "JPEG", progressive=True)
    return data.getvalue()


def _webp(draw: Draw, data: bytes) -> bytes:
    out = bytearray(data)
    place = draw.choice((4, 16, 20, 24, 27, 26, 28, draw.randrange(12, len(out))))
    match draw.randrange(4):
        case 0:
            out[place : place + 4] = struct.pack("<I", draw.number() % 2**32)
        case 1:
            out[12:16] = draw.choice((b"VP8 ", b"VP8L", b"VP8X", b"ANIM", b"EXIF"))
        case 2:
            body = draw.randbytes(draw.choice((0, 3, 400)))
            out += draw.choice((b"EXIF", b"XMP ", b"ICCP")) + struct.pack("<I", len(body)) + body
        case _:
            return damaged_bytes(draw, data)
    return bytes(out)


# Tar files


def tar_member(name: bytes, data: bytes, *, kind: bytes = b"0", size: bytes | None = None) -> bytes:
    """Write a member with a correct checksum, whatever its header contains."""
    size_field = b"%011o\0" % len(data) if size is None else size
    header = (
        name[:100].ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + size_field.ljust(12, b"\0")
    )
    header += (
        b"00000000000\0" + b" " * 8 + kind + bytes(100) + b"ustar\00000" + bytes(32 + 32 + 16 + 155)
    )
    header = header.ljust(512, b"\0")
    header = header[:148] + b"%06o\0 " % sum(header) + header[156:]
    return header + data + bytes(-len(data) % 512)


def pax(records: Mapping[str, str], kind: bytes = b"x") -> bytes:
    """Write a PAX header of records."""
    body = b""
    for key, value in records.items():
        rest = (
            b" "
            + key.encode("utf-8", "surrogatepass")
            + b"="
            + value.encode("utf-8", "surrogatepass")
            + b"\n"
        )
        length = len(rest) + 1
        while len(str(length)) + len(rest) != length:
            length = len(str(length)) + len(rest)
        body += str(length).encode() + rest
    return tar_member(b"PaxHeader", body, kind=kind)


def shard(draw: Draw, valid: bool, count: int = 3, image: str | None = None) -> bytes:
    """Write a shard of images with captions and json; damaged unless it is to be valid."""
    members: list[bytes] = []
    hurt = None if valid else draw.randrange(3 * count)
    level = draw.randrange(4)
    for i in range(count):
        suffix = image or draw.choice(tuple(IMAGE_KINDS))
        record = {
            "caption": f"a cat {i}",
            "width": i,
            "score": 0.5 * i,
            "tags": ["a", "b"],
            "ok": True,
        }
        whole = hurt is None or level > 1
        parts = (
            (suffix, image_bytes(draw, suffix, whole or hurt != 3 * i)),
            (
                "txt",
                b"a cat" if whole or hurt != 3 * i + 1 else damaged_bytes(draw, b"a c\xc3\xa9t"),
            ),
            ("json", json_bytes(draw, record, whole or hurt != 3 * i + 2)),
        )
        members += [tar_member(f"{i:05d}.{name}".encode(), data) for name, data in parts]
    if hurt is None or level < 2:
        return b"".join(members) + bytes(1024)
    data = image_bytes(draw, "png", True)
    name = draw.choice(
        (
            *(
                b"00000.png",
                b"a/../../outside.png",
                b"/tmp/outside.png",
                b"UPPER.PNG",
                b"caf\xe9.png",
            ),
            *(
                b"\x1b[31m.png",
                b"a\nb.png",
                b".png",
                b"noext",
                b"a.b.c.png",
                b"x" * 100,
                b"",
                b"a.tar.gz",
            ),
        )
    )
    back = [
        b"-%010o\0" % n for n in (512, 1024, 1536, 2048)
    ]  # back to a header that was already read
    huge = [
        b"77777777777\0",
        b"\x80" + (2**62).to_bytes(11, "big"),
        b"\x80" + (2**33).to_bytes(11, "big"),
    ]
    wrong = [
        b"\xff" + (-(2**20) % 2**88).to_bytes(11, "big"),
        b"\xff" * 12,
        b"zzz",
        b" " * 12,
        b"0\0",
    ]
    sizes = draw.choice((back, huge, wrong))
    large = str(draw.choice((10**18, -1, -512, -1024, -1536, -(10**6), 2**63)))
    extra = draw.choice(
        (
            lambda: tar_member(name, data, size=draw.choice(sizes)),
            lambda: tar_member(
                name, b"", size=draw.choice(sizes), kind=draw.choice((b"1", b"2", b"5", b"6", b"S"))
            ),
            lambda: (
                tar_member(
                    b"././@LongLink",
                    b"n" * draw.choice((200, 10**6)),
                    kind=draw.choice((b"L", b"K")),
                )
                + tar_member(name, data)
            ),
            lambda: (
                tar_member(b"././@LongLink", b"", kind=b"L", size=draw.choice(sizes))
                + tar_member(name, data)
            ),
            lambda: pax({"path": draw.text() + ".png"}) + tar_member(name, data),
            lambda: pax({"size": large}) + tar_member(name, data),
            lambda: (
                pax(
                    {
                        "GNU.sparse.major": "1",
                        "GNU.sparse.minor": "0",
                        "GNU.sparse.name": "s.png",
                        "GNU.sparse.realsize": large,
                    }
                )
                + tar_member(name, data)
            ),
            lambda: (
                pax({"GNU.sparse.map": "0," + large, "GNU.sparse.size": large})
                + tar_member(name, data)
            ),
            lambda: (
                pax(
                    {"comment": "c" * draw.choice((10, 3 * 10**6)), "mtime": "nan"},
                    draw.choice((b"x", b"g")),
                )
                + tar_member(name, data)
            ),
            lambda: (
                tar_member(
                    b"PaxHeader", damaged_bytes(draw, b"20 path=a.png\n11 size=99\n"), kind=b"x"
                )
                + tar_member(name, data)
            ),
            lambda: tar_member(b"PaxHeader", b"x", kind=b"x", size=draw.choice(sizes)),
            lambda: pax({f"key{i}": "v" * 20 for i in range(3000)}) + tar_member(name, data),
            lambda: tar_member(
                name, data, kind=draw.choice((b"\0", b"7", b"A", b"\xff", b"3", b"4"))
            ),
            lambda: tar_member(name, data) * 2,
            lambda: b"".join(_with_own_fields(data)) if draw.chance(0.3) else bytes(512),
            lambda: gzip.compress(data, mtime=0),
            lambda: b"",
        )
    )()
    members.insert(draw.choice((0, draw.randrange(len(members) + 1))), extra)
    whole_tar = b"".join(members) + draw.choice(
        (bytes(1024), bytes(1024), b"", bytes(512), b"\1" * 512)
    )
    return damaged_bytes(draw, whole_tar) if draw.chance(0.2) else whole_tar


def _with_own_fields(image: bytes) -> Iterator[bytes]:
    """Write samples whose json files have different fields."""
    for i in range(2500):
        record = {f"field {i} {j}": j for j in range(4)}
        yield tar_member(b"%06d.png" % i, image)
        yield tar_member(b"%06d.json" % i, json.dumps({"caption": "a", **record}).encode())


# safetensors


def safetensors_bytes(
    draw: Draw,
    tensors: Mapping[str, tuple[str, Sequence[int], bytes]],
    metadata: Mapping[str, str],
    valid: bool,
) -> bytes:
    """Write {name: (dtype, shape, data)}; damaged unless it is to be valid."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    place = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [place, place + len(data)],
        }
        place += len(data)
    body = b"".join(data for _, _, data in tensors.values())
    if valid:
        text = to_json(None, header)
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text + body
    kind = draw.randrange(5)
    text = json_bytes(draw, header, kind == 0)
    length = len(text)
    if kind == 1 and draw.chance(0.3):
        length = draw.choice((0, 2**63, 2**64 - 1, 10**8, 10**8 + 1, length + 8, length - 1))
    data = struct.pack("<Q", length % 2**64) + text + body
    return damaged_bytes(draw, data) if kind == 0 or draw.chance(0.1) else data


# Pickles and zip archives


def opcodes(data: bytes) -> list[bytes]:
    """Split a pickle into its opcodes, each with its argument."""
    places = [place for _, _, place in pickletools.genops(data)] + [len(data)]
    return [data[a:b] for a, b in pairwise(places)]


def damaged_pickle(draw: Draw, data: bytes, names: Sequence[tuple[str, str]]) -> bytes:
    """Change the opcodes of a pickle.

    Args:
        draw: The draw.
        data: A valid pickle.
        names: Module and name of classes that readers may allow, which are called and modified.
    """
    codes = opcodes(data)
    for _ in range(draw.choice((1, 1, 2, 5))):
        place = draw.randrange(1, len(codes))
        match draw.randrange(9):
            case 0:
                del codes[place]
            case 1:
                codes.insert(place, codes[draw.randrange(len(codes))])
            case 2:
                codes[place] = codes[draw.randrange(len(codes))]
            case 3:
                codes.insert(
                    place, value_ops(draw, draw.odd()) + draw.choice((b"", b"0", b"q\x00"))
                )
            case 4:  # a class, with its attributes set
                codes.insert(1, _build_upon(draw, names) + b"0")
            case 5:
                codes.insert(
                    place,
                    _class(draw, names) + draw.choice((b"", b")R", b")\x81", b"N\x85R", b"0")),
                )
            case 6:  # lists that share lists: small here, exponential when printed
                codes.insert(
                    place, b"]" + b"(22e2" * draw.choice((3, 30)) + draw.choice((b"0", b""))
                )
            case 7:
                deep = draw.choice((100, 5000, 200_000))
                codes.insert(
                    place,
                    draw.choice((b"(" * deep + b"t" * deep, b"]" * deep + b"a" * (deep - 1)))
                    + b"0",
                )
            case _:
                codes[place] = damaged_bytes(draw, codes[place])
    return b"".join(codes)


def value_ops(draw: Draw, value: Any) -> bytes:
    """Write the opcodes that leave a value on the stack."""
    import pickle

    data = pickle.dumps(value, 2)
    return data[2:-1]


def _class(draw: Draw, names: Sequence[tuple[str, str]]) -> bytes:
    others = (("os", "system"), ("builtins", "eval"), ("builtins", "getattr"), ("pathlib", "Path"))
    module, name = draw.choice((*names, *names, *others))
    return f"c{module}\n{name}\n".encode()


def _build_upon(draw: Draw, names: Sequence[tuple[str, str]]) -> bytes:
    module, name = draw.choice(names)
    attributes = (
        "__init__",
        "parent",
        "name",
        "open",
        "__fspath__",
        "__str__",
        "relative_path",
        "size",
    )
    state = {draw.choice(attributes): draw.choice(("/tmp/outside", 1, None))}
    nothing = draw.choice((b"N", b"}"))
    return f"c{module}\n{name}\n".encode() + nothing + value_ops(draw, state) + b"\x86b"


def damaged_zip(draw: Draw, data: bytes, names: Sequence[tuple[str, str]]) -> bytes:
    """Change what torch.save wrote: its pickle, see `damaged_pickle`, or the archive around it."""
    members: list[tuple[str, bytes]] = []
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    packing = zipfile.ZIP_STORED
    match draw.randrange(8):
        case 0 | 1 | 2 | 3:
            chosen = next(i for i, (name, _) in enumerate(members) if name.endswith("data.pkl"))
            name, content = members[chosen]
            members[chosen] = (name, damaged_pickle(draw, content, names))
        case 4:
            packing = zipfile.ZIP_DEFLATED
            if draw.chance(0.3):
                members.append((members[0][0].partition("/")[0] + "/data/99", bytes(64 << 20)))
        case 5:
            i = draw.randrange(len(members))
            name, content = members[i]
            members[i] = draw.choice(
                (
                    (name + draw.text(), content),
                    ("../../outside", content),
                    (name, b""),
                    (name, damaged_bytes(draw, content)),
                )
            )
        case 6:
            del members[draw.randrange(len(members))]
        case _:
            return _damaged_tables(draw, data)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", packing) as archive:
        for name, content in members:
            archive.writestr(zipfile.ZipInfo(name.replace("\ud800", "?")), content, packing)
    return _damaged_tables(draw, out.getvalue()) if draw.chance(0.1) else out.getvalue()


def _damaged_tables(draw: Draw, data: bytes) -> bytes:
    """Change a field of a zip's headers or of its directory."""
    marks = [i for mark in (b"PK\1\2", b"PK\5\6", b"PK\3\4", b"PK\6\6") for i in _all(data, mark)]
    place = draw.choice(marks) + draw.randrange(4, 44)
    kind = draw.choice(("<H", "<I"))
    size = struct.calcsize(kind)
    return data[:place] + struct.pack(kind, draw.number() % 256**size) + data[place + size :]


def _all(data: bytes, mark: bytes) -> Iterator[int]:
    place = data.find(mark)
    while place >= 0:
        yield place
        place = data.find(mark, place + 1)
