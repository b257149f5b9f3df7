"""Local multi-head attention as layers on `[B, H, W, C]` maps: projections and a learned relative bias."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from visionattn.kernels import neighborhood_attention, overlapping_window_attention
from visionattn.kernels.local.pattern import Border
from visionattn.layers.linear import Linear


class _LocalAttention2d(nn.Module):
    """Project to queries, keys and values and back, with a bias table `rpb`, key minus query."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        reach: int,
        qkv_bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim must be a multiple of num_heads, got {dim} and {num_heads}")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.rpb = nn.Parameter(torch.empty(num_heads, 2 * reach + 1, 2 * reach + 1, **dd))
        self.proj = Linear(dim, dim, **dd)
        trunc_normal_(self.rpb, std=0.02)

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values `[B, H, W, heads, d]`, views of one packed projection."""
        return self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(3)


class NeighborhoodAttention2d(_LocalAttention2d):
    """Attention of every pixel to its `kernel_size` x `kernel_size` nearest pixels (NAT, DiNAT).

    Maps smaller than `kernel_size * dilation` are filled up with zeros on the right and bottom, before the
    projection: the filled-up pixels are keys with the value of its bias, as in the official operator.

    Args:
        dim: channels.
        num_heads: attention heads.
        kernel_size: side of the neighborhood.
        dilation: pixels from one key to the next.
        qkv_bias: whether the projection to queries, keys and values has a bias.

    Raises:
        ValueError: `num_heads` does not divide `dim`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int = 7,
        dilation: int = 1,
        qkv_bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(dim, num_heads, kernel_size - 1, qkv_bias, device, dtype)
        self.kernel_size = kernel_size
        self.dilation = dilation

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, H, W, C]`."""
        height, width = x.shape[1:3]
        smallest = self.kernel_size * self.dilation
        if height < smallest or width < smallest:
            x = F.pad(x, (0, 0, 0, max(smallest - width, 0), 0, max(smallest - height, 0)))
        q, k, v = self.project(x)
        out = neighborhood_attention(q, k, v, self.kernel_size, dilation=self.dilation, bias=self.rpb)
        return self.proj(out[:, :height, :width].flatten(3))


class OverlappingWindowAttention2d(_LocalAttention2d):
    """Windows of queries over larger windows of keys (HAT, halo attention).

    Args:
        dim: channels.
        num_heads: attention heads.
        window_size: side of a window of queries in pixels.
        overlap: pixels by which the window of keys reaches beyond it on every side.
        border: what keys beyond the map are; see `visionattn.kernels.overlapping_window_attention`.
        qkv_bias: whether the projection to queries, keys and values has a bias.

    Raises:
        ValueError: `num_heads` does not divide `dim`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int,
        overlap: int,
        border: Border = "zero",
        qkv_bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        reach = window_size - 1 + overlap * (2 if border == "clamp" else 1)
        super().__init__(dim, num_heads, reach, qkv_bias, device, dtype)
        self.window_size = window_size
        self.overlap = overlap
        self.border: Border = border

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, H, W, C]`."""
        q, k, v = self.project(x)
        out = overlapping_window_attention(
            q, k, v, self.window_size, self.overlap, border=self.border, bias=self.rpb
        )
        return self.proj(out.flatten(3))
