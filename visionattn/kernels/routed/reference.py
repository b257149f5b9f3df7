"""Routed attention as a formula: dense attention over all pixels, with the lists written out as a mask.

The specification of the other implementations: any dtype, any device, differentiable any number of times,
memory quadratic in the number of pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def routed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    bias: Tensor | None,
    region: Sequence[int],
    scale: float,
    return_lse: bool,
    distinct: bool,
) -> tuple[Tensor, Tensor | None]:
    """Output `[B, H, W, heads, d]` and log-sum-exp `[B, H, W, heads]`; arguments as in `op.py`.

    `distinct` lets other implementations save work; writing a list as a mask needs no promise about it.
    """
    height, width = q.shape[1:3]
    region_of = region_numbers(height, width, region, q.device)
    regions = indices.shape[2]
    # Column `regions` collects the padding and is cut off.
    listed = indices.new_zeros((*indices.shape[:3], regions + 1), dtype=torch.bool)
    listed.scatter_(3, torch.where(indices < 0, regions, indices).long(), True)
    visible = listed[:, :, region_of][..., region_of]

    logits = torch.einsum("bqhd,bkhd->bhqk", q.flatten(1, 2) * scale, k.flatten(1, 2))
    if bias is not None:
        logits = logits + bias_of_pairs(bias, height, width)
    logits = logits.masked_fill(~visible, float("-inf"))
    empty = ~visible.any(-1, keepdim=True)
    logits = logits.masked_fill(empty, 0)
    lse = logits.logsumexp(-1, keepdim=True)
    weights = (logits - lse).exp().masked_fill(empty, 0)
    out = torch.einsum("bhqk,bkhd->bqhd", weights, v.flatten(1, 2))
    lse = lse.masked_fill(empty, float("-inf")).squeeze(-1).transpose(1, 2)
    return out.unflatten(1, (height, width)), lse.unflatten(1, (height, width)) if return_lse else None


def region_numbers(
    height: int, width: int, region: Sequence[int], device: torch.device | None = None
) -> Tensor:
    """The region of each pixel `[H * W]`; regions and pixels in row-major order."""
    y = torch.arange(height, device=device) // region[0]
    x = torch.arange(width, device=device) // region[1]
    return (y[:, None] * -(-width // region[1]) + x).flatten()


def bias_of_pairs(bias: Tensor, height: int, width: int) -> Tensor:
    """The bias of every pair of pixels `[heads, H * W, H * W]` from a relative table or a dense bias."""
    if bias.shape[1:] != (2 * height - 1, 2 * width - 1):
        return bias
    y, x = (torch.arange(n, device=bias.device) for n in (height, width))
    dy, dx = (n[None, :] - n[:, None] + len(n) - 1 for n in (y, x))
    return bias[:, dy[:, None, :, None], dx[None, :, None, :]].flatten(3, 4).flatten(1, 2)
