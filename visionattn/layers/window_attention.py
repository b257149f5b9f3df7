"""Window attention that fills up maps by Swin's rule."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn

from visionattn.kernels import window_attention
from visionattn.layers.linear import Linear
from visionattn.layers.maps import fill_up


class WindowAttention2d(nn.Module):
    """Attention in windows (https://arxiv.org/abs/2103.14030); `[B, H, W, dim]` to `[B, H, W, dim]`.

    O(H W (dim² + window_size² dim)) operations. Maps that windows do not divide are filled up with zero
    pixels before the projection: these are keys and values, equal to its bias, in their windows.

    Args:
        dim: channels.
        num_heads: attention heads.
        window_size: side of a window in pixels.
        shift: where windows begin.
        always_shift: also shift windows on maps with a side of one window or less, as dense backbones do; the
            classification form does not.
        relative_bias: a learned bias per head and offset between two pixels.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int,
        shift: int = 0,
        always_shift: bool = False,
        relative_bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.window_size = window_size
        self.shift = shift
        self.always_shift = always_shift
        self.qkv = Linear(dim, 3 * dim, **dd)
        self.proj = Linear(dim, dim, **dd)
        self.relative_position_bias_table = None
        if relative_bias:
            side = 2 * window_size - 1
            table = nn.Parameter(torch.empty(num_heads, side, side, **dd))
            self.relative_position_bias_table = trunc_normal_(table, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, H, W, C]`."""
        height, width = x.shape[1:3]
        shifted = self.always_shift or min(height, width) > self.window_size
        x = fill_up(x, (self.window_size, self.window_size))
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(3)
        bias = self.relative_position_bias_table
        out = window_attention(q, k, v, self.window_size, shift=self.shift if shifted else 0, bias=bias)
        return self.proj(out[:, :height, :width].flatten(3))
