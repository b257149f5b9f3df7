"""Modules of `[B, C, H, W]` on maps that are kept as `[B, H, W, C]`."""

from __future__ import annotations

from torch import Tensor, nn


def on_nhwc(module: nn.Module, x: Tensor) -> Tensor:
    """Apply a convolution or pooling to `[B, H, W, C]`; both permutations are views."""
    return module(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
