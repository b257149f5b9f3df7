"""Haze by the atmospheric scattering model (Koschmieder; Narasimhan and Nayar, IJCV 2002)."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.random import RandomState
from torch import Tensor

from visionattn.data.degradations.ranges import Range, draw


def scatter(image: Tensor, depth: Tensor, beta: float, airlight: float) -> Tensor:
    """The image through haze: J t + A (1 - t), with the transmission t = exp(-beta depth).

    Args:
        image: the clear image J, `[C, H, W]` in [0, 1].
        depth: `[1, H, W]`, not negative.
        beta: scattering coefficient, for one unit of depth.
        airlight: colour A of the haze in [0, 1], the same in all channels.
    """
    transmission = torch.exp(-beta * depth)
    return image * transmission + airlight * (1 - transmission)


def haze(
    image: Tensor,
    rng: RandomState,
    depth: Tensor | None = None,
    beta: Range = (0.6, 1.8),
    airlight: Range = (0.7, 1.0),
) -> Tensor:
    """Haze of a random thickness and brightness; the ranges are RESIDE's for its indoor set.

    Args:
        image: `[C, H, W]` in [0, 1].
        rng: source of chance.
        depth: `[1, H, W]`; a `synthetic_depth` where there is none.
        beta: scattering coefficient, or its range.
        airlight: brightness of the haze, or its range.
    """
    thickness, brightness = draw(rng, beta), draw(rng, airlight)
    if depth is None:
        depth = synthetic_depth(image.shape[-2], image.shape[-1], rng)
    return scatter(image, depth.to(image), thickness, brightness)


def synthetic_depth(height: int, width: int, rng: RandomState) -> Tensor:
    """A stand-in for depth: ground that recedes from the lower to the upper edge, with soft relief.

    The lower edge lies at a distance between 0 and 0.5, the upper one up to 1 further; the relief is a grid
    of 5x5 values of up to 0.25 more or less, enlarged smoothly.

    Returns:
        float32 `[1, height, width]`, not negative.
    """
    near, reach = rng.uniform(0, 0.5), rng.uniform(0, 1)
    relief = torch.from_numpy(rng.uniform(-0.25, 0.25, (1, 1, 5, 5)).astype(np.float32))
    smooth = F.interpolate(relief, (height, width), mode="bicubic", align_corners=True)[0]
    return (near + reach * torch.linspace(1, 0, height)[None, :, None] + smooth).clamp(min=0)
