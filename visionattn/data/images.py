"""Reading and listing image files, so that a broken one is named with the reason."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

EXTENSIONS = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
_MORE_THAN_8_BITS = ("I", "F")


class ImageError(ValueError):
    """An image file cannot be used; the message names the file and the reason."""


@contextmanager
def decoding(path: object) -> Iterator[None]:
    """Turn what decoders raise at damaged files into an `ImageError` that names the file.

    Raises:
        FileNotFoundError: there is no such file.
        ImageError: the file is not an image, is damaged, or is dangerously large.
    """
    try:
        yield
    except FileNotFoundError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(f"{path}: not an image file, or of an unknown format") from error
    # Pillow's decoders report damage by any of these, depending on the format.
    except (OSError, SyntaxError, EOFError, RuntimeError, Image.DecompressionBombError) as error:
        raise ImageError(f"{path}: {error}") from error


def open_image(path: str | Path, content: BinaryIO | None = None) -> Image.Image:
    """The image of a file as 8-bit RGB, upright (EXIF orientation applied), fully decoded.

    Args:
        path: the file.
        content: what the file holds, if it lies elsewhere than on the disk; `path` then only names it.

    Raises:
        FileNotFoundError: there is no such file.
        ImageError: the file is not an image, is damaged, is dangerously large, or holds more than 8 bits per
            channel (which a conversion would clip silently).
    """
    with decoding(path), Image.open(content or path) as image:
        if image.mode.startswith(_MORE_THAN_8_BITS):
            raise ImageError(f"{path}: {image.mode} pixels have more than 8 bits; convert them first")
        return ImageOps.exif_transpose(image).convert("RGB")


def read_image(path: str | Path) -> Tensor:
    """The image of a file as uint8 `[3, H, W]`; raises as `open_image` does."""
    return to_tensor(open_image(path))


def to_grey(image: Tensor) -> Tensor:
    """uint8 `[3, H, W]` as uint8 `[1, H, W]`: an image of equal channels as it is, others as rounded luma.

    So do the evaluations of grey networks: the files of grey sets pass unchanged, those of colour become Y.
    """
    if torch.equal(image[0], image[1]) and torch.equal(image[1], image[2]):
        return image[:1]
    return rgb_to_y(image).round().to(torch.uint8)


def rgb_to_y(image: Tensor) -> Tensor:
    """Luma of BT.601 in the studio range, as MATLAB's `rgb2ycbcr`, not rounded.

    Args:
        image: uint8 `[..., 3, H, W]`, or `[..., 1, H, W]`, which is grey already and passes unchanged.

    Returns:
        float32 `[..., 1, H, W]`: black is 16, white 235.
    """
    if image.shape[-3] == 1:
        return image.float()
    red, green, blue = (image.float() / 255).split(1, dim=-3)
    return 16 + 65.481 * red + 128.553 * green + 24.966 * blue


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB image as uint8 `[3, H, W]`."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def to_pil(image: Tensor) -> Image.Image:
    """A uint8 tensor `[3, H, W]` as an RGB image, or `[1, H, W]` as a grey one."""
    pixels = image.cpu().permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def list_images(folder: str | Path, extensions: Collection[str] = EXTENSIONS) -> list[Path]:
    """The image files directly in `folder`, by name.

    Args:
        folder: where to look.
        extensions: endings of the files, in lower case and with their dot.

    Raises:
        FileNotFoundError: the folder does not exist or holds no image.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in extensions and file.is_file())
    if not files:
        raise FileNotFoundError(f"the folder {folder} holds no image ({', '.join(sorted(extensions))})")
    return files
