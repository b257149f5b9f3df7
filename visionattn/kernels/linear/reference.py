"""Linear attention as a formula: every weight of every pair of pixels written out.

The specification of the other implementations: any dtype, any device, differentiable any number of times,
memory quadratic in the number of pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor


def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, normalize: str, scale: float, eps: float, floor: float
) -> Tensor:
    """Weights `scale q·k`, normalised, times values; arguments as in `op.py`."""
    height, width = q.shape[1:3]
    q, k, v = (x.flatten(1, 2) for x in (q, k, v))
    weights = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    if normalize == "sum":
        weights = weights / (weights.sum(-1, keepdim=True) + eps).clamp(min=floor)
    elif normalize == "injective":
        weights = (1 + weights - weights.mean(-1, keepdim=True)) / weights.shape[-1]
    return torch.einsum("bhqk,bkhd->bqhd", weights, v).unflatten(1, (height, width))
