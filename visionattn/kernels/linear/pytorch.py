"""Linear and agent attention in fast plain PyTorch: no product ever forms pairs of pixels."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dense import attend
from ..precision import without_autocast


def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, normalize: str, scale: float, eps: float, floor: float
) -> Tensor:
    """One reduction over keys and values, one pass over queries; arguments as in `op.py`."""
    height, width = q.shape[1:3]
    # Sums over ten thousand pixels lose what half precision cannot hold: the state is float32, autocast or
    # not.
    precision = torch.float32 if v.dtype in (torch.float16, torch.bfloat16) else v.dtype
    with without_autocast(q):
        q, k, v_ = (_by_head(x).to(precision) for x in (q, k, v))
        out = _FORMS[normalize](q, k, v_, scale, eps, floor).to(v.dtype)
    return _to_map(out, height, width)


def _unnormalized(q: Tensor, k: Tensor, v: Tensor, scale: float, eps: float, floor: float) -> Tensor:
    return q @ (k.transpose(-2, -1) @ v * scale)


def _sum_normalized(q: Tensor, k: Tensor, v: Tensor, scale: float, eps: float, floor: float) -> Tensor:
    denominator = q @ (k.sum(-2, keepdim=True) * scale).transpose(-2, -1) + eps
    return _unnormalized(q, k, v, scale, eps, floor) / denominator.clamp(min=floor)


def _injective(q: Tensor, k: Tensor, v: Tensor, scale: float, eps: float, floor: float) -> Tensor:
    # The published form subtracts two large numbers at the end; the covariance of keys and values is the same
    # number without the cancellation.
    centred = k - k.mean(-2, keepdim=True)
    covariance = centred.transpose(-2, -1) @ v * (scale / k.shape[-2])
    return v.mean(-2, keepdim=True) + q @ covariance


_FORMS = {"none": _unnormalized, "sum": _sum_normalized, "injective": _injective}


def agent_attention(
    q: Tensor,
    agents: Tensor,
    k: Tensor,
    v: Tensor,
    bias_in: Tensor | None,
    bias_out: Tensor | None,
    scale: float,
) -> Tensor:
    """Two softmax attentions with few keys or few queries; arguments as in `op.py`."""
    height, width = q.shape[1:3]
    q, agents, k, v = (_by_head(x) for x in (q, agents, k, v))
    gathered = attend(agents, k, v, bias_in, scale)
    return _to_map(_attend_to_few(q, agents, gathered, bias_out, scale), height, width)


def _attend_to_few(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """`attend` to few keys, with logits `[B, heads, keys, queries]`.

    A softmax over rows of nine keys leaves vector units idle; over columns, every query is a lane. Up to 25
    times faster on a CPU than attention in the usual order.
    """
    logits = (k * scale) @ q.transpose(-2, -1)
    if bias is not None:
        logits = logits + bias.transpose(-2, -1)
    precision = torch.float32 if logits.dtype in (torch.float16, torch.bfloat16) else None
    return logits.softmax(-2, dtype=precision).to(v.dtype).transpose(-2, -1) @ v


def _by_head(x: Tensor) -> Tensor:
    """`[B, heads, H * W, d]` of `[B, H, W, heads, d]`."""
    return x.flatten(1, 2).transpose(1, 2)


def _to_map(x: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `_by_head`."""
    return x.transpose(1, 2).unflatten(1, (height, width))
