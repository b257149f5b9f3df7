"""Attention in flat and upright rectangles side by side, with a position bias from a small MLP.

Rectangle windows: "Cross Aggregation Transformer for Image Restoration", https://arxiv.org/abs/2211.13654.
The bias: "CrossFormer: A Versatile Vision Transformer Hinging on Cross-scale Attention",
https://arxiv.org/abs/2108.00154.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionattn.kernels import window_attention
from visionattn.layers.bands import windowed
from visionattn.layers.linear import Linear
from visionattn.layers.maps import is_needed, on_nhwc


class DynamicPositionBias(nn.Module):
    """A relative bias table that an MLP computes from the offsets, query minus key, in pixels.

    An MLP of width 1 gives every offset the same number, because its LayerNorms see one element and return
    their bias. Softmax ignores it: the module then returns None, and its parameters, on which no output
    depends, do not ask for gradients. They exist because official checkpoints hold them.

    Args:
        width: hidden channels.
        num_heads: attention heads.
        window_size: (height, width) of a window in pixels.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        window_size: tuple[int, int],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.width = width
        self.window_size = window_size

        def layer(out: int) -> nn.Sequential:
            return nn.Sequential(nn.LayerNorm(width, **dd), nn.ReLU(), Linear(width, out, **dd))

        self.pos_proj = Linear(2, width, **dd)
        self.pos1 = layer(width)
        self.pos2 = layer(width)
        self.pos3 = layer(num_heads)
        if width < 2:
            self.requires_grad_(False)

    def forward(self) -> Tensor | None:
        """The table `[heads, 2 * height - 1, 2 * width - 1]`, ordered by key minus query, or None."""
        if self.width < 2:
            return None
        weight: Any = self.pos1[0].weight  # nobody quantises a norm
        # Descending, because the MLP was trained on query minus key.
        y, x = (
            torch.arange(side - 1, -side, -1, device=weight.device, dtype=weight.dtype)
            for side in self.window_size
        )
        offsets = torch.stack(torch.meshgrid(y, x, indexing="ij"), -1)
        return self.pos3(self.pos2(self.pos1(self.pos_proj(offsets)))).permute(2, 0, 1)


class RectangleWindowAttention(nn.Module):
    """Half of the heads in windows of `split_size`, the other half in windows of the transposed size.

    A depthwise convolution of the values is added before the output projection. Maps are filled up with zeros
    on the right and bottom *after* the projection to a multiple of the longer side, so that zero keys take
    part in the softmax with their bias.

    Args:
        dim: channels.
        num_heads: attention heads, an even number.
        split_size: (height, width) of the first half's windows in pixels.
        shifted: whether windows begin at half their size.
        mask_shift: whether shifted windows end at the border of the filled-up map; if not, it is a torus.
        qkv_bias: whether the projection to queries, keys and values has a bias.

    Raises:
        ValueError: an odd number of heads, or channels that the heads do not divide.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        split_size: tuple[int, int],
        shifted: bool = False,
        mask_shift: bool = True,
        qkv_bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        if num_heads % 2 or dim % num_heads:
            raise ValueError(
                f"num_heads must be even and divide the channels, got {num_heads} heads and {dim} channels"
            )
        self.num_heads = num_heads
        self.windows = (split_size, (split_size[1], split_size[0]))
        self.shifted = shifted
        self.mask_shift = mask_shift
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.lepe = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)
        self.proj = Linear(dim, dim, **dd)
        # The width follows the official code: a quarter of a quarter of each half's channels.
        self.position_bias = nn.ModuleList(
            DynamicPositionBias(dim // 2 // 4 // 4, num_heads // 2, window, **dd) for window in self.windows
        )

    def forward(self, x: Tensor, top: int | None = None, height: int | None = None) -> Tensor:
        """`[B, H, W, C]` to `[B, H, W, C]`.

        Args:
            x: a map, or a band of its rows.
            top: the row of the map that a band begins with; it may lie outside a torus.
            height: rows of the map, if `x` is a band.
        """
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        place = None if top is None or height is None else (top, height)
        out = [
            self._attend(half, window, bias(), place)
            for half, window, bias in zip(qkv.chunk(2, 4), self.windows, self.position_bias)
        ]
        values = qkv[..., 2, :, :].flatten(3)
        if place is None:
            local = on_nhwc(self.lepe, values)
        else:
            # A torus is one to windows only: the convolution sees the borders of the map inside a band.
            borders = [row - place[0] for row in (0, place[1]) if 0 < row - place[0] < x.shape[1]]
            local = torch.cat([on_nhwc(self.lepe, part) for part in values.tensor_split(borders, 1)], 1)
        return self.proj(torch.cat(out, 3).flatten(3) + local)

    def add_to(self, x: Tensor, norm: nn.Module, drop_path: nn.Module) -> Tensor:
        """`x + drop_path(self(norm(x)))` of a map `[B, H, W, C]`, by bands."""
        torus, height = self.shifted and not self.mask_shift, x.shape[1]
        lower, higher = sorted(rows for rows, _ in self.windows)

        def attend(rows: Tensor, top: int | None) -> Tensor:
            whole = top is None or (not torus and rows.shape[1] == height)
            return rows + drop_path(self(norm(rows)) if whole else self(norm(rows), top, height))

        # Bands end where windows of the higher kind do. There the convolution reaches one row farther, and
        # lower windows, if they are shifted, by half of their rows.
        offset, halo = (higher // 2, max(lower // 2, 1)) if self.shifted else (0, 1)
        return windowed(attend, x, window=higher, shift=offset, halo=halo, torus=torus)

    def _attend(
        self, qkv: Tensor, window: tuple[int, int], bias: Tensor | None, place: tuple[int, int] | None
    ) -> Tensor:
        """`[B, H, W, 3, heads, d]` to `[B, H, W, heads, d]`; `place` as in `forward`."""
        rows, width = qkv.shape[1:3]
        top, height = place or (0, rows)
        shift = (window[0] // 2, window[1] // 2) if self.shifted else (0, 0)
        # Not `-side % longer`: where sizes vary, the expression of the sum stays short this way.
        longer = max(window)
        fill = [-(-side // longer) * longer - side for side in (height, width)]
        if self.mask_shift and not isinstance(fill[0], torch.SymInt):
            # Windows that would hold nothing but zeros are left out; a torus needs its full size.
            rest = [(s - side) % w for side, w, s in zip((height, width), window, shift)]
            fill = [min(pair) for pair in zip(fill, rest)]
        if top + rows != height:
            fill[0] = 0
        if is_needed(*fill):
            qkv = F.pad(qkv, (0, 0, 0, 0, 0, 0, 0, fill[1], 0, fill[0]))
        if place is None:
            q, k, v = qkv.unbind(3)
            out = window_attention(q, k, v, window, shift=shift, mask_shift=self.mask_shift, bias=bias)
            return out[:, :rows, :width]
        # The rows of a torus are those of the band; its columns have to be moved.
        roll = 0 if self.mask_shift else shift[1]
        q, k, v = qkv.roll(-roll, 2).unbind(3) if roll else qkv.unbind(3)
        local = ((shift[0] - top) % window[0], shift[1] - roll)
        out = window_attention(q, k, v, window, shift=local, bias=bias)
        return (out.roll(roll, 2) if roll else out)[:, :rows, :width]
