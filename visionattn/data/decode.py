"""The one way in which pictures are decoded, for training, evaluation and prediction of every task.

What a file says about itself is obeyed here: orientation (EXIF, XMP, TIFF), palettes, transparency, the
profile of printing colours, 16 bits per channel. A file that cannot be read becomes an `ImageError`.
"""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError

from visionattn.errors import one_line

_ORIENTATION = 0x0112  # the EXIF tag
_FLIPS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_PRINTED = ("CMYK", "HSV", "LAB", "YCbCr")  # modes whose profile does not describe the RGB that they become
_EXIF_PARTS = (0x8769, 0x8825)  # the EXIF tags whose values are groups of their own
_BITS, _PHOTOMETRIC, _PLANAR = 258, 262, 284  # tags of TIFF
_BLACK_IS_LARGE, _SEPARATE_PLANES = 0, 2
_DRAWINGS = ("EPS", "WMF")  # which Pillow has drawn by another program, whoever made the file
_SIZ = b"\xff\x4f\xff\x51"  # how a stream of JPEG 2000 begins
_DEPTH_AFTER_SIZ = 42


class ImageError(ValueError):
    """An image file cannot be used; the message names the file and the reason."""


class Decoded(NamedTuple):
    """An upright picture.

    Attributes:
        levels: `[H, W, C]` uint8 or uint16: grey, grey and alpha, RGB, or RGB and alpha.
        profile: the ICC profile that describes them, or None.
        exif: EXIF data without an orientation, or None.
    """

    levels: np.ndarray
    profile: bytes | None
    exif: bytes | None


@contextmanager
def decoding(path: object) -> Iterator[None]:
    """Turn whatever decoders raise at damaged files into an `ImageError` that names the file.

    For blocks that do nothing but read one file: this is the one definition of "cannot be read".

    Raises:
        FileNotFoundError: there is no such file.
        ImageError: the file is not an image, is damaged, or is dangerously large.
    """
    try:
        yield
    except (FileNotFoundError, ImageError):
        raise
    except UnidentifiedImageError as error:
        raise ImageError(f"{path}: not an image file, or of an unknown format") from error
    except MemoryError as error:
        raise ImageError(f"{path}: there is not enough memory to read it") from error
    # Damage makes decoders fail in any way that Python knows: struct.error, KeyError, ZeroDivisionError, ...
    except Exception as error:
        raise ImageError(f"{path}: {one_line(error)}") from error


@contextmanager
def opened(path: str | Path, content: bytes | BinaryIO | None = None) -> Iterator[Image.Image]:
    """The image of a file, for a block that does nothing but decode it.

    Args:
        path: the file.
        content: what it holds, if it lies elsewhere than on the disk; `path` then only names it.

    Raises:
        FileNotFoundError: there is no such file.
        ImageError: the file is not an image, is damaged, or is dangerously large.
    """
    # Never by its path: Pillow would map plain TIFF files into memory, and mistake their turned sides.
    content = read_bytes(path) if content is None else content
    with decoding(path), Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as image:
        if image.format in _DRAWINGS:
            raise ImageError(f"{path}: a drawing ({image.format}), not pixels")
        yield image


def decode(path: object, content: bytes) -> Decoded:
    """The picture in the bytes of a file, with all of its bits.

    Of phone pictures with a second image behind the first (MPO), the first.

    Args:
        path: names the file in errors.
        content: its bytes.

    Raises:
        ImageError: it is no image, is damaged, animated, dangerously large, or has pixels of another kind.
    """
    with opened(str(path), content) as image:
        frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
        if frames > 1:
            raise ImageError(f"{path}: animated or of several pages ({frames}); only single images are used")
        _refuse_lost_bits(path, image, content)
        levels = _deep_levels(image, content)
        image.load()
        profile = image.info.get("icc_profile")
        if levels is None:
            profile = None if image.mode in _PRINTED else profile
            levels = np.asarray(_plain(path, image))
        levels = upright(np.atleast_3d(levels), orientation(image))
        return Decoded(levels, profile, _exif_without_orientation(image))


def as_rgb(image: Image.Image, path: object = "the image") -> Image.Image:
    """An image of any mode as upright 8-bit RGB; of animations and pages the first, of 16 bits the upper 8.

    Transparency is left out: what is invisible has its colours too.

    Raises:
        ImageError: the image is damaged, or has pixels of 32 bits.
    """
    with decoding(path):
        image.load()
        flip = _FLIPS.get(orientation(image))
        image = _plain(path, image).convert("RGB")
        image.info = {}  # among it the orientation, which shall not be obeyed twice
        return image if flip is None else image.transpose(flip)


def orientation(image: Image.Image) -> int:
    """The orientation that an image says it has, 1 to 8; 1, upright, where it says nothing legible."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF data says nothing, but the pixels are whole
        return 1
    return value if isinstance(value, int) and value in _FLIPS else 1


def _plain(path: object, image: Image.Image) -> Image.Image:
    """A loaded image in one of the modes L, LA, RGB and RGBA."""
    if _is_deep_grey(image):
        return Image.fromarray((_grey_levels(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ImageError(f"{path}: pixels of 32 bits; convert them to 8 or 16 bits first")
    if _has_deep_planes(image):
        raise ImageError(f"{path}: planes of more than 8 bits; convert them to PNG first")
    profile, transparent = image.info.get("icc_profile"), image.has_transparency_data
    if image.mode == "CMYK" and profile:
        image = _to_srgb(path, image, profile)
    grey = image.mode in ("1", "L", "LA", "La")
    return image.convert(("LA" if grey else "RGBA") if transparent else ("L" if grey else "RGB"))


def _is_deep_grey(image: Image.Image) -> bool:
    # Pillow has PGM files of 16 bits as 32-bit integers, and older releases PNG too.
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))


def _grey_levels(image: Image.Image) -> np.ndarray:
    """uint16 `[H, W]` of an image of one deep channel."""
    levels = np.asarray(image).astype(np.uint16)
    tags = getattr(image, "tag_v2", {})
    if tags.get(_BITS) == (12,):
        levels = (levels.astype(np.uint32) * 65535 // 4095).astype(np.uint16)
    return 65535 - levels if tags.get(_PHOTOMETRIC) == _BLACK_IS_LARGE else levels


def _deep_levels(image: Any, content: bytes) -> np.ndarray | None:
    """uint16 `[H, W]` or `[H, W, C]` of a file of more than 8 bits per channel, None for others.

    Colours of 16 bits Pillow decodes to their upper bytes. Told that the bytes come in the other order, it
    decodes the lower ones.
    """
    if _is_deep_grey(image):
        levels, key = _grey_levels(image), image.info.get("transparency")
        return levels if key is None else _with_key(levels[..., None], key)
    tile: Any = image.tile[0] if image.tile else ("", None, 0, "")
    if image.format == "PPM" and image.mode == "RGB" and tile[0].startswith("ppm") and tile[3][1] > 255:
        return _ppm_colors(image, content, plain=tile[0] == "ppm_plain")
    raw = _raw_mode(tile)
    if raw == "LA;16B":  # two bytes of grey and two of alpha, which Pillow can hand out as four channels
        return _decode_as(content, "RGBA").view(">u2").astype(np.uint16)
    parts = re.fullmatch(r"(RGB[AXa]?);16([BLN])", raw)
    if parts is None or image.mode not in ("RGB", "RGBA"):
        return None
    channels, order = parts[1].replace("RGBa", "RGBA"), parts[2]
    big = order == "B" or (order == "N" and sys.byteorder == "big")
    upper, lower = (_decode_as(content, f"{channels};16{o}") for o in (order, "L" if big else "B"))
    levels = upper.astype(np.uint16) * 256 + lower
    if parts[1] == "RGBa":  # colours that are multiplied by their alpha already
        color, alpha = levels[..., :3].astype(np.float64), levels[..., 3:]
        color = (65535 * color / np.maximum(alpha, 1)).clip(0, 65535).round().astype(np.uint16)
        return np.concatenate((color, alpha), -1)
    key = image.info.get("transparency")
    return levels if key is None else _with_key(levels, key)


def _refuse_lost_bits(path: object, image: Image.Image, content: bytes) -> None:
    """Refuse files of which Pillow decodes 8 bits of more, in formats that are not decoded here."""
    depth = 8
    if image.format == "SGI":
        depth = 8 * content[3]
    elif image.format == "JPEG2000" and not _is_deep_grey(image):
        place = content.find(_SIZ)
        depth = (content[place + _DEPTH_AFTER_SIZ] & 0x7F) + 1 if place >= 0 else 8
    elif _has_deep_planes(image):
        depth = 16
    if depth > 8:
        raise ImageError(
            f"{path}: {image.format} with {depth} bits per channel in this layout; convert it to PNG first"
        )


def _has_deep_planes(image: Image.Image) -> bool:
    """Whether a TIFF file holds one colour after the other in more than 8 bits, which Pillow mistakes."""
    tags = getattr(image, "tag_v2", {})
    return tags.get(_PLANAR) == _SEPARATE_PLANES and max(tags.get(_BITS, (8,))) > 8


def _raw_mode(tile: tuple) -> str:
    """The layout of the bytes that a decoder of Pillow is told."""
    arguments = tile[3]
    return str(arguments[0] if isinstance(arguments, tuple) and arguments else arguments)


def _with_raw_mode(tile: Any, raw_mode: str) -> Any:
    arguments = (raw_mode, *tile[3][1:]) if isinstance(tile[3], tuple) else raw_mode
    changed = (*tile[:3], arguments)
    return type(tile)(*changed) if hasattr(tile, "_fields") else changed  # a plain tuple before Pillow 11


def _decode_as(content: bytes, raw_mode: str) -> np.ndarray:
    """uint8 `[H, W, C]` of a file whose bytes are taken for another layout."""
    with Image.open(io.BytesIO(content)) as image:
        image.tile = [_with_raw_mode(tile, raw_mode) for tile in image.tile]
        image.load()
        return np.array(image)


def _ppm_colors(image: Any, content: bytes, plain: bool) -> np.ndarray:
    """uint16 `[H, W, 3]` of a PPM file whose largest value is above 255."""
    (_, _, offset, (_, largest)) = image.tile[0]
    count = image.width * image.height * 3
    if plain:
        numbers = re.sub(rb"#[^\r\n]*", b"", content[offset:]).split()
        values = np.array(numbers[:count], dtype=np.uint32)
    else:
        values = np.frombuffer(content, ">u2", count, offset).astype(np.uint32)
    if len(values) < count or values.max() > largest:
        raise ValueError(f"it holds {len(values)} of {count} values, or one above its largest, {largest}")
    levels = (values * 65535 + largest // 2) // largest
    return levels.astype(np.uint16).reshape(image.height, image.width, 3)


def _with_key(levels: np.ndarray, key: int | tuple[int, ...]) -> np.ndarray:
    """Levels `[H, W, C]` with an alpha of 0 where they are the transparent colour and 65535 elsewhere."""
    opaque = (levels != np.asarray(key, dtype=np.uint16)).any(-1, keepdims=True)
    return np.concatenate((levels, 65535 * opaque.astype(np.uint16)), -1)


def _to_srgb(path: object, image: Image.Image, profile: bytes) -> Image.Image:
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        target = ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, source, target, outputMode="RGB")
    except ImageCms.PyCMSError as error:
        raise ImageError(f"{path}: its colour profile cannot be used: {error}") from error
    assert converted is not None  # as nothing was asked to happen in place
    return converted


def _exif_without_orientation(image: Image.Image) -> bytes | None:
    """EXIF data as bytes, without the entries that are broken in the file, which no writer takes."""
    try:
        exif = image.getexif()
        exif.pop(_ORIENTATION, None)
        entries = {tag: exif.get_ifd(tag) if tag in _EXIF_PARTS else exif[tag] for tag in exif}
    except Exception:  # damaged EXIF data: there is nothing to keep
        return None
    if not _can_be_written(exif):
        exif = Image.Exif()
        for tag, value in entries.items():
            exif[tag] = value
            if not _can_be_written(exif):
                del exif[tag]
    return exif.tobytes() if len(exif) else None


def _can_be_written(exif: Image.Exif) -> bool:
    try:
        exif.tobytes()
    except Exception:  # of any kind, as an entry may hold anything
        return False
    return True


def upright(levels: np.ndarray, turned: int) -> np.ndarray:
    """Turn `[H, W, ...]` by the orientation of EXIF, 1 to 8."""
    if turned in (5, 6, 7, 8):
        levels = levels.swapaxes(0, 1)
    flips = {2: (1,), 3: (0, 1), 4: (0,), 6: (1,), 7: (0, 1), 8: (0,)}.get(turned, ())
    return np.ascontiguousarray(np.flip(levels, flips))


def read_bytes(path: str | Path) -> bytes:
    """The content of a file.

    Raises:
        FileNotFoundError: there is no such file.
        ImageError: it cannot be read.
    """
    with decoding(path):
        return Path(path).read_bytes()
