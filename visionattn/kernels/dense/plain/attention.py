"""Softmax attention of explicit query sets over explicit key sets: what the PyTorch paths reduce to."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """`softmax(scale q kᵀ + bias) v`.

    Inference uses the fused attention of PyTorch. Training writes the products out: a mask that needs a
    gradient would select PyTorch's slow path anyway, windows of 49 keys are faster so, and derivatives of any
    order exist.

    Args:
        q: queries `[N, heads, nq, d]`.
        k: keys `[N, heads, nk, d]`.
        v: values `[N, heads, nk, d]`.
        bias: added to the logits, broadcastable to `[N, heads, nq, nk]`.
        scale: multiplies q·k only.

    Returns:
        `[N, heads, nq, d]` in the dtype of `v`.
    """
    inputs = (q, k, v) if bias is None else (q, k, v, bias)
    if not (torch.is_grad_enabled() and any(x.requires_grad for x in inputs)):
        # PyTorch falls back to its slow path for a mask that requires a gradient, even under no_grad, and
        # for a mask of three axes.
        mask = None if bias is None else bias.detach().to(q.dtype)[(None,) * (4 - bias.dim())]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    logits = _logits(q, k, bias, scale)
    # Half-precision weights of many keys lose their small terms unless the softmax runs in float32.
    precision = torch.float32 if logits.dtype in (torch.float16, torch.bfloat16) else None
    return logits.softmax(-1, dtype=precision).to(v.dtype) @ v


def attend_lse(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """`attend` and the natural log of its softmax denominator `[N, heads, nq]`, at least float32."""
    logits = _logits(q, k, bias, scale)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    lse = logits.logsumexp(-1)
    return (logits - lse[..., None]).exp().to(v.dtype) @ v, lse


def _logits(q: Tensor, k: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    logits = (q * scale) @ k.transpose(-2, -1)
    return logits if bias is None else logits + bias
