"""Every kind of picture is read to the last level, upright, with its transparency, or is refused by name."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageCms

from visionattn.data.decode import ImageError, as_rgb, decode
from visionattn.data.files import read_depth, read_planes
from visionattn.data.images import open_image
from visionattn.data.label_maps import read_class_map
from visionattn.data.pictures import Picture, encode_picture, read_picture, write_picture

HEIGHT, WIDTH = 12, 14
RANDOM = np.random.default_rng(0)
COLORS = RANDOM.integers(0, 65536, (HEIGHT, WIDTH, 3))
GREY, ALPHA = RANDOM.integers(0, 65536, (2, HEIGHT, WIDTH, 1))
RGBA = np.dstack((COLORS, ALPHA))
KEY = COLORS[3, 4]
TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a[::-1].swapaxes(0, 1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: a[:, ::-1].swapaxes(0, 1),
}


def png(levels: np.ndarray, kind: int, key: bytes = b"") -> bytes:
    """A PNG file of 16 bits per channel."""
    rows = np.zeros((HEIGHT, 1 + WIDTH * levels.shape[2] * 2), np.uint8)
    rows[:, 1:] = levels.astype(">u2").reshape(HEIGHT, -1).view(np.uint8)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", WIDTH, HEIGHT, 16, kind, 0, 0, 0))]
    chunks += [(b"tRNS", key)] if key else []
    chunks += [(b"IDAT", zlib.compress(rows.tobytes())), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )


def tiff(levels: np.ndarray, order: str, kind: int, extra: int | None = None, deflate: bool = False) -> bytes:
    """A TIFF file of 16 bits per channel in one strip; `extra` says what the fourth channel is."""
    channels = levels.shape[2]
    data = levels.astype(f"{order}u2").tobytes()
    data = zlib.compress(data) if deflate else data
    count = 9 if extra is None else 10
    place = 8 + 2 + 12 * count + 4
    bits = place if channels > 2 else 16
    tags = [
        (256, 4, 1, WIDTH),
        (257, 4, 1, HEIGHT),
        (258, 3, channels, bits),
        (259, 3, 1, 8 if deflate else 1),
    ]
    tags += [(262, 3, 1, kind), (273, 4, 1, place + 2 * channels), (277, 3, 1, channels)]
    tags += [(278, 4, 1, HEIGHT), (279, 4, 1, len(data))]
    tags += [] if extra is None else [(338, 3, 1, extra)]
    entries = [
        struct.pack(f"{order}HHI", tag, size, number)
        + (
            struct.pack(f"{order}HH", value, 0)
            if (size, number) == (3, 1)
            else struct.pack(f"{order}I", value)
        )
        for tag, size, number, value in tags
    ]
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, count)
    return head + b"".join(entries) + bytes(4) + struct.pack(f"{order}{channels}H", *[16] * channels) + data


def ppm(levels: np.ndarray, magic: str, largest: int = 65535) -> bytes:
    head = f"{magic}\n{WIDTH} {HEIGHT}\n# a comment\n{largest}\n".encode()
    if magic in ("P2", "P3"):
        return head + b"\n# another\n".join(str(value).encode() for value in levels.ravel())
    return head + levels.astype(">u2").tobytes()


def opaque(of: np.ndarray, key: np.ndarray) -> np.ndarray:
    return np.dstack((of, 65535 * (of != key).any(-1, keepdims=True)))


DEEP = {
    "png grey": (png(GREY, 0), GREY),
    "png grey with tRNS": (png(GREY, 0, struct.pack(">H", GREY[3, 4, 0])), opaque(GREY, GREY[3, 4])),
    "png grey and alpha": (png(np.dstack((GREY, ALPHA)), 4), np.dstack((GREY, ALPHA))),
    "png colours": (png(COLORS, 2), COLORS),
    "png colours with tRNS": (png(COLORS, 2, struct.pack(">3H", *KEY)), opaque(COLORS, KEY)),
    "png colours and alpha": (png(RGBA, 6), RGBA),
    "ppm": (ppm(COLORS, "P6"), COLORS),
    "ppm of 10 bits": (ppm(COLORS % 1024, "P6", 1023), (COLORS % 1024 * 65535 / 1023).round()),
    "plain ppm": (ppm(COLORS, "P3"), COLORS),
    "pgm": (ppm(GREY, "P5"), GREY),
    "plain pgm": (ppm(GREY, "P2"), GREY),
    "tiff grey, white is 0": (tiff(GREY, "<", 0), 65535 - GREY),
}
for _order in "<>":
    DEEP |= {
        f"tiff {_order} grey": (tiff(GREY, _order, 1), GREY),
        f"tiff {_order} colours": (tiff(COLORS, _order, 2), COLORS),
        f"tiff {_order} packed": (tiff(COLORS, _order, 2, deflate=True), COLORS),
        f"tiff {_order} alpha": (tiff(RGBA, _order, 2, extra=2), RGBA),
        f"tiff {_order} alpha packed": (tiff(RGBA, _order, 2, extra=2, deflate=True), RGBA),
        f"tiff {_order} unused": (tiff(RGBA, _order, 2, extra=0), COLORS),
    }


@pytest.mark.parametrize("name", DEEP)
def test_16_bits_to_the_last(name: str):
    content, levels = DEEP[name]
    decoded = decode("a", content).levels
    assert decoded.dtype == np.uint16
    assert np.array_equal(decoded, levels)
    # What takes 8 bits sees the upper ones, transparent or not, within one level that Pillow may round up.
    shown = np.asarray(as_rgb(Image.open(io.BytesIO(content)))).astype(int)
    colors = np.broadcast_to(levels[..., : (levels.shape[2] - 1) // 2 * 2 + 1], (HEIGHT, WIDTH, 3))
    assert np.abs(shown - colors // 256).max() <= 1


def test_colours_that_are_multiplied_by_their_alpha():
    alpha = np.maximum(ALPHA, 20000)
    content = tiff(np.dstack(((COLORS * (alpha / 65535)).round(), alpha)), "<", 2, extra=1)
    decoded = decode("a", content).levels
    assert np.array_equal(decoded[..., 3:], alpha)
    assert np.abs(decoded[..., :3].astype(int) - COLORS).max() <= 2


def test_a_picture_survives_being_written(tmp_path: Path):
    for name, (content, levels) in DEEP.items():
        (tmp_path / "a").write_bytes(content)
        written = encode_picture(read_picture(tmp_path / "a"), "b")
        assert np.array_equal(decode("b", written).levels, levels), name


def test_bits_that_would_be_lost_are_refused(tmp_path: Path):
    image = Image.fromarray((COLORS >> 8).astype(np.uint8))
    image.save(tmp_path / "a.sgi", bpc=2)
    image.save(tmp_path / "a.jp2", irreversible=False)
    content = bytearray((tmp_path / "a.jp2").read_bytes())
    assert decode("a.jp2", bytes(content)).levels.dtype == np.uint8
    content[content.find(b"\xff\x4f\xff\x51") + 42] = 11  # 12 bits
    (tmp_path / "a.jp2").write_bytes(content)
    planes = bytearray(tiff(COLORS, "<", 2, extra=0))  # whose fourth channel makes room for a tag
    place = planes.rfind(struct.pack("<HHI", 338, 3, 1))
    planes[place : place + 12] = struct.pack("<HHIHH", 284, 3, 1, 2, 0)
    (tmp_path / "a.tif").write_bytes(planes)
    with pytest.raises(ImageError, match=r"a\.tif: planes of more than 8 bits"):
        open_image(tmp_path / "a.tif")
    for name, bits in (("a.sgi", 16), ("a.jp2", 12), ("a.tif", 16)):
        with pytest.raises(ImageError, match=rf"{name}: .*{bits} bits per channel"):
            read_picture(tmp_path / name)


@pytest.mark.parametrize("turn", TURNS)
def test_every_reader_turns_upright(tmp_path: Path, turn: int):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = turn
    stored = np.arange(24, dtype=np.uint8).reshape(4, 6)
    Image.fromarray(stored).save(tmp_path / "a.png", exif=exif)
    Image.fromarray(stored).save(tmp_path / "a.tif", exif=exif)
    expected = torch.from_numpy(TURNS[turn](stored).copy())
    for file in (tmp_path / "a.png", tmp_path / "a.tif"):
        assert torch.equal((255 * read_picture(file).color[0]).byte(), expected)
        assert torch.equal(read_planes(file, 1)[0], expected)
        assert torch.equal((255 * read_depth(file)[0]).round().byte(), expected)
        assert np.array_equal(read_class_map(file), expected)
        shown = open_image(file)
        assert np.array_equal(np.asarray(shown)[..., 0], expected)
        assert np.array_equal(np.asarray(as_rgb(shown))[..., 0], expected)  # not a second time
    assert np.array_equal(np.asarray(as_rgb(Image.open(tmp_path / "a.png")))[..., 0], expected)


def exif_with(value: bytes, orientation: int = 6) -> bytes:
    """EXIF data of an XResolution that is text, beside an orientation that is right."""
    head = b"MM\0*" + struct.pack(">IH", 8, 2) + struct.pack(">HHIHH", 0x0112, 3, 1, orientation, 0)
    return b"Exif\0\0" + head + struct.pack(">HHI4s", 0x011A, 2, 3, value) + bytes(4)


def test_broken_exif_data_do_not_break_the_picture(tmp_path: Path):
    levels = (COLORS >> 8).astype(np.uint8)
    image = Image.fromarray(levels)
    image.save(tmp_path / "text.jpg", exif=exif_with(b"72\0\0"))
    image.save(tmp_path / "noise.jpg", exif=b"Exif\0\0" + bytes(range(40)))
    image.save(tmp_path / "ninth.jpg", exif=exif_with(b"72\0\0", orientation=9))
    for name, shape in (("text", (WIDTH, HEIGHT)), ("noise", (HEIGHT, WIDTH)), ("ninth", (HEIGHT, WIDTH))):
        picture = read_picture(tmp_path / f"{name}.jpg")
        assert picture.color.shape[1:] == shape
        assert open_image(tmp_path / f"{name}.jpg").size == shape[::-1]
        encode_picture(picture, name, "jpeg")
    kept = Image.Exif()
    kept[ExifTags.Base.Artist] = "me"
    image.save(tmp_path / "good.jpg", exif=kept)
    exif = read_picture(tmp_path / "good.jpg").exif
    assert exif is not None
    assert b"me" in exif


def test_the_first_of_two_phone_pictures_and_no_frame_of_an_animation(tmp_path: Path):
    first, second = (Image.fromarray(RANDOM.integers(0, 256, (side, 24, 3), np.uint8)) for side in (40, 20))
    first.save(tmp_path / "phone.jpg", format="MPO", save_all=True, append_images=[second])
    assert np.array_equal(read_picture(tmp_path / "phone.jpg").color.shape, (3, 40, 24))
    first.save(tmp_path / "moving.webp", save_all=True, append_images=[first.rotate(90)])
    with pytest.raises(ImageError, match=r"moving\.webp: animated or of several pages \(2\)"):
        read_picture(tmp_path / "moving.webp")


def test_palettes_transparency_and_printing_colours_are_read_alike(tmp_path: Path):
    """What training sees are the colours of what a restoration enlarges."""
    image = Image.fromarray((COLORS >> 8).astype(np.uint8))
    clear = Image.fromarray((RGBA >> 8).astype(np.uint8))
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image.convert("P").save(tmp_path / "palette.png", transparency=3)
    image.convert("1").save(tmp_path / "one.png")
    image.convert("L").save(tmp_path / "key.png", transparency=int(np.asarray(image.convert("L"))[0, 0]))
    clear.save(tmp_path / "clear.png", icc_profile=profile)
    clear.convert("LA").save(tmp_path / "grey.png")
    image.convert("CMYK").save(tmp_path / "print.tif")
    for file in sorted(tmp_path.iterdir()):
        picture = read_picture(file)
        assert torch.equal(read_planes(file, 3), (255 * picture.color).round().byte().expand(3, -1, -1))
        assert np.array_equal(np.asarray(open_image(file)), read_planes(file, 3).permute(1, 2, 0))
        assert (picture.alpha is not None) == (file.stem in ("palette", "key", "clear", "grey")), file
        assert len(picture.color) == (1 if file.stem in ("one", "key", "grey") else 3)
    alpha = read_picture(tmp_path / "key.png").alpha
    assert alpha is not None
    assert alpha[0, 0, 0] == 0
    assert read_picture(tmp_path / "clear.png").profile == profile


def test_sizes_that_formats_do_not_hold_and_files_that_are_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    long = Picture(torch.zeros(1, 1, 65_501))
    with pytest.raises(ImageError, match=r"1x65501 pixels, but a side of jpeg has at most 65500; choose PNG"):
        write_picture(long, tmp_path / "a.jpg", "jpeg")
    with pytest.raises(ImageError, match="a side of webp has at most 16383"):
        write_picture(long, tmp_path / "a.webp", "webp")
    write_picture(long, tmp_path / "a.png")
    assert read_picture(tmp_path / "a.png").color.shape == (1, 1, 65_501)
    with pytest.raises(ImageError, match="not an image file"):
        decode("text", b"text")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(ImageError, match=r"a\.png: .*decompression bomb"):
        read_picture(tmp_path / "a.png")
