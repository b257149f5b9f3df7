"""Reading and listing image files, so that a broken one is named with the reason."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from visionattn.data.decode import ImageError as ImageError
from visionattn.data.decode import as_rgb, opened

EXTENSIONS = frozenset({".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})


def open_image(path: str | Path, content: BinaryIO | None = None) -> Image.Image:
    """The image of a file as 8-bit RGB, upright, fully decoded; see `decode.as_rgb`.

    Args:
        path: the file.
        content: what the file holds, if it lies elsewhere than on the disk; `path` then only names it.

    Raises:
        FileNotFoundError: there is no such file.
        ImageError: the file is not an image, is damaged, is dangerously large, or has pixels of 32 bits.
    """
    with opened(path, content) as image:
        return as_rgb(image, path)


def read_image(path: str | Path) -> Tensor:
    """The image of a file as uint8 `[3, H, W]`; raises as `open_image` does."""
    return to_tensor(open_image(path))


def to_grey(image: Tensor) -> Tensor:
    """Colours `[3, H, W]` as one channel `[1, H, W]`: an image of equal channels as it is, others as luma.

    So do the evaluations of grey networks: the files of grey sets pass unchanged, those of colour become Y.
    uint8 stays uint8, and its luma is rounded; floats in [0, 1] stay such.
    """
    if torch.equal(image[0], image[1]) and torch.equal(image[1], image[2]):
        return image[:1]
    if image.is_floating_point():
        return rgb_to_y(255 * image) / 255
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
    """The image files directly in `folder`, by name. Hidden ones are none; links to nowhere are listed.

    Args:
        folder: where to look.
        extensions: endings of the files, in lower case and with their dot.

    Raises:
        FileNotFoundError: the folder does not exist or holds no image.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    files = sorted(
        file
        for file in folder.iterdir()
        if file.suffix.lower() in extensions and not is_hidden(file) and not file.is_dir()
    )
    if not files:
        raise FileNotFoundError(f"the folder {folder} holds no image ({', '.join(sorted(extensions))})")
    return files


def walk_files(folder: Path, above: tuple[tuple[int, int], ...] = ()) -> Iterator[Path]:
    """All files in a folder and its folders in order, linked folders too, without what is hidden.

    `above` are the folders on the way down: a link back up to one of them would never end.
    """
    status = folder.stat()
    here = (status.st_dev, status.st_ino)
    if here in above:
        return
    for entry in sorted(folder.iterdir()):
        if is_hidden(entry):
            continue
        if entry.is_dir():
            yield from walk_files(entry, (*above, here))
        else:
            yield entry


def is_hidden(path: Path) -> bool:
    """Whether a file or folder is none of the user's own: `.ipynb_checkpoints`, `._photo.jpg`."""
    return path.name.startswith(".")
