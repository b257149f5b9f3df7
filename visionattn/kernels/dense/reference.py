"""Softmax attention as a formula: the specification of the other implementations."""

from __future__ import annotations

import torch
from torch import Tensor


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Output and log-sum-exp (None unless asked for); arguments as in `op.py`."""
    size = q.shape[1:3]
    q, k, v = (x.flatten(1, 2) for x in (q, k, v))
    logits = torch.einsum("bqhd,bkhd->bhqk", q * scale, k)
    logits = logits if bias is None else logits + bias
    out = torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1).to(v.dtype), v).unflatten(1, size)
    if not return_lse:
        return out, None
    wide = torch.promote_types(q.dtype, torch.float32)
    return out, logits.to(wide).logsumexp(-1).transpose(1, 2).unflatten(1, size)
