"""Attention with fewer heads of queries, keys and values than the channels have room for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from visionattn.kernels import dense_attention
from visionattn.layers.linear import Linear


class SparseQueryAttention2d(nn.Module):
    """Dense attention of `query_heads` heads of `dim / num_heads` channels (https://arxiv.org/abs/2510.01817).

    Its cost falls with the number of query heads: half of them, half the products. Queries share the heads of
    keys and values in groups.

    Example:
        >>> layer = SparseQueryAttention2d(128, 8, query_heads=4, key_heads=2)
        >>> layer(torch.randn(1, 14, 14, 128)).shape
        torch.Size([1, 14, 14, 128])

    Args:
        dim: channels, a multiple of num_heads.
        num_heads: how many heads plain attention would have; only the width of a head follows from it.
        query_heads: heads of the queries; half of num_heads by default.
        key_heads: heads of keys and values, which divide those of the queries; a quarter by default.
        bias: whether the projections to queries, keys and values have a bias.

    Raises:
        ValueError: numbers of heads that do not fit.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        query_heads: int | None = None,
        key_heads: int | None = None,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        query_heads = max(num_heads // 2, 1) if query_heads is None else query_heads
        key_heads = max(num_heads // 4, 1) if key_heads is None else key_heads
        if dim % num_heads or key_heads < 1 or query_heads < 1 or query_heads % key_heads:
            raise ValueError(
                f"dim={dim} must be a multiple of num_heads={num_heads}, and query_heads={query_heads} of "
                f"key_heads={key_heads}"
            )
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.head_dim = dim // num_heads
        self.q_proj = Linear(dim, query_heads * self.head_dim, bias=bias, **dd)
        self.k_proj = Linear(dim, key_heads * self.head_dim, bias=bias, **dd)
        self.v_proj = Linear(dim, key_heads * self.head_dim, bias=bias, **dd)
        self.proj = Linear(query_heads * self.head_dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, H, W, C]`."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in projections)
        return self.proj(dense_attention(q, k, v).flatten(3))
