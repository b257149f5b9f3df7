"""Attention whose keys include tokens that earlier blocks handed on (FcaFormer).

Paper: "FcaFormer: Forward Cross Attention in Hybrid Vision Transformer", https://arxiv.org/abs/2211.07198.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from visionattn.kernels import dense_attention
from visionattn.layers.linear import Linear


class CrossAttention(nn.Module):
    """Attention of all pixels to all pixels and to tokens that earlier blocks handed on.

    A learned bias belongs to every distance along rows and columns, another to every token.

    Args:
        dim: channels.
        num_heads: attention heads.
        size: height and width of the map.
        tokens: how many tokens there are.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        size: tuple[int, int],
        tokens: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.size = size
        self.qkv = Linear(dim, 3 * dim, **dd)
        self.proj = Linear(dim, dim, **dd)
        self.attention_biases = nn.Parameter(torch.zeros(num_heads, size[0] * size[1], **dd))
        self.s_norm = None
        if tokens:
            self.s_token_bias = nn.Parameter(torch.zeros(1, num_heads, 1, tokens, **dd))
            self.s_scale_factors = nn.Parameter(torch.ones(1, tokens, 1, **dd))
            self.s_norm = nn.LayerNorm(dim, **dd)

    def forward(self, x: Tensor, cross: Sequence[Tensor] = ()) -> Tensor:
        """`[B, H, W, C]` and tokens `[B, S, C]`, the oldest first, to `[B, H, W, C]`."""
        height, width = x.shape[1:3]
        tokens = x.flatten(1, 2)
        if self.s_norm is not None:
            # The factors stand before a norm, so that they act by their sign and against its eps alone.
            tokens = torch.cat([tokens, self.s_norm(torch.cat(tuple(cross), 1) * self.s_scale_factors)], 1)
        q, k, v = self.qkv(tokens).unflatten(-1, (3, self.num_heads, -1)).unsqueeze(1).unbind(3)
        out = dense_attention(q[:, :, : height * width], k, v, bias=self.bias())
        return self.proj(out.flatten(3)).view_as(x)

    def bias(self) -> Tensor:
        """The bias `[heads, H * W, H * W + tokens]` of every pixel and key."""
        (height, width), heads = self.size, self.num_heads
        table = self.attention_biases.view(heads, height, width)
        rows, columns = (_distances(side, table.device) for side in self.size)
        # From [heads, dy, query column, key column]; whole lines of keys are copied.
        lines = table.index_select(2, columns.flatten()).view(heads, height, width, width).transpose(1, 2)
        pixels = lines.index_select(2, rows.flatten()).view(heads, width, height, -1).transpose(1, 2)
        if self.s_norm is not None:
            pixels = torch.cat(
                [pixels, self.s_token_bias.view(heads, 1, 1, -1).expand(-1, height, width, -1)], -1
            )
        return pixels.flatten(1, 2)


def _distances(side: int, device: torch.device) -> Tensor:
    """How far apart the pixels of a line are, `[side, side]`."""
    line = torch.arange(side, device=device)
    return (line[:, None] - line).abs()
