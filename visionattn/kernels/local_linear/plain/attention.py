"""Local linear attention in plain PyTorch: some queries at a time, one small linear system for each.

With p the softmax weights, k̄ = Σ p k and k̃ = k - k̄, the systems are `(Σ p k̃ k̃ᵀ + λ I) x = q - k̄`, and the
output is `Σ p (1 + x · k̃) v`. Narrow heads solve them exactly, from sums of products of channels; wide ones
by conjugate gradients, which never form the matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from visionattn.kernels.local_linear import reference
from visionattn.kernels.local_linear.reference import by_head, to_map
from visionattn.kernels.node import Rule
from visionattn.kernels.precision import without_autocast

# Up to this head dim, systems are solved exactly (measured).
EXACT = 32
# Numbers of weights, and of matrices of systems, that are formed at once.
_AT_ONCE = 2**20


class _Band(NamedTuple):
    """Some queries: their weights `[B, heads, queries, keys]`, the keys' mean under them, and the keys."""

    rows: slice
    q: Tensor
    k: Tensor
    p: Tensor
    mean: Tensor

    def slopes(self, x: Tensor) -> Tensor:
        """`x · k̃` for every query and key."""
        return x @ self.k.mT - (x * self.mean).sum(-1, keepdim=True)

    def spread(self, x: Tensor) -> Tensor:
        """`Σ p k̃ (k̃ · x)`: the matrices of the systems, without the ridge, times x."""
        return self.moment(self.slopes(x))

    def moment(self, weights: Tensor) -> Tensor:
        """`Σ p w k̃` for weights of every query and key."""
        weights = self.p * weights
        return weights @ self.k - weights.sum(-1, keepdim=True) * self.mean


def _bands(q: Tensor, k: Tensor, scale: float, causal: bool) -> Iterator[_Band]:
    """The queries, as many at a time as `_AT_ONCE` allows."""
    per_query = q.shape[0] * q.shape[1] * max(k.shape[2], q.shape[3] ** 2)
    count = max(1, _AT_ONCE // max(1, per_query))
    for begin in range(0, q.shape[2], count):
        rows = slice(begin, min(begin + count, q.shape[2]))
        keys = k[:, :, : rows.stop] if causal else k
        own = q[:, :, rows]
        logits = own @ keys.mT * scale
        if causal:
            places = torch.arange(rows.stop, device=q.device)
            logits.masked_fill_(places > places[rows, None], float("-inf"))
        p = logits.softmax(-1)
        yield _Band(rows, own, keys, p, p @ keys)


def _solver(band: _Band, ridge: Tensor, iterations: int) -> Callable[[Tensor], Tensor]:
    """What turns the right sides `[B, heads, queries, d]` of the systems into their solutions."""
    dim = band.k.shape[-1]
    if dim <= EXACT:
        k, mean = band.k, band.mean
        squares = (k.unsqueeze(-1) * k.unsqueeze(-2)).flatten(-2)
        matrices = (band.p @ squares).unflatten(-1, (dim, dim)) - mean.unsqueeze(-1) * mean.unsqueeze(-2)
        matrices.diagonal(dim1=-2, dim2=-1).add_(ridge)
        factors, pivots = torch.linalg.lu_factor(matrices)
        return lambda right: torch.linalg.lu_solve(factors, pivots, right.unsqueeze(-1)).squeeze(-1)
    return lambda right: _conjugate_gradients(lambda x: band.spread(x) + ridge * x, right, iterations)


def _conjugate_gradients(matrix: Callable[[Tensor], Tensor], right: Tensor, iterations: int) -> Tensor:
    x, left = torch.zeros_like(right), right
    direction, size = left, (left * left).sum(-1, keepdim=True)
    tiny = torch.finfo(right.dtype).tiny
    for _ in range(iterations):
        image = matrix(direction)
        step = size / (direction * image).sum(-1, keepdim=True).clamp(min=tiny)
        x = x + step * direction
        left = left - step * image
        before, size = size, (left * left).sum(-1, keepdim=True)
        direction = left + size / before.clamp(min=tiny) * direction
    return x


def _forward(
    q: Tensor, k: Tensor, v: Tensor, ridge: Tensor, scale: float, causal: bool, iterations: int
) -> tuple[Tensor, tuple[Tensor, ...]]:
    with without_autocast(q):
        qs, ks, vs, ridges = (by_head(x) for x in (q, k, v, ridge))
        out, kept = torch.empty_like(vs), torch.empty_like(qs)
        for band in _bands(qs, ks, scale, causal):
            solve = _solver(band, _rows(ridges, band), iterations)
            x = kept[:, :, band.rows] = solve(band.q - band.mean)
            out[:, :, band.rows] = (band.p * (1 + band.slopes(x))) @ vs[:, :, : band.k.shape[2]]
        return to_map(out, q), (kept,)


def _gradients(
    grad_out: Tensor,
    kept: tuple[Tensor],
    wanted: Sequence[bool],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ridge: Tensor,
    scale: float,
    causal: bool,
    iterations: int,
) -> list[Tensor | None]:
    """With γ = g · v, m = Σ p γ, c = 1 + x · k̃, u the solution for Σ p γ k̃ and κ = -u - m x:

    `dp = γ c - (x·k̃)(u·k̃) + κ·k`, `dS = p (dp - Σ p dp)`, `dq = s dS k + u`, `dv = Σ p c g`, `dλ = -u·x`,
    `dk = s dSᵀ q + Σ p ((γ - u·k̃) x - (x·k̃) u + κ)`.
    """
    with without_autocast(q):
        qs, ks, vs, ridges, gs = (by_head(x) for x in (q, k, v, ridge, grad_out))
        of_q, of_k, of_v = (torch.zeros_like(x) for x in (qs, ks, vs))
        of_ridge = qs.new_empty(*qs.shape[:3], 1)
        for band in _bands(qs, ks, scale, causal):
            count, p, x, g = band.k.shape[2], band.p, kept[0][:, :, band.rows], gs[:, :, band.rows]
            gains = g @ vs[:, :, :count].mT
            mean_gain = (p * gains).sum(-1, keepdim=True)
            u = _solver(band, _rows(ridges, band), iterations)(band.moment(gains))
            x_slopes, u_slopes = band.slopes(x), band.slopes(u)
            shift = -u - mean_gain * x
            of_p = gains * (1 + x_slopes) - x_slopes * u_slopes + shift @ band.k.mT
            of_logits = p * (of_p - (p * of_p).sum(-1, keepdim=True)) * scale
            of_q[:, :, band.rows] = of_logits @ band.k + u
            of_v[:, :, :count] += (p * (1 + x_slopes)).mT @ g
            of_k[:, :, :count] += of_logits.mT @ band.q + (p * (gains - u_slopes)).mT @ x
            of_k[:, :, :count] += p.mT @ shift - (p * x_slopes).mT @ u
            of_ridge[:, :, band.rows] = -(u * x).sum(-1, keepdim=True)
        maps = [to_map(x, like) for x, like in ((of_q, q), (of_k, k), (of_v, v))]
        summed = to_map(of_ridge, q).sum_to_size(ridge.shape).to(ridge.dtype)
        return [x if want else None for x, want in zip([*maps, summed], wanted)]


def _parallax_forward(
    q: Tensor, r: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool
) -> tuple[Tensor, tuple[Tensor, ...]]:
    with without_autocast(q):
        qs, rs, ks, vs = (by_head(x) for x in (q, r, k, v))
        out = torch.empty_like(vs)
        for band in _bands(qs, ks, scale, causal):
            weights = band.p * (1 - band.slopes(rs[:, :, band.rows]))
            out[:, :, band.rows] = weights @ vs[:, :, : band.k.shape[2]]
        return to_map(out, q), ()


def _parallax_gradients(
    grad_out: Tensor,
    kept: tuple[Tensor, ...],
    wanted: Sequence[bool],
    q: Tensor,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    causal: bool,
) -> list[Tensor | None]:
    """With γ = g · v, m = Σ p γ and c = 1 - r · k̃: `dr = -Σ p γ k̃`, `dv = Σ p c g`, `dp = γ c + m r·k`,
    `dS = p (dp - Σ p dp)`, `dq = s dS k`, `dk = s dSᵀ q - Σ p (γ - m) r`."""
    with without_autocast(q):
        qs, rs, ks, vs, gs = (by_head(x) for x in (q, r, k, v, grad_out))
        of_q, of_r, of_k, of_v = (torch.zeros_like(x) for x in (qs, rs, ks, vs))
        for band in _bands(qs, ks, scale, causal):
            count, p, g = band.k.shape[2], band.p, gs[:, :, band.rows]
            own_r = rs[:, :, band.rows]
            gains = g @ vs[:, :, :count].mT
            mean_gain = (p * gains).sum(-1, keepdim=True)
            factors = 1 - band.slopes(own_r)
            of_p = gains * factors + mean_gain * (own_r @ band.k.mT)
            of_logits = p * (of_p - (p * of_p).sum(-1, keepdim=True)) * scale
            of_q[:, :, band.rows] = of_logits @ band.k
            of_r[:, :, band.rows] = -band.moment(gains)
            of_v[:, :, :count] += (p * factors).mT @ g
            of_k[:, :, :count] += of_logits.mT @ band.q - (p * (gains - mean_gain)).mT @ own_r
        maps = [to_map(x, like) for x, like in ((of_q, q), (of_r, r), (of_k, k), (of_v, v))]
        return [x if want else None for x, want in zip(maps, wanted)]


def _rows(ridges: Tensor, band: _Band) -> Tensor:
    """The ridges of a band's queries; one for all pixels has a single row."""
    return ridges if ridges.shape[2] == 1 else ridges[:, :, band.rows]


local_linear_attention = Rule(_forward, _gradients, reference.local_linear_attention, 4)
parallax_attention = Rule(_parallax_forward, _parallax_gradients, reference.parallax_attention, 4)
