"""Recurrent attention as its formulas say, pixel after pixel: the specification of the other implementations.

Any dtype, any device, differentiable any number of times; arguments as in `op.py`, with one order per head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from visionattn.kernels.precision import at_least_float32, without_autocast
from visionattn.kernels.scan.orders import to_map, to_sequences

Step = Callable[..., "tuple[Tensor, Tensor]"]


def selective_scan(
    x: Tensor,
    delta: Tensor,
    B: Tensor,
    C: Tensor,
    z: Tensor | None,
    A: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    orders: Sequence[str],
    delta_softplus: bool,
) -> Tensor:
    """`h = exp(Δ A) h + Δ x Bᵀ`, `y = h C + D x`, `y SiLU(z)`."""
    with without_autocast(x):
        wide = at_least_float32(x)
        A = A.to(wide.dtype)
        step_size = at_least_float32(delta)
        step_size = step_size if delta_bias is None else step_size + delta_bias
        step_size = F.softplus(step_size) if delta_softplus else step_size

        def step(h: Tensor, x: Tensor, dt: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
            h = (dt[..., None] * A).exp() * h + (dt * x)[..., None] * b[..., None, :]
            return h, (h * c[..., None, :]).sum(-1)

        y = _walk(step, A.shape[1:], (wide, step_size, B, C), orders)
        y = y if D is None else y + D * wide
        return (y if z is None else y * F.silu(at_least_float32(z))).to(x.dtype)


def decay_attention(
    v: Tensor, q: Tensor, k: Tensor, log_decay: Tensor, orders: Sequence[str], scale: float
) -> Tensor:
    """`S = e^w S + k vᵀ`, `o = scale Sᵀ q`."""

    def step(s: Tensor, q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        s = w.exp()[..., None] * s + k[..., None] * v[..., None, :]
        return s, scale * (q[..., None] * s).sum(-2)

    with without_autocast(v):
        decay = log_decay.expand(*q.shape[:3], -1, -1)
        return _walk(step, (q.shape[-1], v.shape[-1]), (q, k, v, decay), orders).to(v.dtype)


def linear_recurrence(x: Tensor, log_decay: Tensor, orders: Sequence[str]) -> Tensor:
    """`y = e^w y + x`."""

    def step(y: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        y = w.exp() * y + x
        return y, y

    with without_autocast(x):
        decay = log_decay.expand(*x.shape[:3], -1, -1)
        return _walk(step, x.shape[-1:], (x, decay), orders).to(x.dtype)


def additive_decay_attention(v: Tensor, q: Tensor, k: Tensor, orders: Sequence[str], scale: float) -> Tensor:
    """`o_t = scale Σ_{i<=t} (q_t · e^{k_i} / Σ_{j<=t} e^{k_j}) v_i`: means of values under keys so far."""

    def step(state: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        # The last column is the log of the sum of e^k so far; the mean of the values stands before it.
        mean, before = state[..., :-1], state[..., -1]
        total = torch.logaddexp(before, k)
        mean = (before - total).exp()[..., None] * mean + (k - total).exp()[..., None] * v[..., None, :]
        return torch.cat([mean, total[..., None]], -1), scale * (q[..., None] * mean).sum(-2)

    empty = torch.zeros(v.shape[-1] + 1).index_fill(0, torch.tensor([v.shape[-1]]), float("-inf"))
    with without_autocast(v):
        return _walk(step, (q.shape[-1], v.shape[-1] + 1), (q, k, v), orders, empty).to(v.dtype)


def delta_attention(
    v: Tensor,
    q: Tensor,
    k: Tensor,
    beta: Tensor,
    log_decay: Tensor,
    orders: Sequence[str],
    scale: float,
) -> Tensor:
    """`S = e^w S`, `S = S + β k (v - Sᵀ k)ᵀ`, `o = scale Sᵀ q`."""

    def step(s: Tensor, q: Tensor, k: Tensor, v: Tensor, b: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        s = w.exp()[..., None] * s
        wrong = v - (k[..., None] * s).sum(-2)
        s = s + (b * k)[..., None] * wrong[..., None, :]
        return s, scale * (q[..., None] * s).sum(-2)

    with without_autocast(v):
        decay = log_decay.expand(*q.shape[:3], -1, -1)
        tensors = (q, k, v, beta, decay)
        return _walk(step, (q.shape[-1], v.shape[-1]), tensors, orders).to(v.dtype)


def _walk(
    step: Step,
    shape: Sequence[int],
    maps: Sequence[Tensor],
    orders: Sequence[str],
    empty: Tensor | None = None,
) -> Tensor:
    """The outputs of `step(state, *pixels)` on the way of every head, `[B, H, W, heads, e]`.

    States `[B, heads, *shape]` begin as zeros, or as `empty` if there is one.
    """
    batch, height, width, heads = maps[0].shape[:4]
    sequences = [to_sequences(at_least_float32(x), orders).unbind(1) for x in maps]
    state = sequences[0][0].new_zeros(batch, heads, *shape)
    state = state if empty is None else state + empty.to(state)
    outs = []
    for pixels in zip(*sequences):
        state, out = step(state, *pixels)
        outs.append(out)
    return to_map(torch.stack(outs, 1), orders, height, width)
