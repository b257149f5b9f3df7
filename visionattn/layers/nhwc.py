"""What layers on `[B, H, W, C]` maps share."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def conv_nhwc(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A convolution on `[B, H, W, C]`; the permutations are views of channels-last memory."""
    return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def fill_up(x: Tensor, height: int, width: int) -> Tensor:
    """`[B, height, width, C]` of a smaller `[B, H, W, C]`: zeros on the right and bottom."""
    bottom, right = height - x.shape[1], width - x.shape[2]
    return F.pad(x, (0, 0, 0, right, 0, bottom)) if bottom or right else x
