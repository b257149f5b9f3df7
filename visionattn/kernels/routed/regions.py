"""Maps cut into regions: one row per image, head and region, in row-major order."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def to_rows(x: Tensor, region: tuple[int, int]) -> Tensor:
    """`[B * heads * regions, pixels, d]` of `[B, H, W, heads, d]`, border regions filled up with zeros."""
    bottom, right = -x.shape[1] % region[0], -x.shape[2] % region[1]
    x = F.pad(x, (0, 0, 0, 0, 0, right, 0, bottom)) if bottom or right else x
    x = x.unflatten(2, (-1, region[1])).unflatten(1, (-1, region[0]))
    return x.permute(0, 5, 1, 3, 2, 4, 6).flatten(4, 5).flatten(0, 3)


def from_rows(x: Tensor, like: Tensor, region: tuple[int, int]) -> Tensor:
    """The inverse of `to_rows`: rows `[..., pixels, n]` to the map `[B, H, W, heads, n]` of `like`."""
    batch, height, width, heads, _ = like.shape
    regions = -(-height // region[0]), -(-width // region[1])
    x = x.unflatten(1, region).unflatten(0, (batch, heads, *regions)).permute(0, 2, 4, 3, 5, 1, 6)
    return x.flatten(3, 4).flatten(1, 2)[:, :height, :width]
