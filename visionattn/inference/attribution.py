"""Which pixels a super-resolution network uses: local attribution maps and the diffusion index.

Paper: "Interpreting Super-Resolution Networks with Local Attribution Maps", CVPR 2021,
https://arxiv.org/abs/2011.11036.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

_STEPS = 50
_SIGMA = 1.2
_KERNEL = 9


@dataclass(frozen=True)
class Attribution:
    """The pixels on which the content of a window depends.

    Attributes:
        map: `[H, W]` of the input, in [0, 1]: the share of each pixel, the largest being 1.
        diffusion_index: 100 (1 - Gini coefficient of the map); the larger, the more pixels are used. 100 if
            all are used alike, 100 / n if only one of n is.
        window: top, left and side of the window, in pixels of the output.
    """

    map: Tensor
    diffusion_index: float
    window: tuple[int, int, int]


def local_attribution(
    network: Callable[[Tensor], Tensor], x: Tensor, upscale: int, top: int, left: int, side: int = 16
) -> Attribution:
    """The local attribution map of a window of the output.

    Gradients of the amount of detail in the window, the sum of the lengths of its finite differences, are
    summed along a path from a blurred input to the input itself, each weighted with how the input changes
    there: integrated gradients with the progressive blurring of the paper.

    Args:
        network: images `[1, C, H, W]` to `[1, C, upscale * H, upscale * W]`, differentiable.
        x: an image `[C, H, W]` in [0, 1].
        upscale: output side / input side.
        top: first row of the window in the output.
        left: first column of the window in the output.
        side: rows and columns of the window, at least 2.

    Raises:
        ValueError: the window does not lie in the output.
    """
    height, width = (n * upscale for n in x.shape[-2:])
    if side < 2 or min(top, left) < 0 or top + side > height or left + side > width:
        raise ValueError(
            f"a window of {side} pixels at row {top}, column {left} does not lie in the output of "
            f"{height}x{width}"
        )
    kernels = [_gaussian(_SIGMA * (1 - i / _STEPS)).to(x) for i in range(_STEPS + 1)]
    path = [_blur(x, kernel) for kernel in kernels]
    total = torch.zeros_like(x)
    for before, image in pairwise(path):
        image = image.detach().requires_grad_()
        window = network(image[None])[0, :, top : top + side, left : left + side]
        (gradient,) = torch.autograd.grad(_detail(window), image)
        total += gradient * (image.detach() - before)
    share = total.sum(0).abs()
    share = share / share.max().clamp(min=torch.finfo(share.dtype).tiny)
    return Attribution(share, diffusion_index(share), (top, left, side))


def diffusion_index(share: Tensor) -> float:
    """`100 (1 - g)` with the Gini coefficient `g` of the non-negative numbers of a map."""
    values = share.double().flatten().sort().values + 1e-7
    count = len(values)
    ranks = torch.arange(1, count + 1, dtype=torch.float64, device=values.device)
    gini = ((2 * ranks - count - 1) * values).sum() / (count * values.sum())
    return 100 * (1 - gini.item())


def _detail(window: Tensor) -> Tensor:
    """The sum of `sqrt(dx² + dy²)` over a window `[C, H, W]`, with a gradient of 0 where both are 0."""
    dx = (window[:, :, 1:] - window[:, :, :-1])[:, :-1]
    dy = (window[:, 1:] - window[:, :-1])[:, :, :-1]
    squares = dx.square() + dy.square()
    flat = squares == 0
    return squares.masked_fill(flat, 1).sqrt().masked_fill(flat, 0).sum()


def _gaussian(sigma: float) -> Tensor:
    """A normalised kernel `[9, 9]`; a single 1 in its middle for `sigma` 0."""
    offset = torch.arange(_KERNEL, dtype=torch.float64) - _KERNEL // 2
    weights = (-offset.square() / (2 * sigma**2)).exp() if sigma else (offset == 0).double()
    kernel = weights[:, None] * weights
    return kernel / kernel.sum()


def _blur(x: Tensor, kernel: Tensor) -> Tensor:
    """`[C, H, W]`, reflected at its borders."""
    pad = _KERNEL // 2
    mode = "reflect" if min(x.shape[1:]) > pad else "replicate"
    padded = F.pad(x[None], (pad,) * 4, mode=mode).transpose(0, 1)
    return F.conv2d(padded, kernel[None, None])[:, 0]
