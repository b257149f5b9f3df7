"""Routed attention as a formula: dense attention over all pixels, with the lists written out as a mask.

The specification of the other implementations: any dtype, any device, differentiable any number of times,
memory quadratic in the number of pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from visionattn.kernels.routed.call import Call
from visionattn.kernels.routed.lists import listed_regions


def routed_attention(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor | None]:
    """Output `[B, H, W, heads, d]` and log-sum-exp `[B, H, W, heads]`; arguments as in `op.py`.

    A promise about the lists lets other implementations save work; a mask needs none.
    """
    size = q.shape[1:3]
    query_region_of, _ = places(size, call.query_region, q.device)
    region_of, place = places(k.shape[1:3], call.region, q.device)
    regions = -(-k.shape[1] // call.region[0]) * -(-k.shape[2] // call.region[1])
    visible = listed_regions(call.indices, regions)[:, :, query_region_of][..., region_of]
    if call.counts is not None:
        visible = visible & (place < call.counts[..., region_of])[:, :, None]

    logits = torch.einsum("bqhd,bkhd->bhqk", q.flatten(1, 2) * call.scale, k.flatten(1, 2))
    if call.bias is not None:
        logits = logits + bias_of_pairs(call.bias, *size)
    logits = logits.masked_fill(~visible, float("-inf"))
    empty = ~visible.any(-1, keepdim=True)
    logits = logits.masked_fill(empty, 0)
    lse = logits.logsumexp(-1, keepdim=True)
    weights = (logits - lse).exp().masked_fill(empty, 0)
    out = torch.einsum("bhqk,bkhd->bqhd", weights, v.flatten(1, 2)).unflatten(1, size)
    lse = lse.masked_fill(empty, float("-inf")).squeeze(-1).transpose(1, 2)
    return out, lse.unflatten(1, size) if call.return_lse else None


def places(
    size: Sequence[int], region: Sequence[int], device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """The region of each pixel of a map of `size` (height, width), and its place in it, `[H * W]`; regions,
    places and pixels in row-major order."""
    height, width = size
    y, x = torch.arange(height, device=device)[:, None], torch.arange(width, device=device)
    region_of = y // region[0] * -(-width // region[1]) + x // region[1]
    return region_of.flatten(), (y % region[0] * region[1] + x % region[1]).flatten()


def bias_of_pairs(bias: Tensor, height: int, width: int) -> Tensor:
    """The bias of every pair of pixels `[heads, H * W, H * W]` from a relative table or a dense bias."""
    if bias.shape[1:] != (2 * height - 1, 2 * width - 1):
        return bias
    y, x = (torch.arange(n, device=bias.device) for n in (height, width))
    dy, dx = (n[None, :] - n[:, None] + len(n) - 1 for n in (y, x))
    return bias[:, dy[:, None, :, None], dx[None, :, None, :]].flatten(3, 4).flatten(1, 2)
