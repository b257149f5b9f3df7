"""Attention with a learned state in place of a long learned prefix.

Paper: "Towards Infinite-Long Prefix in Transformer" (NTK-attention), https://arxiv.org/abs/2406.14036.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionattn.kernels import dense_attention
from visionattn.kernels.precision import at_least_float32, without_autocast
from visionattn.layers.linear import Linear


class PrefixStateAttention2d(nn.Module):
    """Softmax attention to the map and, in the same normalisation, linear attention to a learned state.

    A prefix of ever more learned tokens acts like a state of fixed size: with features φ of a query,

        out = (Σ_j exp(s q·k_j) v_j + φ(q) Z) / (Σ_j exp(s q·k_j) + φ(q)·z),

    φ being elu + 1 of the queries times the root of s (so that φ(q)·φ(k) has the scale of s q·k). Z
    and z are the only new parameters and begin as zero: the layer starts as plain attention, and a network is
    tuned by training them alone. z counts as zero where it is negative, which keeps denominators positive.

    Example:
        >>> layer = PrefixStateAttention2d(64, 2)
        >>> layer(torch.randn(1, 14, 14, 64)).shape
        torch.Size([1, 14, 14, 64])

    Args:
        dim: channels, a multiple of num_heads.
        num_heads: attention heads, each with a state `[head_dim, head_dim]` and a sum `[head_dim]`.
        qkv_bias: whether the projection to queries, keys and values has a bias.
        scale: multiplies q·k; `head_dim ** -0.5` by default.

    Raises:
        ValueError: a dim that num_heads does not divide.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool = True,
        scale: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim={dim} must be a multiple of num_heads={num_heads}")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        head_dim = dim // num_heads
        self.num_heads = num_heads
        self.scale = head_dim**-0.5 if scale is None else scale
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.state = nn.Parameter(torch.zeros(num_heads, head_dim, head_dim, **dd))
        self.state_sum = nn.Parameter(torch.zeros(num_heads, head_dim, **dd))
        self.proj = Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, H, W, C]`."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(3)
        out, lse = dense_attention(q, k, v, scale=self.scale, return_lse=True)
        with without_autocast(x):
            features = F.elu(at_least_float32(q) * abs(self.scale) ** 0.5) + 1
            state, state_sum = (at_least_float32(p) for p in (self.state, self.state_sum))
            # Not clamp: at zero, where training begins, that has no gradient.
            state_sum = torch.where(state_sum < 0, 0, state_sum)
            # Both sums over a common factor that neither overflows nor vanishes.
            largest = lse.detach().clamp(min=0)
            softmax_total = (lse - largest).exp()
            shrink = (-largest).exp()
            given = torch.einsum("byxhc,hcd->byxhd", features, state) * shrink[..., None]
            total = softmax_total + (features * state_sum).sum(-1) * shrink
            out = ((softmax_total[..., None] * out + given) / total[..., None]).to(v.dtype)
        return self.proj(out.flatten(3))
