"""Blur kernels of real photographs, and filtering with them.

The kernels are those of Real-ESRGAN (Wang et al., 2021, arXiv 2107.10833): Gaussian, generalised Gaussian,
plateau-shaped and sinc.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.random import RandomState
from torch import Tensor

from visionattn.data.degradations.ranges import Probability, Range

Shape = Literal["gaussian", "generalized", "plateau"]
KERNEL_SIZES = tuple(range(7, 22, 2))
#: Shape and isotropy of a random kernel, with Real-ESRGAN's probabilities.
_KINDS: Mapping[tuple[Shape, bool], float] = {
    ("gaussian", True): 0.45,
    ("gaussian", False): 0.25,
    ("generalized", True): 0.12,
    ("generalized", False): 0.03,
    ("plateau", True): 0.12,
    ("plateau", False): 0.03,
}


def blur_kernel(
    size: int, sigma: tuple[float, float], angle: float = 0.0, shape: Shape = "gaussian", beta: float = 1.0
) -> np.ndarray:
    """A kernel `[size, size]` of sum 1 with elliptic contours.

    With q the squared distance in units of `sigma`, the weights are exp(-q / 2), exp(-q^beta / 2)
    (generalised) or 1 / (1 + q^beta) (plateau).

    Args:
        size: odd, in pixels.
        sigma: standard deviations along the first and second axis, in pixels.
        angle: of the first axis against the rows, in radians.
        shape: which formula.
        beta: exponent of the generalised and plateau shapes.
    """
    axis = np.arange(size) - size // 2
    x, y = np.meshgrid(axis, axis)
    along, across = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    q = (along / sigma[0]) ** 2 + (across / sigma[1]) ** 2
    weights = 1 / (1 + q**beta) if shape == "plateau" else np.exp(-(q**beta) / 2)
    return weights / weights.sum()


def sinc_kernel(size: int, cutoff: float) -> np.ndarray:
    """The ideal circular low-pass filter cut to `[size, size]`, of sum 1, which rings and overshoots.

    Args:
        size: odd, in pixels.
        cutoff: in radians per pixel, up to pi.
    """
    axis = torch.arange(size, dtype=torch.float64) - size // 2
    radius = torch.hypot(axis[:, None], axis[None, :])
    weights = cutoff * torch.special.bessel_j1(cutoff * radius) / (2 * math.pi * radius)
    weights[size // 2, size // 2] = cutoff**2 / (4 * math.pi)  # the limit at radius 0
    return (weights / weights.sum()).numpy()


def random_kernel(
    rng: RandomState,
    sigma: tuple[float, float] = (0.2, 3.0),
    sinc_probability: float = 0.1,
    generalized_beta: tuple[float, float] = (0.5, 4.0),
    plateau_beta: tuple[float, float] = (1.0, 2.0),
) -> np.ndarray:
    """A kernel of 7 to 21 pixels as Real-ESRGAN draws it; the ranges are those of its first blur."""
    size = KERNEL_SIZES[rng.randint(len(KERNEL_SIZES))]
    if rng.uniform() < sinc_probability:
        # A small kernel cannot hold the rings of a low frequency.
        return sinc_kernel(size, rng.uniform(math.pi / (3 if size < 13 else 5), math.pi))
    shape, round_ = list(_KINDS)[rng.choice(len(_KINDS), p=list(_KINDS.values()))]
    first = rng.uniform(*sigma)
    second, angle = (first, 0.0) if round_ else (rng.uniform(*sigma), rng.uniform(-math.pi, math.pi))
    low, high = plateau_beta if shape == "plateau" else generalized_beta
    beta = 1.0
    if shape != "gaussian":
        beta = rng.uniform(low, 1) if rng.uniform() < 0.5 else rng.uniform(1, high)
    return blur_kernel(size, (first, second), angle, shape, beta)


def filter_image(image: Tensor, kernel: np.ndarray | Tensor) -> Tensor:
    """Correlation of images `[..., H, W]` with an odd kernel; borders are reflected.

    Where an image is too small to be reflected so far, its border is repeated.
    """
    weights = torch.as_tensor(kernel).to(image)
    return F.conv2d(_padded_planes(image, len(weights) // 2), weights[None, None]).reshape(image.shape)


def blur(
    image: Tensor, rng: RandomState, sigma: Range = (0.2, 3.0), sinc_probability: Probability = 0.1
) -> Tensor:
    """Blurs `image` `[C, H, W]` with a `random_kernel` of the given range."""
    return filter_image(image, random_kernel(rng, sigma, sinc_probability))


def sharpen(image: Tensor, weight: float = 0.5, threshold: float = 10 / 255) -> Tensor:
    """Unsharp masking of images `[..., H, W]` in [0, 1] where they differ from their blur, as in Real-ESRGAN.

    The blur is a Gaussian of 51 pixels and standard deviation 8; the mask of what differs by more than
    `threshold` is blurred likewise.
    """
    kernel = _gaussian_51().to(image)
    residual = image - _separable(image, kernel)
    mask = _separable((residual.abs() > threshold).to(image), kernel)
    return mask * (image + weight * residual).clamp(0, 1) + (1 - mask) * image


def _gaussian_51() -> Tensor:
    weights = torch.exp(-((torch.arange(51, dtype=torch.float64) - 25) ** 2) / (2 * 8.0**2))
    return weights / weights.sum()


def _separable(image: Tensor, weights: Tensor) -> Tensor:
    rows = F.conv2d(_padded_planes(image, len(weights) // 2), weights[None, None, None, :])
    return F.conv2d(rows, weights[None, None, :, None]).reshape(image.shape)


def _padded_planes(image: Tensor, margin: int) -> Tensor:
    mode = "reflect" if min(image.shape[-2:]) > margin else "replicate"
    return F.pad(image.reshape(-1, 1, *image.shape[-2:]), (margin,) * 4, mode=mode)
