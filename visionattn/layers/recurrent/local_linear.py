"""Local linear attention as a layer (https://arxiv.org/abs/2510.01450)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from visionattn.kernels import local_linear_attention, parallax_attention
from visionattn.kernels.precision import at_least_float32
from visionattn.layers.linear import Linear


class LocalLinearAttention2d(nn.Module):
    """Softmax attention that fits a line to the values where it would take their mean.

    Example:
        >>> layer = LocalLinearAttention2d(64, 2)
        >>> layer(torch.randn(1, 14, 14, 64)).shape
        torch.Size([1, 14, 14, 64])

    Args:
        dim: channels, a multiple of num_heads.
        num_heads: attention heads.
        ridge: the ridge of the regression, above 0, of every head at the start; it is learned.
        projected: whether slopes are a projection of the pixel in place of a regression's, as in parallax
            attention; nothing is solved then, and `ridge` has no meaning.
        causal: whether a pixel sees those before it, row by row, and itself alone.
        qkv_bias: whether the projections have a bias.

    Raises:
        ValueError: a dim that num_heads does not divide, or a ridge not above 0.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        ridge: float = 1.0,
        projected: bool = False,
        causal: bool = False,
        qkv_bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim={dim} must be a multiple of num_heads={num_heads}")
        if not ridge > 0:
            raise ValueError(f"ridge must be above 0, got {ridge}")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads, self.causal = num_heads, causal
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.slope = Linear(dim, dim, bias=qkv_bias, **dd) if projected else None
        self.log_ridge = None
        if not projected:
            self.log_ridge = nn.Parameter(torch.full((num_heads,), float(ridge), **dd).log())
        self.proj = Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, H, W, C]`."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(3)
        if self.slope is not None:
            r = self.slope(x).unflatten(-1, (self.num_heads, -1))
            out = parallax_attention(q, r, k, v, causal=self.causal)
        else:
            assert self.log_ridge is not None
            ridge = at_least_float32(self.log_ridge).exp()
            out = local_linear_attention(q, k, v, ridge=ridge, causal=self.causal)
        return self.proj(out.flatten(3))
