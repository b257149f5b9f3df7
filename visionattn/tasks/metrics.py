"""Image quality as the restoration literature reports it, equal to BasicSR's numbers.

Images are uint8, and a border is cut off first. PSNR and SSIM (Wang et al., IEEE TIP 2004) are taken in
float64, on RGB or on the luma Y of BT.601 in its studio range.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

_WINDOW = 11


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


def psnr(image: Tensor, truth: Tensor, *, border: int = 0, luma: bool = False) -> float:
    """Peak signal-to-noise ratio in dB; infinite for equal images.

    Args:
        image: uint8 `[C, H, W]`, C being 3 or 1.
        truth: of the same shape.
        border: pixels cut off at each side: the scale in super-resolution, otherwise 0.
        luma: compare Y in place of RGB.

    Raises:
        TypeError: an image is not uint8.
        ValueError: the shapes differ, or nothing is left within the border.
    """
    a, b = _prepare(image, truth, border, luma)
    return (10 * torch.log10(255**2 / (a - b).square().mean())).item()


def ssim(image: Tensor, truth: Tensor, *, border: int = 0, luma: bool = False) -> float:
    """Structural similarity over 11x11 Gaussian windows inside the image; RGB is the mean over the channels.

    Arguments and errors are those of `psnr`; each side must keep at least 11 pixels.
    """
    a, b = _prepare(image, truth, border, luma)
    if min(a.shape[-2:]) < _WINDOW:
        raise ValueError(f"SSIM needs {_WINDOW} pixels per side, but {a.shape[-2]}x{a.shape[-1]} are left")
    _, full = structural_similarity_index_measure(a[None], b[None], data_range=255.0, return_full_image=True)
    # The protocol counts only windows that lie inside the image; torchmetrics mirrors beyond it.
    inside = slice(_WINDOW // 2, -(_WINDOW // 2))
    return full[..., inside, inside].mean().item()


def _prepare(image: Tensor, truth: Tensor, border: int, luma: bool) -> list[Tensor]:
    if image.dtype != torch.uint8 or truth.dtype != torch.uint8:
        raise TypeError(f"quality is measured on uint8 images, got {image.dtype} and {truth.dtype}")
    height, width = image.shape[-2:]
    if image.shape != truth.shape or min(height, width) <= 2 * border:
        raise ValueError(
            f"image {tuple(image.shape)} and truth {tuple(truth.shape)} must have one shape, "
            f"with more than {2 * border} pixels per side"
        )
    pair = (x[..., border : height - border, border : width - border] for x in (image, truth))
    return [(rgb_to_y(x) if luma else x).double() for x in pair]
