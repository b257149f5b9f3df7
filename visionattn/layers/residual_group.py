"""The body of restoration transformers: blocks, a convolution, one skip around both."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from timm.models import checkpoint
from torch import Tensor, nn

from visionattn.layers.bands import convolved
from visionattn.layers.maps import on_nhwc


def run_blocks(blocks: Iterable[nn.Module], x: Tensor, recompute: bool) -> Tensor:
    """Blocks one after the other; `recompute` them in the backward pass instead of storing what they hold."""
    for block in blocks:
        x = checkpoint(block, x) if recompute else block(x)
    return x


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
        y = run_blocks(self.blocks, x, self.grad_checkpointing and self.training)
        return add_convolved(x, self.conv, y)


def add_convolved(x: Tensor, conv: nn.Conv2d, y: Tensor) -> Tensor:
    """`x + conv(y)` on `[B, H, W, C]` for a 3x3 convolution, by bands."""
    return convolved(lambda x, y: x + on_nhwc(conv, y), x, y, halo=1)
