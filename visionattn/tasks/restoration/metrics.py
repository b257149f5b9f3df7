"""Image quality as the restoration literature reports it, equal to BasicSR's, SwinIR's and HSIR's numbers.

Images are uint8, and a border is cut off first. PSNR and SSIM (Wang et al., IEEE TIP 2004) are taken in
float64, on RGB or on the luma Y of BT.601 in its studio range. Hyperspectral cubes are floats in [0, 1].
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from visionattn.data.images import rgb_to_y

_WINDOW = 11
_CUBE_WINDOW = 7
_BLOCK = 8
#: fewest pixels per side, within the border, for which a metric has a value
SMALLEST = {"ssim": _WINDOW, "psnr_b": 2 * _BLOCK, "mssim": _CUBE_WINDOW}
_SAM_EPS = 1e-8


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


def psnr_b(image: Tensor, truth: Tensor, *, border: int = 0, luma: bool = False) -> float:
    """PSNR that counts the steps between JPEG's blocks of 8x8 pixels as errors too, in dB.

    (Yim and Bovik, Quality assessment of deblocked images, IEEE TIP 2011.) For RGB it is the mean over the
    channels. The normalisation is that of SwinIR's evaluation, which counts H (W // 8 - 1) pairs of pixels
    at the vertical edges of blocks; publications differ there by hundredths of a decibel.

    Arguments and errors are those of `psnr`; each side must keep at least 16 pixels, two blocks.
    """
    a, b = _prepare(image, truth, border, luma)
    if min(a.shape[-2:]) < 2 * _BLOCK:
        raise ValueError(f"PSNR-B needs {2 * _BLOCK} pixels per side, but {tuple(a.shape[-2:])} are left")
    errors = (a - b).square().mean((1, 2)) + _blocking(a)
    return (10 * torch.log10(255**2 / errors)).mean().item()


def mpsnr(cube: Tensor, truth: Tensor) -> float:
    """Mean over the bands of their PSNR in dB.

    Args:
        cube: floats `[bands, H, W]`, clamped to [0, 1] here.
        truth: of the same shape, in [0, 1].

    Raises:
        ValueError: the shapes differ.
    """
    a, b = _prepare_cubes(cube, truth)
    return (-10 * torch.log10((a - b).square().mean((1, 2)))).mean().item()


def mssim(cube: Tensor, truth: Tensor, data_range: float = 2.0) -> float:
    """Mean over the bands of their SSIM in uniform 7x7 windows inside the image: scikit-image's default.

    Args:
        cube: as in `mpsnr`.
        truth: as in `mpsnr`.
        data_range: 2 is what the hyperspectral literature reports with: scikit-image took it for floats where
            none was given.

    Raises:
        ValueError: the shapes differ, or a side has fewer than 7 pixels.
    """
    a, b = _prepare_cubes(cube, truth)
    if min(a.shape[-2:]) < _CUBE_WINDOW:
        raise ValueError(f"SSIM of cubes needs {_CUBE_WINDOW} pixels per side, not {tuple(a.shape[-2:])}")
    mean_a, mean_b, aa, bb, ab = (
        F.avg_pool2d(x[None], _CUBE_WINDOW, stride=1)[0] for x in (a, b, a * a, b * b, a * b)
    )
    unbiased = _CUBE_WINDOW**2 / (_CUBE_WINDOW**2 - 1)
    var_a, var_b = unbiased * (aa - mean_a**2), unbiased * (bb - mean_b**2)
    covariance = unbiased * (ab - mean_a * mean_b)
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    return (luminance * (2 * covariance + c2) / (var_a + var_b + c2)).mean().item()


def sam(cube: Tensor, truth: Tensor) -> float:
    """Spectral angle: the mean over the pixels of the angle between the spectra, in radians.

    Arguments and errors are those of `mpsnr`.
    """
    a, b = _prepare_cubes(cube, truth)
    cosine = ((a * b).sum(0) + _SAM_EPS) / ((a.norm(dim=0) + _SAM_EPS) * (b.norm(dim=0) + _SAM_EPS))
    return torch.arccos(cosine.clamp(-1, 1)).mean().item()


def _blocking(image: Tensor) -> Tensor:
    """By how much the mean squared step at borders of blocks exceeds that elsewhere, weighted: `[C]`."""
    height, width = image.shape[-2:]
    at_border = inside = torch.zeros(len(image), dtype=image.dtype)
    borders = 0
    for x in (image, image.transpose(-1, -2)):
        steps = x.diff(dim=-1).square().sum(1)
        edges = torch.arange(steps.shape[-1]) % _BLOCK == _BLOCK - 1
        at_border, inside = at_border + steps[:, edges].sum(1), inside + steps[:, ~edges].sum(1)
        borders += x.shape[-2] * (x.shape[-1] // _BLOCK - 1)
    total = height * (width - 1) + width * (height - 1)
    excess = at_border / borders - inside / (total - borders)
    return excess.clamp(min=0) * math.log2(_BLOCK) / math.log2(min(height, width))


def _prepare_cubes(cube: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    if cube.shape != truth.shape or cube.ndim != 3:
        raise ValueError(f"cube {tuple(cube.shape)} and truth {tuple(truth.shape)} must have one shape")
    return cube.double().clamp(0, 1), truth.double()


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
