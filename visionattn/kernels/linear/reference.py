"""Linear and agent attention as formulas: every weight of every pair of pixels written out.

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


def agent_attention(
    q: Tensor,
    agents: Tensor,
    k: Tensor,
    v: Tensor,
    bias_in: Tensor | None,
    bias_out: Tensor | None,
    scale: float,
) -> Tensor:
    """Agents attend to all pixels, pixels to the agents; arguments as in `op.py`."""
    height, width = q.shape[1:3]
    q, agents, k, v = (x.flatten(1, 2) for x in (q, agents, k, v))
    gathered = _softmax_attention(agents, k, v, bias_in, scale)
    return _softmax_attention(q, agents, gathered, bias_out, scale).unflatten(1, (height, width))


def _softmax_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    logits = torch.einsum("bqhd,bkhd->bhqk", q * scale, k)
    weights = (logits if bias is None else logits + bias).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)
