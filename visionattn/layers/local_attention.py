"""Local multi-head attention as layers on `[B, H, W, C]` maps: projections and a learned relative bias."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from visionattn.kernels import neighborhood_attention, overlapping_window_attention, window_attention
from visionattn.kernels.dense.plain.attention import attend
from visionattn.kernels.local.pattern import Border
from visionattn.layers.linear import Linear
from visionattn.layers.maps import fill_up


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


def halo_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    relative: tuple[Tensor, Tensor],
    block_size: int,
    halo: int,
    scale: float,
    scale_relative: bool = False,
) -> Tensor:
    """Attention of blocks to themselves and a halo around them (https://arxiv.org/abs/2103.12731).

    The halo beyond the map is zero keys and values, which take part in the softmax with their relative
    logits. These are products with the queries, which our kernels cannot take, and stand as a mask in
    PyTorch's fused attention.

    Args:
        q: queries `[B, H / s, W / s, heads, d]`, of every s-th row and column.
        k: keys `[B, H, W, heads, d]`, in whole blocks.
        v: values `[B, H, W, heads, dv]`.
        relative: embeddings `[2 * (block_size + 2 * halo) - 1, d]` of the distances of rows and of columns.
        block_size: side of a block of keys without its halo.
        halo: pixels around it.
        scale: multiplies q·k.
        scale_relative: whether it multiplies the relative logits too.

    Returns:
        `[B, H / s, W / s, heads, dv]`.

    Raises:
        ValueError: a map that is not made of whole blocks.
    """
    height, width = k.shape[1:3]
    if height % block_size or width % block_size:
        raise ValueError(
            f"halo attention needs whole {block_size}x{block_size} blocks, got a {height}x{width} map"
        )
    rows, columns = height // block_size, width // block_size
    side, window = q.shape[1] // rows, block_size + 2 * halo
    blocks = q.unflatten(2, (columns, side)).unflatten(1, (rows, side))
    blocks = blocks.permute(0, 1, 3, 5, 2, 4, 6).flatten(0, 2)  # [B * blocks, heads, y, x, d]
    keys, values = (_windows(t, block_size, halo) for t in (k, v))
    first = window - side
    # Entry [i, :, j] is the embedding of row or column j of the window, seen from i of the block.
    by_row, by_column = (rel.unfold(0, window, 1)[first:].flip(0).to(q.dtype) for rel in relative)
    of_rows = torch.einsum("nhyxd,ydk->nhyxk", blocks, by_row)
    of_columns = torch.einsum("nhyxd,xdk->nhyxk", blocks, by_column)
    mask = (of_rows[..., :, None] + of_columns[..., None, :]).flatten(4).flatten(2, 3)
    mask = mask * scale if scale_relative else mask
    # Fused attention wants values as wide as the keys.
    wide = max(k.shape[-1], v.shape[-1])
    padded = [F.pad(t, (0, wide - t.shape[-1])) for t in (blocks.flatten(2, 3), keys, values)]
    out = attend(padded[0], padded[1], padded[2], mask, scale)[..., : v.shape[-1]]
    out = out.unflatten(2, (side, side)).unflatten(0, (-1, rows, columns))
    return out.permute(0, 1, 4, 2, 5, 3, 6).flatten(3, 4).flatten(1, 2)


def _windows(x: Tensor, block_size: int, halo: int) -> Tensor:
    """Blocks with their halo, `[B * blocks, heads, keys, d]` of `[B, H, W, heads, d]`."""
    window = block_size + 2 * halo
    x = F.pad(x, (0, 0, 0, 0, *(halo,) * 4)).unfold(1, window, block_size).unfold(2, window, block_size)
    return x.permute(0, 1, 2, 3, 5, 6, 4).flatten(4, 5).flatten(0, 2)


class HaloAttention2d(nn.Module):
    """Blocks of queries over larger blocks of keys, with relative logits that depend on the query.

    Maps that blocks do not divide are filled up with zeros on the right and bottom, which are keys like the
    halo beyond the map. There is no output projection.

    Args:
        dim: channels.
        num_heads: attention heads.
        block_size: side of a block.
        halo: pixels by which a block of keys reaches beyond it on every side.
        value_dim: channels out; `dim` by default.
        stride: 2 for queries of every second row and column: the map shrinks, the keys stay.

    Raises:
        ValueError: `num_heads` does not divide the channels, or `stride` the side of a block.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        block_size: int = 8,
        halo: int = 3,
        value_dim: int | None = None,
        stride: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        value_dim = value_dim or dim
        if dim % num_heads or value_dim % num_heads:
            raise ValueError(
                f"dim and value_dim must be multiples of num_heads, got {dim}, {value_dim} and {num_heads}"
            )
        if block_size % stride:
            raise ValueError(f"block_size must be a multiple of stride, got {block_size} and {stride}")
        self.num_heads, self.block_size, self.halo, self.stride = num_heads, block_size, halo, stride
        self.dims = dim, value_dim
        self.scale = (dim // num_heads) ** -0.5
        self.q = Linear(dim, dim, bias=False, **dd)
        self.kv = Linear(dim, dim + value_dim, bias=False, **dd)
        shape = 2 * (block_size + 2 * halo) - 1, dim // num_heads
        self.height_rel = nn.Parameter(torch.empty(shape, **dd))
        self.width_rel = nn.Parameter(torch.empty(shape, **dd))
        for weight, std in ((self.q.weight, dim**-0.5), (self.kv.weight, dim**-0.5)):
            trunc_normal_(weight, std=std)
        for table in (self.height_rel, self.width_rel):
            trunc_normal_(table, std=self.scale)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, dim]` to `[B, H / stride, W / stride, value_dim]`, rounded up."""
        height, width = x.shape[1:3]
        x = fill_up(x, (self.block_size, self.block_size))
        q = self.q(x[:, :: self.stride, :: self.stride]).unflatten(-1, (self.num_heads, -1))
        # A head's keys and values lie together.
        kv = self.kv(x).unflatten(-1, (self.num_heads, -1))
        k, v = kv.split([n // self.num_heads for n in self.dims], -1)
        relative = self.height_rel, self.width_rel
        out = halo_attention(q, k, v, relative, self.block_size, self.halo, self.scale).flatten(3)
        return out[:, : -(-height // self.stride), : -(-width // self.stride)]
