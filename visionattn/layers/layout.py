"""How maps lie in memory and how they continue beyond their border."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def on_nhwc(module: nn.Module, x: Tensor) -> Tensor:
    """Apply a convolution or pooling to `[B, H, W, C]`; both permutations are views."""
    return module(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def mirror_index(size: int, length: int, device: torch.device) -> Tensor:
    """Indices `[length]`: 0 .. `size - 1`, then back, then forth, as often as needed; ends are repeated."""
    index = torch.arange(length, device=device) % (2 * size)
    return torch.minimum(index, 2 * size - 1 - index)
