"""LightNet's attention and positions: one scan for the whole map.

Paper: "You Only Scan Once: Efficient Multi-dimension Sequential Modeling with LightNet",
https://arxiv.org/abs/2405.21022. Its image networks were never published; operator and positions are those of
the first author's libraries.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionattn.kernels import additive_decay_attention, linear_recurrence
from visionattn.kernels.precision import at_least_float32
from visionattn.layers.linear import Linear

# The authors' epsilon lies under a sum over channels, not under their mean.
_EPS = 1e-5


class SummedRMSNorm(nn.Module):
    """`sqrt(C) x / sqrt(Σ x² + eps) * weight`: RMSNorm with its epsilon beside the sum."""

    def __init__(self, dim: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """`[..., C]` to `[..., C]`."""
        wide = at_least_float32(x)
        scale = (wide.square().sum(-1, keepdim=True) + _EPS).rsqrt() * x.shape[-1] ** 0.5
        return (wide * scale).to(x.dtype) * self.weight


class LightNetAttention2d(nn.Module):
    """Linear attention with keys that share a softmax over the pixels, gated and normalised.

    Example:
        >>> layer = LightNetAttention2d(64, 2)
        >>> layer(torch.randn(1, 14, 14, 64)).shape
        torch.Size([1, 14, 14, 64])

    Args:
        dim: channels, a multiple of num_heads.
        num_heads: attention heads.
        causal: whether a pixel sees those before it, row by row, and itself alone.

    Raises:
        ValueError: a dim that num_heads does not divide.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        causal: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim={dim} must be a multiple of num_heads={num_heads}")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads, self.causal = num_heads, causal
        self.q_proj, self.k_proj, self.v_proj = (Linear(dim, dim, bias=False, **dd) for _ in range(3))
        width = dim // num_heads
        self.output_gate = nn.Sequential(
            Linear(dim, width, bias=False, **dd), Linear(width, dim, bias=False, **dd)
        )
        self.norm = SummedRMSNorm(dim, **dd)
        self.o_proj = Linear(dim, dim, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, H, W, C]`."""
        q, k, v = (
            t.unflatten(-1, (self.num_heads, -1))
            for t in (F.silu(self.q_proj(x)), self.k_proj(x), self.v_proj(x))
        )
        out = additive_decay_attention(q, k, v, causal=self.causal).flatten(3)
        return self.o_proj(self.norm(out * self.output_gate(x).sigmoid()))


class MapPositions(nn.Module):
    """MD-TPE: positions as decaying sums of what stands before a pixel, in its column and in its row.

    Per axis and head, `s_n = λ s_{n-1} + x_n` and `y_n = (q·k) s_n`, then a norm and a projection; the axes
    are added and take the place of the input. As initialised the output is zero.

    Args:
        dim: channels, a multiple of num_heads.
        num_heads: heads, each with a decay λ of its own.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim={dim} must be a multiple of num_heads={num_heads}")
        self.tpes = nn.ModuleList(_AxisPositions(dim, num_heads, device, dtype) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, H, W, C]`."""
        along_row, along_column = self.tpes
        return along_row(x, "row") + along_column(x, "column")


class _AxisPositions(nn.Module):
    def __init__(
        self, dim: int, num_heads: int, device: torch.device | str | None, dtype: torch.dtype | None
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.q, self.k = (nn.Parameter(torch.ones(dim, **dd)) for _ in range(2))
        self.log_decay = nn.Parameter(torch.zeros(num_heads, **dd))
        self.norm = SummedRMSNorm(dim, **dd)
        self.o_proj = Linear(dim, dim, bias=False, **dd)
        nn.init.zeros_(self.o_proj.weight)

    def forward(self, x: Tensor, order: Any) -> Tensor:
        heads = len(self.log_decay)
        parts, decay = x.unflatten(-1, (heads, -1)), F.logsigmoid(at_least_float32(self.log_decay))
        strength = (self.q * self.k).unflatten(0, (heads, -1)).sum(-1)
        out = linear_recurrence(parts, decay, order=order, restart=True) * strength[:, None]
        return self.o_proj(self.norm(out.flatten(3)))
