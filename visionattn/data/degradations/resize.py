"""Resizing as MATLAB does it, and rounding to 8 bits.

`imresize` follows MATLAB's function of that name with bicubic interpolation, by which the inputs of the
super-resolution benchmarks are made (kernel: R. Keys, Cubic Convolution Interpolation for Digital Image
Processing, IEEE ASSP 1981, a = -1/2).
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor


def imresize(x: Tensor, scale: float, *, antialias: bool = True) -> Tensor:
    """Bicubic resizing as MATLAB does it.

    Args:
        x: floating-point images `[..., H, W]`.
        scale: output side / input side. The output has `ceil(side * scale)` pixels per side.
        antialias: widen the kernel when the image becomes smaller.

    Returns:
        `[..., ceil(H * scale), ceil(W * scale)]`, neither clipped nor rounded.
    """
    if not x.is_floating_point():
        raise TypeError(f"imresize takes floating-point images, got {x.dtype}")
    if scale <= 0:
        raise ValueError(f"scale must be positive, got {scale}")
    for dim in (-2, -1):
        weights, indices = _taps(x.shape[dim], scale, antialias)
        weights = weights.to(x)
        if dim == -2:
            weights = weights.unsqueeze(-1)
        indices = indices.to(x.device)
        x = sum((x.index_select(dim, i) * w for i, w in zip(indices, weights, strict=True)), x.new_zeros(()))
    return x


def modcrop(x: Tensor, multiple: int) -> Tensor:
    """Cuts right and bottom so that both sides of `x` `[..., H, W]` are multiples of `multiple` pixels."""
    height, width = x.shape[-2:]
    if min(height, width) < multiple:
        raise ValueError(f"an image of {height}x{width} is smaller than {multiple} pixels")
    return x[..., : height - height % multiple, : width - width % multiple]


def to_uint8(x: Tensor) -> Tensor:
    """`x` in [0, 1] as uint8 in 0..255: clamped, rounded half to even."""
    return (x.clamp(0, 1) * 255).round().to(torch.uint8)


def bicubic_low_resolution(image: Tensor, upscale: int) -> Tensor:
    """The low-resolution image of a benchmark, uint8: `image` `[..., H, W]`, made `upscale` times smaller.

    `image` is uint8, or floats in [0, 1] where the truth has more than 8 bits.
    """
    x = image if image.is_floating_point() else image.float() / 255
    return to_uint8(imresize(x, 1 / upscale))


def bicubic_upscale(image: Tensor, upscale: int) -> Tensor:
    """The bicubic baseline: `image` uint8 `[..., H, W]`, made `upscale` times larger."""
    return to_uint8(imresize(image.float() / 255, upscale))


def quantize(image: Tensor) -> Tensor:
    """`image` as an 8-bit file would hold it: clipped to [0, 1], in steps of 1 / 255."""
    return to_uint8(image).to(image.dtype) / 255


def bicubic(image: Tensor, upscale: int) -> Tensor:
    """`image` `[C, H, W]` in [0, 1] made `upscale` times smaller, as `bicubic_low_resolution` does."""
    return quantize(imresize(image, 1 / upscale))


@lru_cache(maxsize=256)
def _taps(size: int, scale: float, antialias: bool) -> tuple[Tensor, Tensor]:
    """Weights (float64) and input positions of every tap, both `[taps, output size]`."""
    stretch = min(scale, 1.0) if antialias else 1.0
    output = math.ceil(round(size * scale, 9))  # so that 3 * (1 / 3) is not a little more than 1
    taps = math.ceil(4 / stretch) + 2
    centre = (torch.arange(output, dtype=torch.float64) + 0.5) / scale - 0.5
    first = torch.floor(centre - 2 / stretch)
    positions = first + torch.arange(taps, dtype=torch.float64).unsqueeze(1)
    weights = _keys(stretch * (centre - positions))
    used = (weights != 0).any(1)
    weights, positions = weights[used], positions[used].long()
    # Symmetric borders: the row ... 1 0 | 0 1 ... n-1 | n-1 n-2 ... repeats every 2n pixels.
    positions = positions % (2 * size)
    return weights / weights.sum(0), torch.minimum(positions, 2 * size - 1 - positions)


def _keys(x: Tensor) -> Tensor:
    x = x.abs()
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return torch.where(x <= 1, near, torch.where(x <= 2, far, torch.zeros_like(x)))
