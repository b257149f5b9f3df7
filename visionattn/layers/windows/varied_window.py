"""Attention in windows whose keys come from places that the network chooses."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from visionattn.kernels import dense_attention
from visionattn.layers.linear import Linear
from visionattn.layers.maps import is_needed, on_nhwc

Unit = Literal["padded", "whole", "swapped"]
# So many numbers of moved keys and values are made at a time: on a CPU caches hold them.
_ON_CPU, _ELSEWHERE = 1 << 18, 1 << 24


class VariedSizeWindowAttention2d(nn.Module):
    """Windows of queries over windows of keys that move and stretch (VSA, https://arxiv.org/abs/2204.08446).

    The mean of a window tells for every head by how much its keys lie elsewhere and farther apart; there,
    keys and values are read bilinearly. `[B, H, W, dim]` to `[B, H, W, out_dim]` in O(H W (dim² +
    window_size² dim)) operations; the keys of a few heads are moved at a time.

    Maps that windows do not divide are filled up with zeros; keys and values are zero there and beyond.

    Args:
        dim: channels.
        num_heads: attention heads.
        window_size: side of a window in pixels.
        out_dim: channels out; `dim` by default.
        unit: a movement of 1 is half the map's side, divided by the number of windows along it: of those of
            the filled-up map (`"padded"`), of the whole windows in the map (`"whole"`), or of the whole
            windows along the other axis (`"swapped"`, as the official dense backbones of ViTAE have it).
        centred: whether maps are filled up on both sides, not on the right and bottom alone.

    Raises:
        ValueError: `num_heads` does not divide the channels.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int = 7,
        out_dim: int | None = None,
        unit: Unit = "padded",
        centred: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        out_dim = out_dim or dim
        if out_dim % num_heads:
            raise ValueError(f"channels must be a multiple of num_heads, got {out_dim} and {num_heads}")
        self.num_heads = num_heads
        self.window_size = window_size
        self.unit: Unit = unit
        self.centred = centred
        # Of the channels in, also where the heads are narrower.
        self.scale = (dim // num_heads) ** -0.5
        self.transform = nn.Sequential(
            nn.AvgPool2d(window_size), nn.LeakyReLU(), nn.Conv2d(dim, 4 * num_heads, 1, **dd)
        )
        self.qkv = Linear(dim, 3 * out_dim, **dd)
        self.proj = Linear(out_dim, out_dim, **dd)
        side = 2 * window_size - 1
        table = nn.Parameter(torch.empty(num_heads, side, side, **dd))
        self.relative_position_bias_table = trunc_normal_(table, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, dim]` to `[B, H, W, out_dim]`."""
        height, width = x.shape[1:3]
        if self.unit != "padded" and min(height, width) < self.window_size:
            raise ValueError(
                f"a map of {height}x{width} has no whole window of {self.window_size} pixels, by which "
                "movements are measured"
            )
        padding = self._padding(height, width)
        y_of_keys, x_of_keys = self.places(x)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(3)
        q = F.pad(q, (0, 0, 0, 0, *padding)) if is_needed(*padding) else q
        bias = self.bias()
        recorded = torch.is_grad_enabled() and any(t.requires_grad for t in (q, bias, y_of_keys))
        recompute = recorded and not (torch.compiler.is_compiling() or torch.jit.is_tracing())
        step = self._heads_at_a_time(q)
        attended = []
        for first in range(0, self.num_heads, step):
            heads = slice(first, first + step)
            parts = [*(t[:, :, :, heads] for t in (q, k, v, y_of_keys, x_of_keys)), bias[heads]]
            if recompute:
                # The moved keys of all heads would wait for the backward pass.
                part = checkpoint(self._attend, *parts, use_reentrant=False, preserve_rng_state=False)
                assert isinstance(part, Tensor)
            else:
                part = self._attend(*parts)
            attended.append(part)
        out = attended[0] if len(attended) == 1 else torch.cat(attended, 3)
        # Windows [B * rows * columns, n, n, heads, d] to a map.
        out = out.unflatten(0, y_of_keys.shape[:3]).transpose(2, 3).flatten(5).flatten(3, 4).flatten(1, 2)
        left, _, top, _ = padding
        return self.proj(out[:, top : top + height, left : left + width])

    def bias(self) -> Tensor:
        """The bias `[heads, window_size², window_size²]` of every query and key of a window."""
        window = self.window_size
        line = torch.arange(window, device=self.relative_position_bias_table.device)
        apart = line - line[:, None] + window - 1
        pairs = apart[:, None, :, None] * (2 * window - 1) + apart[:, None]
        table = self.relative_position_bias_table.flatten(1)
        return table.index_select(1, pairs.flatten()).unflatten(1, (window**2, window**2))

    def places(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Where the keys of every window and head lie: along y and x, in pixels of the map.

        Args:
            x: the map `[B, H, W, dim]`.

        Returns:
            Rows and columns `[B, rows of windows, columns of windows, heads, window_size]`, at least float32.
        """
        size, window = x.shape[1:3], self.window_size
        padding = self._padding(*size)
        filled = F.pad(x, (0, 0, *padding)) if is_needed(*padding) else x
        told = on_nhwc(self.transform, filled)
        # Places that are rounded to half precision would be pixels off.
        told = told.to(torch.promote_types(told.dtype, torch.float32)).unflatten(-1, (-1, 4))
        step = torch.arange(window, device=x.device, dtype=told.dtype) - (window - 1) / 2
        found = []
        for axis, first in ((1, padding[2]), (0, padding[0])):  # x stands before y in what is told
            side, count = filled.shape[2 - axis], told.shape[2 - axis]
            of = size[axis if self.unit == "swapped" else 1 - axis] // window
            moved = told[..., axis] * ((side - 1) / 2 / (count if self.unit == "padded" else of))
            centre = (
                torch.arange(count, device=x.device, dtype=told.dtype) * window + (window - 1) / 2 - first
            )
            centre = centre[:, None, None] if axis else centre[:, None]
            found.append((centre + moved)[..., None] + (1 + told[..., axis + 2, None]) * step)
        return found[0], found[1]

    def _padding(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Pixels to fill up on the left, right, top and bottom."""
        bottom, right = (-side % self.window_size for side in (height, width))
        top, left = (bottom // 2, right // 2) if self.centred else (0, 0)
        return left, right - left, top, bottom - top

    def _heads_at_a_time(self, q: Tensor) -> int:
        numbers = 2 * q.shape[0] * q.shape[1] * q.shape[2] * q.shape[4]
        if isinstance(numbers, torch.SymInt):
            return max(self.num_heads // 4, 1)
        return max((_ON_CPU if q.device.type == "cpu" else _ELSEWHERE) // max(numbers, 1), 1)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, y: Tensor, x: Tensor, bias: Tensor) -> Tensor:
        """Attention of some heads; `[B * windows, n, n, heads, d]`."""
        window = (self.window_size, self.window_size)
        k, v = sample(torch.cat([k, v], -1), y, x).unflatten(2, window).chunk(2, -1)
        # Every window of a head is one piece of memory, which products of matrices take as it is.
        q = q.unflatten(2, (-1, window[1])).unflatten(1, (-1, window[0])).permute(0, 1, 3, 5, 2, 4, 6)
        q, k, v = (t.permute(0, 2, 3, 1, 4) for t in (q.flatten(0, 2), k, v))
        return dense_attention(q, k, v, bias=bias, scale=self.scale)


def sample(maps: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Read maps bilinearly at grids of points, one grid per window and head; zero beyond the maps.

    Args:
        maps: `[B, H, W, heads, C]`.
        y: rows of the points in pixels, `[B, rows, columns, heads, n]` for `rows * columns` windows.
        x: their columns, the same shape.

    Returns:
        `[B * rows * columns, heads, n * n, C]`.
    """
    is_traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    recorded = torch.is_grad_enabled() and any(t.requires_grad for t in (maps, y, x))
    exact = maps.dtype in (torch.float32, torch.float64) and y.dtype == maps.dtype
    if maps.device.type == "cpu" and exact and not (is_traced or recorded) and maps.numel():
        return _sum_rows(maps, y, x)
    return _grid_sample(maps, y, x)


def _sum_rows(maps: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """`sample` as sums of four weighted rows of a table, for which there is a kernel: seven times as fast."""
    batch, height, width, heads, channels = maps.shape
    count, table = y.shape[-1], maps.reshape(-1, channels)
    first = torch.arange(batch)[:, None] * (height * width * heads) + torch.arange(heads)
    lines, line_weights = _neighbours(y, height)
    lines = lines * (width * heads) + first.view(batch, 1, 1, heads, 1, 1)
    pixels, pixel_weights = _neighbours(x, width)
    # Every pair of a line and a pixel: products with zeros and ones are faster than additions of axes of
    # seven and two numbers. Nothing rounds those of float64, neither autocast nor the precision of products.
    own = torch.eye(2 * count, dtype=torch.float64)
    of_lines = own.view(-1, count, 1, 2, 1).expand(-1, -1, count, -1, 2).reshape(2 * count, -1)
    of_pixels = own.view(-1, 1, count, 1, 2).expand(-1, count, -1, 2, -1).reshape(2 * count, -1)
    lines, line_weights, pixels, pixel_weights = (
        t.flatten(4).flatten(0, 3).double() for t in (lines, line_weights, pixels * heads, pixel_weights)
    )
    rows = torch.cat([lines, pixels], -1) @ torch.cat([of_lines, of_pixels])
    weights = ((line_weights @ of_lines) * (pixel_weights @ of_pixels)).to(y.dtype)
    out = F.embedding_bag(rows.int().view(-1, 4), table, per_sample_weights=weights.view(-1, 4), mode="sum")
    return out.view(-1, heads, count * count, channels)


def _neighbours(place: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """The two pixels around places on a line, `[..., 2]`, and their weights; 0 beyond the line."""
    place = place.clamp(-1, length)
    before = place.floor()
    after_weight = place - before
    index = torch.stack([before, before + 1], -1).long()
    weights = torch.stack([1 - after_weight, after_weight], -1)
    weights = weights * ((index >= 0) & (index < length))
    return index.clamp(0, length - 1), weights


def _grid_sample(maps: Tensor, y: Tensor, x: Tensor) -> Tensor:
    batch, height, width, heads = maps.shape[:4]
    count = y.shape[-1]
    lines, pixels = (
        ((2 * place + 1) / side - 1).flatten(1, 2).transpose(1, 2)
        for place, side in ((y, height), (x, width))
    )
    grid = torch.stack(torch.broadcast_tensors(pixels[..., None, :], lines[..., None]), -1)
    planes = maps.permute(0, 3, 4, 1, 2).flatten(0, 1).to(grid.dtype)
    out = F.grid_sample(planes, grid.flatten(3, 4).flatten(0, 1), align_corners=False).to(maps.dtype)
    out = out.unflatten(0, (batch, heads)).permute(0, 3, 1, 4, 2)
    return out.reshape(-1, heads, count * count, maps.shape[4])
