import errno
import io
import math
import os
import random
import struct
import threading
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import pytest
import tiny
import torch
from PIL import Image, ImageCms

from zsnr.data import colors, formats
from zsnr.data import images as module
from zsnr.data.formats import HeaderCut, image_size
from zsnr.data.images import decode_image, to_unit_range

ORIENTATION = 0x0112
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,  # what is stored; its reader turns it back
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def encoded(image, kind="PNG", **options):
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def exif(orientation):
    tags = Image.Exif()
    tags[ORIENTATION] = orientation
    return tags


def noise(height, width):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def planes(pixels):
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)


def png_chunks(header, *chunks):
    """A PNG from its header's values and (name, data) pairs."""
    parts = [(b"IHDR", struct.pack(">IIBBBBB", *header)), *chunks, (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in parts
    )


def photograph(size):
    from matplotlib.cbook import get_sample_data

    with Image.open(get_sample_data("grace_hopper.jpg", asfileobj=False)) as image:
        return image.convert("RGB").crop((0, 0, size, size))


def psnr(a, b):
    return 10 * math.log10(255**2 / (a.double() - b.double()).square().mean().item())


def profile(primaries=None, gamma=2.19921875):
    """An ICC profile of three primaries, or of grey."""

    def numbers(*values):
        return struct.pack(f">{len(values)}i", *(round(v * 65536) for v in values))

    def color(values):
        return b"XYZ \0\0\0\0" + numbers(*values)

    white, curve = (0.9642, 1, 0.8249), struct.pack(">4sxxxxIHxx", b"curv", 1, round(gamma * 256))
    tags = {b"wtpt": color(white)}
    for letter, values in zip(b"rgb", primaries or (), strict=False):
        tags |= {b"%cXYZ" % letter: color(values), b"%cTRC" % letter: curve}
    if primaries is None:
        tags[b"kTRC"] = curve
    end = 132 + 12 * len(tags)
    table = b""
    for name, data in tags.items():
        table += struct.pack(">4sII", name, end, len(data))
        end += len(data)
    space = b"RGB " if primaries else b"GRAY"
    head = struct.pack(">I4sI4s4s4s12s4s", end, b"", 2 << 24, b"mntr", space, b"XYZ ", b"", b"acsp")
    head = head.ljust(68, b"\0") + numbers(*white)
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + b"".join(tags.values())


ADOBE = profile(
    ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))
)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def near(image, color, within):
    return (image[:, 0, 0] - torch.tensor(color)).abs().max() <= within


def animation(kind, **options):
    frames = [Image.new("RGB", (12, 9), colour) for colour in ("red", "blue")]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)


@pytest.fixture(scope="module")
def files():
    """One picture of 40 x 30 (seen) in many encodings."""
    stored = photograph(512).resize((40, 30))
    alpha = stored.convert("RGBA")
    alpha.putalpha(stored.convert("L"))
    turned = {"exif": exif(6)}
    return {
        "jpeg": encoded(stored, "JPEG"),
        "progressive": encoded(stored, "JPEG", progressive=True),
        "turned jpeg": encoded(stored.rotate(90, expand=True), "JPEG", **turned),
        "cmyk": encoded(stored.convert("CMYK"), "JPEG"),
        "png": encoded(stored),
        "turned png": encoded(stored.rotate(90, expand=True), **turned),
        "palette": encoded(stored.quantize(), transparency=3),
        "alpha": encoded(alpha),
        "apng": encoded(stored, save_all=True, append_images=[alpha.convert("RGB").rotate(180)]),
        "webp": encoded(stored, "WEBP"),
        "lossless webp": encoded(alpha, "WEBP", lossless=True),
        "turned webp": encoded(stored.rotate(90, expand=True), "WEBP", **turned),
        "gif": encoded(stored, "GIF"),
        "animated gif": encoded(
            stored, "GIF", save_all=True, append_images=[stored.rotate(180)], transparency=0
        ),
    }


def test_images_are_resized_and_cropped_to_the_centre():
    pixels = np.zeros((20, 60, 3), dtype=np.uint8)
    pixels[:, 20:40] = 255
    image = decode_image(encoded(Image.fromarray(pixels)), 20, 20)
    assert (image.dtype, image.shape, image.is_contiguous()) == (torch.uint8, (3, 20, 20), True)
    assert image.min() == 255
    fine = np.indices((64, 64)).sum(0) % 2 * 255  # a checkerboard averages to grey
    small = decode_image(encoded(Image.fromarray(fine.astype(np.uint8))), 16, 16)
    assert 116 < small.min() <= small.max() < 140


def test_a_picture_of_the_size_asked_keeps_its_values():
    pixels = noise(7, 10)
    data = encoded(Image.fromarray(pixels))
    assert torch.equal(decode_image(data, 7, 10), planes(pixels))
    assert torch.equal(decode_image(data, 7, 10, flip=True), planes(pixels[:, ::-1]))
    decode_image(data, 7, 10).add_(1)  # its own memory, and writable
    one = decode_image(encoded(Image.fromarray(pixels[:1, :1])), 1, 1)
    assert one.add_(0).flatten().tolist() == pixels[0, 0].tolist()


def test_a_crop_alone_keeps_its_values():
    pixels = noise(8, 13)
    data = encoded(Image.fromarray(pixels))
    for across, left in ((0.0, 0), (0.4, 2), (1.0, 5)):
        wanted = planes(pixels[:, left : left + 8])
        assert torch.equal(decode_image(data, 8, 8, crop=(0.5, across)), wanted)
        flipped = decode_image(data, 8, 8, crop=(0.5, across), flip=True)
        assert torch.equal(flipped, wanted.flip(2))
    for down, top in ((0.0, 0), (1.0, 3)):
        assert torch.equal(
            decode_image(data, 5, 13, crop=(down, 0.5)), planes(pixels[top : top + 5])
        )


@pytest.mark.parametrize("size", [(30, 45), (64, 96), (90, 135), (1, 1), (32, 300)])
def test_scaling_is_pillows_antialiased_bicubic_within_a_level(size):
    height, width = size
    image = photograph(512).resize((96, 64))
    scale = max(height / 64, width / 96)
    h, w = min(64, round(height / scale)), min(96, round(width / scale))
    top, left = round((64 - h) / 2), round((96 - w) / 2)
    part = image.crop((left, top, left + w, top + h))
    wanted = planes(np.asarray(part.resize((width, height), Image.Resampling.BICUBIC))).int()
    assert (decode_image(encoded(image), height, width).int() - wanted).abs().max() <= 1


@pytest.mark.parametrize(
    ("mode", "colour", "wanted"),
    [
        ("RGB", (255, 0, 0), (255, 0, 0)),
        ("L", 77, (77, 77, 77)),
        ("RGBA", (255, 0, 0, 255), (255, 0, 0)),
        ("RGBA", (255, 0, 0, 0), (255, 255, 255)),
        ("RGBA", (255, 0, 0, 51), (255, 204, 204)),
        ("LA", (0, 0), (255, 255, 255)),
        ("P", 0, (0, 0, 0)),
        ("1", 1, (255, 255, 255)),
        ("I;16", 65535, (255, 255, 255)),
        ("I;16", 0, (0, 0, 0)),
        ("I;16", 128 * 257, (128, 128, 128)),
    ],
)
def test_modes(mode, colour, wanted):
    data = tiny.png(colour, mode=mode)
    for height, width in ((24, 20), (4, 4)):
        image = decode_image(data, height, width)
        assert torch.equal(image, torch.tensor(wanted).view(3, 1, 1).expand(3, height, width))


def test_sixteen_bits_a_channel():
    levels = np.arange(256).reshape(8, 32)
    row = np.stack([levels, 255 - levels, levels], axis=-1) * 257
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in row)
    data = png_chunks((32, 8, 16, 2, 0, 0, 0), (b"IDAT", zlib.compress(lines)))
    assert torch.equal(decode_image(data, 8, 32), planes((row // 257).astype(np.uint8)))
    grey = encoded(Image.fromarray((levels * 257).astype(np.uint16)))
    assert torch.equal(decode_image(grey, 8, 32)[1], torch.from_numpy(levels).byte())


def test_transparent_colours_are_white():
    palette = Image.new("P", (4, 2))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    image = decode_image(encoded(palette, transparency=0), 2, 4)
    assert image[:, 0, 0].tolist() == [255, 255, 255]
    assert image[:, 0, 1].tolist() == [40, 50, 60]
    keyed = Image.new("RGB", (4, 2), (1, 2, 3))
    keyed.putpixel((1, 0), (1, 2, 4))
    image = decode_image(encoded(keyed, transparency=(1, 2, 3)), 2, 4)
    assert image[:, 0, 0].tolist() == [255, 255, 255]
    assert image[:, 0, 1].tolist() == [1, 2, 4]


def test_inverted_cmyk():
    cyan = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    data = encoded(cyan, "JPEG", quality=100)
    assert b"Adobe" in data  # whose CMYK is stored inverted
    assert decode_image(data, 16, 16)[:, 8, 8].tolist() == [0, 255, 255]
    assert decode_image(data, 4, 4)[:, 2, 2].tolist() == [0, 255, 255]


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_the_first_frame_of_an_animation(kind):
    data = animation(kind, **({"lossless": True} if kind == "WEBP" else {}))
    assert image_size(data) == (9, 12)
    assert decode_image(data, 9, 12)[:, 4, 4].tolist() == [255, 0, 0]


@pytest.mark.parametrize(
    "kind", ["BMP", "TIFF", "JPEG2000", "PPM", "QOI", "SGI", "PCX", "TGA", "AVIF", "MPO", "PSD"]
)
def test_what_pillow_reads_is_read(kind):
    pixels = np.asarray(photograph(512).resize((40, 30)))
    if kind == "PSD":  # which Pillow reads and does not write
        header = struct.pack(">4sH6xHIIHH", b"8BPS", 1, 3, 30, 40, 8, 3)
        data = header + bytes(12) + bytes(2) + pixels.transpose(2, 0, 1).tobytes()
    else:
        data = encoded(Image.fromarray(pixels), kind)
    assert image_size(data) == (30, 40)
    assert (decode_image(data, 30, 40).double() - planes(pixels)).abs().mean() < 12
    assert decode_image(data, 15, 20).shape == (3, 15, 20)
    for end in range(18, len(data), 97):  # the index reads the first bytes, then more
        with suppress(HeaderCut):
            assert image_size(data[:end]) == (30, 40)


def test_a_tiff_is_turned_once():
    seen = Image.fromarray(noise(8, 13))
    for orientation, turn in TURNS.items():
        data = encoded(seen.transpose(turn), "TIFF", exif=exif(orientation))
        assert image_size(data) == (8, 13)
        assert torch.equal(decode_image(data, 8, 13), planes(seen))


def test_floating_point_levels_are_refused():
    data = encoded(Image.new("F", (8, 8), 0.5), "TIFF")
    for call in (image_size, lambda data: decode_image(data, 8, 8)):
        with pytest.raises(ValueError, match="wanted levels of 8 or 16 bits"):
            call(data)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_colors_of_a_profile_become_those_of_srgb(kind):
    green = Image.new("RGB", (16, 16), (60, 150, 60))
    options = {"quality": 100} if kind in ("JPEG", "WEBP") else {}
    data = encoded(green, kind, icc_profile=ADOBE, **options)
    for size in ((16, 16), (8, 8), (32, 32), (7, 16)):
        assert near(decode_image(data, *size), (0, 151, 48), 4)
    assert decode_image(data, 8, 8, flip=True).is_contiguous()
    plain = encoded(Image.fromarray(noise(16, 16)))
    tagged = encoded(Image.fromarray(noise(16, 16)), icc_profile=SRGB)
    wide = encoded(Image.fromarray(noise(16, 16)), icc_profile=ADOBE)
    for size in ((16, 16), (8, 8)):  # the profile of sRGB changes nothing
        assert torch.equal(decode_image(tagged, *size), decode_image(plain, *size))
        assert not torch.equal(decode_image(wide, *size), decode_image(plain, *size))


def test_profiles_of_other_modes():
    linear = profile(gamma=1)
    for mode in ("L", "LA", "I;16"):
        level = {"L": 60, "LA": (60, 255), "I;16": 60 * 257}[mode]
        data = encoded(Image.new(mode, (8, 8), level), icc_profile=linear)
        for size in (8, 4):
            assert near(decode_image(data, size, size), (133, 133, 133), 1), mode
    grey = encoded(Image.new("L", (8, 8), 60), icc_profile=ADOBE)  # r = g = b of three primaries
    assert near(decode_image(grey, 4, 4), (60, 60, 60), 3)
    palette = encoded(Image.new("RGB", (8, 8), (60, 150, 60)).quantize(4), icc_profile=ADOBE)
    assert near(decode_image(palette, 8, 8), (0, 151, 48), 4)
    clear = encoded(Image.new("RGBA", (8, 8), (60, 150, 60, 0)), icc_profile=ADOBE)
    assert near(decode_image(clear, 8, 8), (255, 255, 255), 1)


@pytest.mark.parametrize(
    ("mode", "content", "reason"),
    [
        ("RGB", b"junk" * 100, "cannot open"),
        ("RGB", profile(), "it is for GRAY, but the image is RGB"),
        ("CMYK", ADOBE, "it is for RGB, but the image is CMYK"),
        ("RGB", ADOBE[:200], ""),
        ("RGB", bytes(5 << 20), "it is too large"),
    ],
)
def test_a_profile_that_does_not_fit_is_ignored_and_the_image_is_not(mode, content, reason):
    image = Image.fromarray(noise(16, 16)).convert(mode)
    colors._to_srgb.cache_clear()
    with pytest.warns(UserWarning, match=f"color profile of an image is ignored: .*{reason}"):
        found = decode_image(encoded(image, "TIFF", icc_profile=content), 16, 16)
    assert torch.equal(found, decode_image(encoded(image, "TIFF"), 16, 16))


@pytest.mark.filterwarnings("ignore:The embedded color profile")
@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_large_texts_and_profiles_do_not_make_pixels_unreadable(packed, behind):
    text = b"workflow\0" + (b"\0" + zlib.compress(b"node" * 10**6) if packed else b"x" * 10**7)
    many = (b"tEXt", b"key\0" + b"y" * 500_000)
    international = b"workflow\0" + bytes([packed]) + b"\0\0\0"
    international += zlib.compress(b"node" * 10**6) if packed else b"node" * 10**6
    chunks = [
        (b"iCCP", b"large\0\0" + zlib.compress(bytes(range(256)) * 8000)),
        (b"zTXt" if packed else b"tEXt", text),
        (b"iTXt", international),
        *[many] * 140,
    ]
    pixels = noise(8, 13)
    content = (b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in pixels)))
    chunks = [content, *chunks[1:]] if behind else [*chunks, content]
    data = png_chunks((13, 8, 8, 2, 0, 0, 0), *chunks)
    assert image_size(data) == (8, 13)
    assert torch.equal(decode_image(data, 8, 13), planes(pixels))
    if not behind:
        with pytest.raises(HeaderCut):
            image_size(data[:16384])


def test_small_texts_keep_the_orientation():
    packet = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    text = (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + packet)
    content = (b"IDAT", zlib.compress(bytes(8 * 40)))
    assert image_size(png_chunks((13, 8, 8, 2, 0, 0, 0), text, content)) == (13, 8)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_obeyed(orientation):
    seen = Image.fromarray(noise(8, 13))
    plain = encoded(seen)
    stored = seen.transpose(TURNS[orientation]) if orientation in TURNS else seen
    turned = {
        kind: encoded(stored, kind, exif=exif(orientation), **options)
        for kind, options in {"PNG": {}, "WEBP": {"lossless": True}}.items()
    }
    for data in turned.values():
        assert image_size(data) == (8, 13)
        for size in ((8, 13), (8, 8), (5, 13)):
            for crop in ((0.0, 0.0), (0.3, 0.5), (1.0, 1.0)):
                for flip in (False, True):
                    options = {"crop": crop, "flip": flip}
                    wanted = decode_image(plain, *size, **options)
                    assert torch.equal(decode_image(data, *size, **options), wanted)
        scaled = decode_image(data, 4, 5, crop=(0.0, 0.2)).int()
        assert (scaled - decode_image(plain, 4, 5, crop=(0.0, 0.2)).int()).abs().max() <= 1


@pytest.mark.parametrize("content", [b"MM\0*\0\0", b"nonsense", exif(77).tobytes()])
def test_damaged_exif_is_no_orientation(content):
    pixels = noise(8, 13)
    data = encoded(Image.fromarray(pixels), exif=content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert image_size(data) == (8, 13)
        assert torch.equal(decode_image(data, 8, 13), planes(pixels))


def test_exif_behind_a_pngs_pixels_is_not_looked_for():
    """The index reads headers only: a picture must not turn between it and training."""
    pixels = noise(8, 13)
    data = encoded(Image.fromarray(pixels))
    content = exif(6).tobytes().removeprefix(b"Exif\0\0")
    chunk = b"eXIf" + content
    late = struct.pack(">I", len(content)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    data = data[:-12] + late + data[-12:]  # before IEND
    with Image.open(io.BytesIO(data)) as image:
        assert image.getexif()[ORIENTATION] == 6
    assert image_size(data) == (8, 13)
    assert torch.equal(decode_image(data, 8, 13), planes(pixels))


@pytest.mark.parametrize(("size", "floor"), [(256, 39.5), (128, 38.5), (64, 36.0), (170, 42.5)])
def test_scaled_decoding_is_near_to_scaling_all_of_it(size, floor):
    image = photograph(512 // size * size)
    data = encoded(image, "JPEG", quality=90)
    scaled, whole = (decode_image(data, size, size, scaled_decoding=s) for s in (True, False))
    assert floor < psnr(scaled, whole) < 60  # 60: another picture, it was used


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_scaled_decoding_halves_what_is_seen(orientation):
    seen = photograph(512).crop((0, 100, 512, 356))
    stored = seen.transpose(TURNS[orientation]) if orientation in TURNS else seen
    data = encoded(stored, "JPEG", quality=95, exif=exif(orientation))
    assert image_size(data) == (256, 512)
    scaled, whole = (decode_image(data, 64, 128, scaled_decoding=s) for s in (True, False))
    assert 36 < psnr(scaled, whole) < 60
    wanted = decode_image(encoded(seen), 64, 128)
    assert psnr(scaled, wanted) > 36
    column, whole = (decode_image(data, 256, 128, scaled_decoding=s) for s in (True, False))
    assert torch.equal(column, whole)  # a half would not cover its height


@pytest.mark.parametrize("side", [256, 253])
@pytest.mark.parametrize("target", [128, 64, 32, 50])
def test_scaled_decoding_does_not_shift(side, target):
    """A ramp's levels say where each pixel lies; a falling one takes rounding out of the answer."""
    halvings = max(s for s in (1, 2, 4, 8) if side // s >= target)
    part = side // halvings * halvings  # the rest is no whole pixel
    centres = torch.from_numpy((np.arange(target) + 0.5) * part / target - 0.5)
    ramp = np.arange(side, dtype=np.uint8)
    decoded = []
    for line in (ramp, 255 - ramp):
        picture = Image.fromarray(np.ascontiguousarray(np.broadcast_to(line, (side, side))))
        data = encoded(picture.convert("RGB"), "JPEG", quality=100)
        decoded.append(decode_image(data, target, target).double().mean((0, 1)))
    rising, falling = decoded
    lies = (rising - falling + 255) / 2
    shift = (lies - centres)[2:-2] * target / part  # in pixels of the result
    for third in shift.chunk(3):  # nor stretch
        assert abs(third.mean().item()) < 0.02


def test_the_size_of_every_encoding(files):
    for name, data in files.items():
        assert image_size(data) == (30, 40), name
        assert decode_image(data, 30, 40).shape == (3, 30, 40)


def test_the_first_bytes_say_the_size_or_that_there_are_too_few(files):
    for name, data in files.items():
        answers = []
        for end in range(1, len(data) + 1):
            try:
                answers.append(image_size(data[:end]))
            except HeaderCut:
                answers.append(None)
        assert set(answers) == {None, (30, 40)}, name
        assert answers[-1] == (30, 40)
        if name in ("webp", "lossless webp", "png", "alpha"):
            assert answers.index((30, 40)) < 60, name


def test_pixels_behind_the_header_are_not_read():
    data = encoded(photograph(512), "PNG")
    assert image_size(data[:100]) == (512, 512)
    assert image_size(encoded(photograph(512), "JPEG")[:1000]) == (512, 512)


def test_no_picture():
    for call in (image_size, lambda data: decode_image(data, 8, 8)):
        with pytest.raises(ValueError, match=r"^the image is empty \(0 bytes\)\.$"):
            call(b"")
        with pytest.raises(ValueError, match="^not a readable image: wanted a JPEG, PNG, W") as e:
            call(b"no picture at all")
        assert not isinstance(e.value, HeaderCut)


def test_a_cut_file_is_refused_or_whole(files):
    for name, data in files.items():
        whole = decode_image(data, 15, 20)
        assert not torch.equal(whole, torch.zeros_like(whole))
        refused = 0
        for end in range(1, len(data), 7):
            try:
                found = decode_image(data[:end], 15, 20)
            except ValueError:
                refused += 1
            else:
                assert torch.equal(found, whole), name
        assert refused > len(data) / 7 * 0.4, name  # animations show their first frame


@pytest.mark.filterwarnings("ignore")
def test_damaged_bytes_raise_nothing_but_value_errors(files):
    draw = random.Random(0)
    reasons = []
    for data in files.values():
        for _ in range(60):
            damaged = bytearray(data)
            for _ in range(draw.choice((1, 2, 8))):
                damaged[draw.randrange(draw.choice((64, len(data))))] = draw.randrange(256)
            for call in (image_size, lambda data: decode_image(data, 8, 8, max_pixels=100_000)):
                try:
                    call(bytes(damaged))
                except ValueError as error:
                    reasons.append(str(error))
    assert len(reasons) > 300
    assert not any("\n" in reason for reason in reasons)


@pytest.mark.parametrize("error", [OSError(errno.EMFILE, "x"), ImportError("x"), MemoryError()])
def test_a_machine_that_fails_is_not_a_broken_image(monkeypatch, error):
    def failing(*arguments):
        raise error

    data = encoded(Image.new("RGB", (8, 8)))
    monkeypatch.setattr(module, "_rgb", failing)
    with pytest.raises(type(error)):
        decode_image(data, 4, 4)


def huge_jpeg(width, height):
    data = bytearray(tiny_jpeg())
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def tiny_jpeg():
    return encoded(Image.new("RGB", (8, 8)), "JPEG")


def huge_png(width, height):
    return png_chunks((width, height, 8, 2, 0, 0, 0), (b"IDAT", zlib.compress(b"\0")))


def huge_webp(width, height):
    data = bytearray(encoded(Image.new("RGB", (8, 8)), "WEBP"))
    data[26:30] = struct.pack("<HH", width, height)
    return bytes(data)


def huge_gif(width, height):
    data = bytearray(encoded(Image.new("RGB", (8, 8)), "GIF"))
    data[6:10] = struct.pack("<HH", width, height)
    return bytes(data)


@pytest.mark.parametrize("make", [huge_jpeg, huge_png, huge_webp, huge_gif])
@pytest.mark.parametrize("size", [(12000, 9000), (16000, 15000)])
def test_huge_pictures_are_refused_before_they_are_decoded(make, size):
    data = make(*size)
    message = (
        rf"^{size[0]} x {size[1]} pixels: wanted at most 64000000 \(data\.pixels\.max_pixels\)\.$"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Pillow's own limit is not met
        with pytest.raises(ValueError, match=message):
            decode_image(data, 8, 8)
        with pytest.raises(ValueError, match=message):
            image_size(data, max_pixels=64_000_000)
        assert image_size(data) == (size[1], size[0])


def test_the_limit_itself_is_allowed():
    data = encoded(Image.new("RGB", (10, 6), "white"))
    assert image_size(data, 60) == (6, 10)
    assert decode_image(data, 6, 10, max_pixels=60).min() == 255
    with pytest.raises(ValueError, match="10 x 6 pixels: wanted at most 59"):
        decode_image(data, 6, 10, max_pixels=59)


def test_threads_decode_at_once(files):
    calls = [(data, size) for data in files.values() for size in ((8, 8), (15, 40))] * 6
    wanted = [decode_image(data, *size) for data, size in calls]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda call: decode_image(call[0], *call[1]), calls))
    assert all(map(torch.equal, found, wanted))


def jpeg_of_scans(count, side=64):
    data = encoded(Image.new("RGB", (side, side), "red"), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * count + b"\xff\xd9"


def test_a_jpeg_of_very_many_scans_is_refused():
    decode_image(jpeg_of_scans(280), 8, 8)
    with pytest.raises(ValueError, match="301 or more scans: wanted at most 300"):
        decode_image(jpeg_of_scans(4000), 8, 8)
    thumbnails = b"\xff\xe1" + struct.pack(">H", 4002) + b"\xff\xda" * 2000
    data = tiny_jpeg()
    decode_image(data[:2] + thumbnails + data[2:] + b"\xff\xda" * 2000, 8, 8)  # none of a scan
    with pytest.raises(ValueError, match="wanted at most 50 for this size"):
        formats.check_scans(jpeg_of_scans(60), 64_000_000)


def test_slow_decoders_get_no_large_image():
    data = b"P6\n2000 2000\n65535\n"
    with pytest.raises(ValueError, match="slow to decode"):
        image_size(data)
    data = bytearray(encoded(Image.new("RGB", (8, 8)), "JPEG2000"))
    at = data.index(b"ihdr") + 4
    data[at : at + 8] = struct.pack(">II", 8000, 8000)
    with pytest.raises(
        ValueError, match="8000 x 8000 pixels: wanted at most 20000000 in a JPEG2000"
    ):
        image_size(bytes(data))


def test_bands_are_the_whole(monkeypatch):
    levels = (np.arange(40 * 30) * 54).astype(np.uint16).reshape(30, 40)
    alpha = photograph(512).resize((40, 30)).convert("RGBA")
    alpha.putalpha(alpha.convert("L"))
    files = [encoded(Image.fromarray(levels)), encoded(alpha), encoded(alpha.convert("P"))]
    files.append(encoded(alpha.convert("CMYK"), "JPEG"))
    whole = [decode_image(data, h, w) for data in files for h, w in ((30, 40), (20, 20))]
    wanted = (levels / 65535 * 255).round()
    assert torch.equal(whole[0][0], torch.from_numpy(wanted).byte())
    monkeypatch.setattr(module, "_BAND", 200)
    found = [decode_image(data, h, w) for data in files for h, w in ((30, 40), (20, 20))]
    assert all(map(torch.equal, found, whole))


def test_sixteen_bits_take_little_more_memory_than_eight():
    import tracemalloc

    data = encoded(Image.fromarray(np.zeros((2000, 2000), np.uint16)))
    tracemalloc.start()  # sees numpy's memory, not Pillow's
    decode_image(data, 64, 64)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2000 * 2000 * 14  # bytes; float64 took 24


def test_the_pixels_of_all_threads_are_bounded(monkeypatch):
    budget = module._UnderWay(3 * 64)
    monkeypatch.setattr(module, "_UNDER_WAY", budget)
    data, held, most = encoded(Image.new("RGB", (8, 8))), [], []
    original = module._rgb

    def watched(*arguments):
        held.append(1)
        most.append(len(held))
        barrier.wait(5) if len(most) <= 3 else None
        held.pop()
        return original(*arguments)

    barrier = threading.Barrier(3)  # three fit at once, and no fourth
    monkeypatch.setattr(module, "_rgb", watched)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: decode_image(data, 8, 8), range(24)))
    assert max(most) == 3
    huge = encoded(Image.new("RGB", (20, 20)))  # more than there are: alone
    assert decode_image(huge, 8, 8).shape == (3, 8, 8)
    with pytest.raises(ValueError, match="not a readable"):
        decode_image(png_chunks((8, 8, 8, 2, 0, 0, 0), (b"IDAT", b"junk")), 8, 8)
    assert budget._free == 3 * 64


def test_a_fork_does_not_wait_for_threads_it_has_not():
    with module._UNDER_WAY.room(module.MAX_PIXELS):
        child = os.fork()
        if not child:
            decode_image(tiny_jpeg(), 8, 8)
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_unit_range():
    levels = torch.arange(256, dtype=torch.uint8).expand(1, 3, 1, 256)
    images = to_unit_range(levels)
    assert (images.dtype, images.shape) == (torch.float32, (1, 3, 1, 256))
    assert torch.equal(images, levels.float() / 127.5 - 1)
    assert images[0, 0, 0, [0, 255]].tolist() == [-1, 1]
    with pytest.raises(ValueError, match=r"images are torch\.float32: wanted torch\.uint8"):
        to_unit_range(images)
