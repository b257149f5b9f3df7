"""Image files with everything that must survive a restoration: bit depth, transparency, profile, EXIF."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from visionattn.data.decode import ImageError, decode, read_bytes
from visionattn.data.images import EXTENSIONS, list_images
from visionattn.errors import RunError, one_line
from visionattn.files import replacing

Format = Literal["png", "jpeg", "webp"]

#: endings of the files that `list_pictures` finds
PICTURE_EXTENSIONS = EXTENSIONS | {".avif", ".gif", ".jfif", ".jp2", ".jpe", ".mpo", ".pnm", ".tga"}

_PNG = b"\x89PNG\r\n\x1a\n"
_LONGEST_SIDE = {"png": 2**31 - 1, "jpeg": 65_500, "webp": 16_383}  # what the formats allow, in pixels


@dataclass(frozen=True)
class Picture:
    """An upright image.

    Attributes:
        color: `[1 or 3, H, W]` float32 in [0, 1].
        alpha: `[1, H, W]` likewise, or None where all is opaque.
        bits: 8 or 16, those of the file.
        profile: the ICC profile of the colours, or None.
        exif: EXIF data without an orientation, or None.
    """

    color: Tensor
    alpha: Tensor | None = None
    bits: int = 8
    profile: bytes | None = None
    exif: bytes | None = None


def list_pictures(place: str | Path) -> list[Path]:
    """The file itself, or the files directly in a folder that are images by their names, in order.

    Raises:
        FileNotFoundError: there is no such file or folder, or no image in it.
    """
    place = Path(place)
    if place.is_file():
        return [place]
    if not place.is_dir():
        raise FileNotFoundError(f"there is no image or folder {place}")
    return list_images(place, PICTURE_EXTENSIONS)


def read_picture(path: str | Path, content: bytes | None = None) -> Picture:
    """Decode an image file.

    Grey, colour and palette images in any format of Pillow; those of 16 bits per channel in PNG, TIFF, PPM
    and PGM keep them. Colours of printing (CMYK) become RGB, by their profile if the file brings one.

    Args:
        path: the file.
        content: its bytes, if it lies elsewhere than on the disk; `path` then only names it.

    Raises:
        FileNotFoundError: there is no such file.
        ImageError: the file is no image, is damaged, animated, or dangerously large, or has pixels of another
            kind.
    """
    levels, profile, exif = decode(path, read_bytes(path) if content is None else content)
    bits = 8 * levels.itemsize
    pixels = torch.from_numpy(levels.astype(np.float32)).permute(2, 0, 1) / (2**bits - 1)
    colors = (pixels.shape[0] - 1) // 2 * 2 + 1
    alpha = pixels[colors:] if pixels.shape[0] > colors else None
    return Picture(pixels[:colors], alpha, bits, profile, exif)


def check_format(path: Path, format: Format, height: int, width: int, transparent: bool) -> None:
    """Refuse a picture that a format cannot hold, so that it need not be computed first.

    Raises:
        ImageError: JPEG and transparency, or a side that is too long.
    """
    if format == "jpeg" and transparent:
        raise ImageError(f"{path}: JPEG cannot hold transparency; choose PNG or WebP")
    if max(height, width) > _LONGEST_SIDE[format]:
        raise ImageError(
            f"{path}: {height}x{width} pixels, but a side of {format} has at most {_LONGEST_SIDE[format]}; "
            "choose PNG"
        )


def write_picture(picture: Picture, path: Path, format: Format = "png", compression: int = 6) -> None:
    """Write a file, which is there whole or not at all.

    PNG keeps 16 bits per channel; the other formats have 8.

    Args:
        picture: what is written.
        path: where to.
        format: of the file, whatever its ending.
        compression: of PNG, from 1, fast, to 9, small.

    Raises:
        ImageError: the format cannot hold the picture.
        RunError: the disk is full, or the place cannot be written to.
    """
    height, width = picture.color.shape[1:]
    check_format(path, format, height, width, picture.alpha is not None)
    content = encode_picture(picture, path, format, compression)
    with replacing(path) as beside:
        beside.write_bytes(content)


def encode_picture(picture: Picture, path: object, format: Format = "png", compression: int = 6) -> bytes:
    """The content of a file, as `write_picture` writes it; `path` names it in the `ImageError`."""
    parts = [picture.color] if picture.alpha is None else [picture.color, picture.alpha]
    scale = 65535 if picture.bits == 16 and format == "png" else 255
    with _encoding(path):
        levels = (torch.cat(parts).clamp(0, 1) * scale).round().permute(1, 2, 0).contiguous().numpy()
        if scale == 65535:
            return _png_of_16_bits(levels.astype(">u2"), picture.profile, picture.exif, compression)
        grey = levels.shape[2] == 1
        image = Image.fromarray(levels.astype(np.uint8)[..., 0] if grey else levels.astype(np.uint8))
        options: dict[str, Any] = {"compress_level": compression} if format == "png" else {"quality": 95}
        options |= {"icc_profile": picture.profile} if picture.profile else {}
        options |= {"exif": picture.exif} if picture.exif else {}
        content = io.BytesIO()
        image.save(content, format=format, **options)
        return content.getvalue()


def write_png(image: Image.Image, path: Path) -> None:
    """Write an image as it is, as a PNG file that is there whole or not at all.

    Raises:
        ImageError: it cannot be encoded.
        RunError: the disk is full, or the place cannot be written to.
    """
    with _encoding(path), replacing(path) as beside:
        image.save(beside, format="PNG")


@contextmanager
def _encoding(path: object) -> Iterator[None]:
    """Turn whatever encoders raise into an `ImageError`: the one definition of "cannot be encoded"."""
    try:
        yield
    except (ImageError, RunError):
        raise
    except MemoryError as error:
        raise ImageError(f"{path}: there is not enough memory to write it") from error
    except Exception as error:  # encoders fail at sizes, profiles and EXIF data in many ways
        raise ImageError(f"{path}: {one_line(error)}") from error


def _png_of_16_bits(levels: np.ndarray, profile: bytes | None, exif: bytes | None, compression: int) -> bytes:
    """A PNG file of big-endian levels `[H, W, 1 to 4]`; Pillow writes such files for grey only."""
    height, width, channels = levels.shape
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = np.zeros((height, 1 + width * channels * 2), np.uint8)  # every row begins with its filter: none
    rows[:, 1:] = levels.reshape(height, -1).view(np.uint8)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0))]
    if profile:
        chunks.append((b"iCCP", b"ICC profile\0\0" + zlib.compress(profile)))
    if exif:
        chunks.append((b"eXIf", exif.removeprefix(b"Exif\0\0")))
    chunks += [(b"IDAT", zlib.compress(rows.tobytes(), compression)), (b"IEND", b"")]
    return _PNG + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )
