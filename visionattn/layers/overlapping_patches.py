"""Attention inside patches that overlap by two pixels, and what it shares with attention by content.

Paper: "CATANet: Efficient Content-Aware Token Aggregation for Lightweight Image Super-Resolution",
https://arxiv.org/abs/2503.06896.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionattn.kernels import window_attention
from visionattn.layers.as_made import is_as_made
from visionattn.layers.bands import convolved, folded, pixelwise
from visionattn.layers.linear import Linear
from visionattn.layers.maps import on_nhwc


class HeadProjection(nn.Module):
    """Bias-free queries, keys and values in heads of one width.

    The heads of queries and keys are 9 channels wide in the official network, those of values 10: fused
    attention takes neither. Zero channels, which change no product, fill all of them up to a multiple of 8.

    Args:
        dim: channels of the input and of the values.
        qk_dim: channels of queries and keys.
        num_heads: attention heads.
        with_queries: whether there are queries, or keys and values only.

    Attributes:
        scale: softmax scale, that of the heads before they are filled up.
    """

    def __init__(
        self,
        dim: int,
        qk_dim: int,
        num_heads: int,
        with_queries: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.widths = [qk_dim // num_heads] * (1 + with_queries) + [dim // num_heads]
        self.scale = (qk_dim // num_heads) ** -0.5
        self.q = Linear(dim, qk_dim, bias=False, **dd) if with_queries else None
        self.k = Linear(dim, qk_dim, bias=False, **dd)
        self.v = Linear(dim, dim, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., C]` to `[..., 3 (2 without queries), heads, d]`."""
        layers = (self.k, self.v) if self.q is None else (self.q, self.k, self.v)
        heads, head_dim = self.num_heads, -(-max(self.widths) // 8) * 8
        if not is_as_made(Linear, *layers):
            parts = [layer(x).unflatten(-1, (heads, -1)) for layer in layers]
            return torch.stack([F.pad(t, (0, head_dim - t.shape[-1])) for t in parts], -3)
        weights = [layer.weight.unflatten(0, (heads, -1)) for layer in layers]
        filled = torch.stack([F.pad(w, (0, 0, 0, head_dim - w.shape[1])) for w in weights])
        return F.linear(x, filled.flatten(0, 2)).unflatten(-1, filled.shape[:3])

    def join(self, out: Tensor) -> Tensor:
        """`[..., C]` of attention output `[..., heads, d]`, without the zero channels."""
        return out[..., : self.widths[-1]].flatten(-2)


class ConvMlp(nn.Module):
    """An MLP with a depthwise 5x5 convolution as a residual branch of its hidden layer, pre-normalised."""

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm = nn.LayerNorm(dim, **dd)
        self.fc1 = Linear(dim, hidden_dim, **dd)
        self.dwconv = nn.Conv2d(hidden_dim, hidden_dim, 5, padding=2, groups=hidden_dim, **dd)
        self.fc2 = Linear(hidden_dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, H, W, C]`."""
        x = F.gelu(self.fc1(self.norm(x)))
        return self.fc2(x + F.gelu(on_nhwc(self.dwconv, x)))


class LocalAttention(nn.Module):
    """Attention inside patches that overlap by two pixels, then an MLP, on `[B, H, W, C]` (LRSA).

    Where patches overlap, the official code halves the sum once for every patch that begins there: rows in
    three patches count for three quarters of their mean.

    Args:
        dim: channels.
        qk_dim: channels of queries and keys.
        num_heads: attention heads.
        hidden_dim: hidden width of the MLP.
        patch_size: side of a patch in pixels.
    """

    def __init__(
        self,
        dim: int,
        qk_dim: int,
        num_heads: int,
        hidden_dim: int,
        patch_size: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.patch_size = patch_size
        self.norm = nn.LayerNorm(dim, **dd)
        self.qkv = HeadProjection(dim, qk_dim, num_heads, **dd)
        self.proj = Linear(dim, dim, bias=False, **dd)
        self.mlp = ConvMlp(dim, hidden_dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, H, W, C]`, sides of at least `patch_size`."""
        (rows, row_times, row_factor), (columns, column_times, column_factor) = (
            _overlapping_patches(side, self.patch_size, x.device) for side in x.shape[1:3]
        )

        def attend(total: Tensor, rows: Tensor, core: slice) -> Tensor:
            """Adds the rows of patches that begin at `rows[:, 0]` to the map."""
            rows = rows.flatten()
            patches = self.norm(x.index_select(1, rows)).index_select(2, columns)
            q, k, v = self.qkv(patches).unbind(3)
            out = self.qkv.join(window_attention(q, k, v, self.patch_size, scale=self.qkv.scale))
            out = out.new_zeros(*out.shape[:2], *x.shape[2:]).index_add(2, columns, out)
            return total.index_add_(1, rows, out.to(total.dtype))

        out = folded(attend, torch.zeros_like(x), rows.view(-1, self.patch_size), dim=0)
        factor = (row_factor[:, None] * column_factor).to(x.dtype)[None, ..., None]
        times = (row_times[:, None] * column_times)[None, ..., None] * factor

        def add(x: Tensor, out: Tensor, factor: Tensor, times: Tensor) -> Tensor:
            return x * times + self.proj(out * factor)

        x = pixelwise(add, x, out, factor, times, into=out)
        return convolved(lambda x: x + self.mlp(x), x, halo=2)


def _overlapping_patches(side: int, patch: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Patches along one axis, each overlapping the one before by two pixels, the last moved back to the end.

    Returns:
        The pixels of all patches, one patch after the other; in how many patches each pixel is `[side]`; and
        the factor `[side]` for the sum over patches.
    """
    begin = torch.arange(0, side - 2, patch - 2, device=device)
    start, pixel = begin.clamp(max=side - patch), torch.arange(side, device=device)
    index = (start[:, None] + torch.arange(patch, device=device)).flatten()
    behind_start = pixel >= start[:, None]
    times = (behind_start & (pixel < start[:, None] + patch)).sum(0)
    halvings = (behind_start & (pixel < begin[:, None] + 2))[1:].sum(0)
    return index, times, 0.5**halvings
