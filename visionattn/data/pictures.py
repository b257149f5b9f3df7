"""Image files with everything that must survive a restoration: bit depth, transparency, profile, EXIF."""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageCms
from torch import Tensor

from visionattn.data.images import EXTENSIONS, ImageError, decoding, list_images
from visionattn.files import replacing

Format = Literal["png", "jpeg", "webp"]

#: endings of the files that `list_pictures` finds
PICTURE_EXTENSIONS = EXTENSIONS | {".avif", ".gif", ".jfif", ".jp2", ".jpe", ".tga"}

_ORIENTATION = 0x0112  # the EXIF tag
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_RGB, _PNG_RGBA = 2, 6


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


def read_picture(path: str | Path) -> Picture:
    """Decode an image file.

    Grey, colour and palette images of 8 bits in any format of Pillow, opaque grey ones of 16 bits, and
    colours of 16 bits in PNG. Colours of printing (CMYK) become RGB, by their profile if the file brings one.

    Raises:
        FileNotFoundError: there is no such file.
        ImageError: the file is no image, is damaged, animated, or dangerously large, or has pixels of another
            kind.
    """
    with decoding(path):
        content = Path(path).read_bytes()
        with Image.open(io.BytesIO(content)) as image:
            frames = getattr(image, "n_frames", 1)
            if frames > 1:
                raise ImageError(
                    f"{path}: animated or of several pages ({frames}); only single images are restored"
                )
            image.load()
            pixels, bits, profile = _pixels(image, content, str(path))
            exif, orientation = image.getexif(), image.getexif().get(_ORIENTATION, 1)
    exif.pop(_ORIENTATION, None)
    pixels = _upright(pixels, orientation)
    colors = (pixels.shape[0] - 1) // 2 * 2 + 1
    alpha = pixels[colors:] if pixels.shape[0] > colors else None
    return Picture(pixels[:colors], alpha, bits, profile, exif.tobytes() if len(exif) else None)


def write_picture(picture: Picture, path: Path, format: Format = "png") -> None:
    """Write a file, which is there whole or not at all.

    PNG keeps 16 bits per channel; the other formats have 8.

    Raises:
        ImageError: the format cannot hold the picture.
        RunError: the disk is full.
    """
    if format == "jpeg" and picture.alpha is not None:
        raise ImageError(f"{path}: JPEG cannot hold transparency; choose PNG or WebP")
    parts = [picture.color] if picture.alpha is None else [picture.color, picture.alpha]
    scale = 65535 if picture.bits == 16 and format == "png" else 255
    levels = (torch.cat(parts).clamp(0, 1) * scale).round().permute(1, 2, 0).contiguous().numpy()
    with replacing(path) as beside:
        if scale == 65535:
            beside.write_bytes(_png_of_16_bits(levels.astype(">u2"), picture.profile, picture.exif))
            return
        image = Image.fromarray(
            levels.astype(np.uint8).squeeze(-1) if levels.shape[2] == 1 else levels.astype(np.uint8)
        )
        options: dict[str, Any] = {"quality": 95} if format != "png" else {}
        options |= {"icc_profile": picture.profile} if picture.profile else {}
        options |= {"exif": picture.exif} if picture.exif else {}
        try:
            image.save(beside, format=format, **options)
        except ValueError as error:  # sides beyond what the format allows
            raise ImageError(f"{path}: {error}") from error


def write_png(image: Image.Image, path: Path) -> None:
    """Write an image as it is, as a PNG file that is there whole or not at all.

    Raises:
        RunError: the disk is full.
    """
    with replacing(path) as beside:
        image.save(beside, format="PNG")


def _pixels(image: Image.Image, content: bytes, path: str) -> tuple[Tensor, int, bytes | None]:
    """Channels `[C, H, W]` in [0, 1], bits per channel, and the profile that describes them."""
    profile = image.info.get("icc_profile")
    if image.format == "PNG" and content[24] == 16 and content[25] in (_PNG_RGB, _PNG_RGBA):
        return _colors_of_16_bits(image, content), 16, profile
    if image.mode.startswith("I;16"):
        return torch.from_numpy(np.array(image).astype(np.float32))[None] / 65535, 16, profile
    if image.mode in ("I", "F"):
        raise ImageError(f"{path}: pixels of 32 bits; convert them to 8 or 16 bits first")
    transparent = image.has_transparency_data
    # A profile describes the colours before their conversion.
    kept = None if image.mode in ("CMYK", "HSV", "LAB", "YCbCr") else profile
    if image.mode == "CMYK" and profile:
        image = _to_srgb(image, profile, path)
    grey = image.mode in ("1", "L", "LA", "La")
    mode = ("LA" if grey else "RGBA") if transparent else ("L" if grey else "RGB")
    levels = np.atleast_3d(np.array(image.convert(mode)))
    return torch.from_numpy(levels).permute(2, 0, 1).float() / 255, 8, kept


def _colors_of_16_bits(image: Image.Image, content: bytes) -> Tensor:
    """Channels `[C, H, W]` of a PNG file, of which Pillow decodes the upper byte of every number.

    Read as if the lower byte came first, it gives the lower one.
    """
    with Image.open(io.BytesIO(content)) as lower:
        lower.tile = [(*tile[:3], tile[3].replace("16B", "16L")) for tile in lower.tile]  # type: ignore
        levels = np.array(image).astype(np.float32) * 256 + np.array(lower)
    return torch.from_numpy(levels).permute(2, 0, 1) / 65535


def _to_srgb(image: Image.Image, profile: bytes, path: str) -> Image.Image:
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        target = ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, source, target, outputMode="RGB")
    except ImageCms.PyCMSError as error:
        raise ImageError(f"{path}: its colour profile cannot be used: {error}") from error
    assert converted is not None  # as nothing was asked to happen in place
    return converted


def _upright(pixels: Tensor, orientation: int) -> Tensor:
    """Turn `[C, H, W]` by the orientation of EXIF, 1 to 8."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 2)
    flips = {2: (2,), 3: (1, 2), 4: (1,), 6: (2,), 7: (1, 2), 8: (1,)}.get(orientation, ())
    return pixels.flip(flips) if flips else pixels


def _png_of_16_bits(levels: np.ndarray, profile: bytes | None, exif: bytes | None) -> bytes:
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
    chunks += [(b"IDAT", zlib.compress(rows.tobytes(), 6)), (b"IEND", b"")]
    return _PNG + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )
