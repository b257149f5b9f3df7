"""Local linear attention as its formulas say, every pair of pixels written out: the specification.

Any dtype, any device, differentiable any number of times; arguments as in `op.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from visionattn.kernels.precision import at_least_float32, without_autocast


def local_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, ridge: Tensor, scale: float, causal: bool, iterations: int
) -> Tensor:
    """The value at q of a ridge regression of v on k under softmax weights; solved exactly."""
    with without_autocast(q):
        qs, ks, vs, ridges = (by_head(x) for x in (q, k, v, ridge))
        p, mean = _weights(qs, ks, scale, causal)
        away = ks.unsqueeze(-3) - mean.unsqueeze(-2)
        covariance = torch.einsum("...ij,...ijc,...ijd->...icd", p, away, away)
        system = covariance + ridges.unsqueeze(-1) * torch.eye(q.shape[-1], dtype=qs.dtype, device=q.device)
        x = torch.linalg.solve(system, (qs - mean).unsqueeze(-1)).squeeze(-1)
        return to_map((p * (1 + torch.einsum("...ic,...ijc->...ij", x, away))) @ vs, q)


def parallax_attention(q: Tensor, r: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
    """Softmax weights times `1 - r · (k - mean k)`."""
    with without_autocast(q):
        qs, rs, ks, vs = (by_head(x) for x in (q, r, k, v))
        p, mean = _weights(qs, ks, scale, causal)
        away = ks.unsqueeze(-3) - mean.unsqueeze(-2)
        return to_map((p * (1 - torch.einsum("...ic,...ijc->...ij", rs, away))) @ vs, q)


def _weights(q: Tensor, k: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """The softmax weights `[..., queries, keys]`, and the keys' mean under them."""
    logits = q @ k.mT * scale
    if causal:
        unseen = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        logits = logits.masked_fill(unseen, float("-inf"))
    p = logits.softmax(-1)
    return p, p @ k


def by_head(x: Tensor) -> Tensor:
    """`[B, heads, L, c]` of a map, in float32 at least."""
    return at_least_float32(x).flatten(1, 2).transpose(1, 2)


def to_map(x: Tensor, like: Tensor) -> Tensor:
    """The inverse of `by_head`, contiguous and in the dtype of the map `like`."""
    return x.transpose(1, 2).unflatten(1, like.shape[1:3]).to(like.dtype).contiguous()
