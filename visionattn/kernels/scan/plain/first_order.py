"""Recurrences `h_t = a_t h_{t-1} + b_t` along the first axis: the core of every scan on a CPU."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from visionattn.kernels.node import Rule
from visionattn.kernels.precision import at_least_float32, without_autocast
from visionattn.kernels.scan.orders import to_map, to_sequences

# Up to so many numbers a step costs more for its call than for its work (measured).
SMALL_STATE = 2000


def step_in_place(a: Tensor, h: Tensor, before: Tensor | None = None) -> None:
    """Turn `h`, which holds b, into the states; `before` is the state before the first."""
    if before is not None:
        h[0].addcmul_(a[0], before)
    rows, factors = h.unbind(0), a.unbind(0)
    for t in range(1, len(rows)):
        rows[t].addcmul_(factors[t], rows[t - 1])


def step_back_in_place(a: Tensor, g: Tensor) -> None:
    """Turn `g`, which holds the gradients of the states where they are read, into those of the states."""
    rows, factors = g.unbind(0), a.unbind(0)
    for t in range(len(rows) - 2, -1, -1):
        rows[t].addcmul_(factors[t + 1], rows[t + 1])


def step_on_two_levels(a: Tensor, h: Tensor) -> None:
    """As `step_in_place`, in 2 √L steps of √L positions at once; destroys `a`.

    Positions are cut into chunks that advance together from zero states; then every chunk gets the state of
    the one before, times the products of its factors so far.
    """
    length = len(h)
    chunk = math.isqrt(length)
    whole = length // chunk * chunk
    steps, factors = h[:whole].unflatten(0, (-1, chunk)), a[:whole].unflatten(0, (-1, chunk))
    for t in range(1, chunk):
        steps[:, t].addcmul_(factors[:, t], steps[:, t - 1])
        factors[:, t].mul_(factors[:, t - 1])
    for i in range(1, len(steps)):
        steps[i, -1].addcmul_(factors[i, -1], steps[i - 1, -1])
    steps[1:, :-1].addcmul_(factors[1:, :-1], steps[:-1, -1:])
    if whole < length:
        step_in_place(a[whole:], h[whole:], h[whole - 1])


def by_doubling(a: Tensor, b: Tensor) -> Tensor:
    """The states in 3 log2(L) operations on whole tensors: what exported programs compute."""
    reach, length = 1, a.shape[0]
    while reach < length:
        b = torch.cat([b[:reach], torch.addcmul(b[reach:], a[reach:], b[:-reach])])
        a = torch.cat([a[:reach], a[reach:] * a[:-reach]])
        reach *= 2
    return b


def advance(a: Tensor, h: Tensor) -> None:
    """Turn `h`, which holds b, into the states, from a zero state and by the faster way; destroys `a`."""
    if len(h) > 16 and h[0].numel() < SMALL_STATE:
        step_on_two_levels(a, h)
    else:
        step_in_place(a, h)


def _forward(x: Tensor, log_decay: Tensor, orders: tuple[str, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
    with without_autocast(x):
        y = _sequence(x, orders).clone(memory_format=torch.contiguous_format)
        advance(_factors(x, log_decay, orders), y)
        return to_map(y.transpose(0, 1).to(x.dtype), orders, *x.shape[1:3]), (y,)


def _gradients(
    grad_out: Tensor,
    kept: tuple[Tensor],
    wanted: tuple[bool, ...],
    x: Tensor,
    log_decay: Tensor,
    orders: tuple[str, ...],
) -> list[Tensor | None]:
    """`γ_t = g_t + e^{w_{t+1}} γ_{t+1}`; x gets γ and w gets `γ_t e^{w_t} y_{t-1}`."""
    (y,) = kept
    with without_autocast(x):
        factors = _factors(x, log_decay, orders)
        grad = _sequence(grad_out, orders).flip(0)
        # Backwards every factor belongs to the step after its own; the first one meets a zero state.
        advance(torch.cat([factors[:1], factors.flip(0)[:-1]]), grad)
        grad = grad.flip(0)
        slope = None
        if wanted[1]:
            slope = torch.zeros_like(grad)
            torch.mul(grad[1:], y[:-1], out=slope[1:]).mul_(factors[1:])
            slope = to_map(slope.transpose(0, 1), orders, *x.shape[1:3]).sum_to_size(log_decay.shape)
            slope = slope.to(log_decay.dtype)
        grad_x = to_map(grad.transpose(0, 1).to(x.dtype), orders, *x.shape[1:3])
    return [grad_x, slope]


def _formula(x: Tensor, log_decay: Tensor, orders: tuple[str, ...]) -> Tensor:
    with without_autocast(x):
        y = by_doubling(_factors(x, log_decay, orders), _sequence(x, orders))
        return to_map(y.transpose(0, 1).to(x.dtype), orders, *x.shape[1:3])


def _sequence(x: Tensor, orders: tuple[str, ...]) -> Tensor:
    """`[L, B, heads, d]` in the precision of the states."""
    return to_sequences(at_least_float32(x), orders).transpose(0, 1)


def _factors(x: Tensor, log_decay: Tensor, orders: tuple[str, ...]) -> Tensor:
    """`e^w`, as large as the sequence."""
    w = at_least_float32(log_decay).expand(*x.shape[:3], -1, -1)
    return _sequence(w, orders).exp().expand(-1, -1, -1, x.shape[-1]).contiguous()


linear_recurrence = Rule(_forward, _gradients, _formula, 2)
