"""The body of restoration transformers: blocks, a convolution, one skip around both."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from timm.models._manipulate import checkpoint
from torch import Tensor, nn

from visionattn.layers.bands import by_bands
from visionattn.layers.maps import on_nhwc


class ResidualGroup(nn.Module):
    """`x + conv(blocks(x))` with a 3x3 convolution.

    Args:
        dim: channels.
        blocks: modules on `[B, H, W, C]`.

    Attributes:
        grad_checkpointing: recompute blocks in the backward pass instead of storing what they hold.
    """

    def __init__(
        self,
        dim: int,
        blocks: Sequence[nn.Module],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, device=device, dtype=dtype)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, H, W, C]`."""
        y = x
        for block in self.blocks:
            y = checkpoint(block, y) if self.grad_checkpointing and self.training else block(y)
        return by_bands(lambda x, y: x + on_nhwc(self.conv, y), x, y, halo=1)
