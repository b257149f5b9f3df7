"""ReLU linear attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from visionattn.kernels import linear_attention
from visionattn.layers.linear import Linear


class LinearAttention2d(nn.Module):
    """Linear attention of rectified queries and keys (https://arxiv.org/abs/2501.16182).

    `[B, H, W, dim]` to `[B, H, W, dim]` in O(H W (dim² + dim² / num_heads)) operations. A learned temperature
    per head multiplies the result; the denominator is kept above `floor`, which is no guard against zero: on
    maps of a few hundred pixels it is active and damps the output.

    Args:
        dim: channels.
        num_heads: attention heads.
        floor: smallest denominator.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        floor: float = 100.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.floor = floor
        self.temperature = nn.Parameter(torch.full((num_heads, 1, 1), (dim // num_heads) ** -0.5, **dd))
        self.qkv = Linear(dim, 3 * dim, **dd)
        self.proj = Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, H, W, C]`."""
        qk, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).split([2, 1], 3)
        # In inference nothing else needs what is overwritten here.
        keeps = torch.is_grad_enabled()
        q, k = (qk.relu() if keeps else qk.relu_()).unbind(3)
        out = linear_attention(q, k, v.squeeze(3), scale=1.0, eps=0.0, floor=self.floor)
        out = out * self.temperature[..., 0] if keeps else out.mul_(self.temperature[..., 0])
        return self.proj(out.flatten(3))
