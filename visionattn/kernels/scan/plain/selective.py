"""The selective scan in plain PyTorch: chunks of a few positions are expanded, advanced and read at a time.

States `[B, heads, N, d]` of a chunk live in two buffers that are used again; only those at the beginning of
chunks are kept for the backward pass, which goes through the chunks from the last to the first and makes the
rest anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from visionattn.kernels.node import Rule
from visionattn.kernels.precision import at_least_float32, without_autocast
from visionattn.kernels.scan.orders import pixels, runs, to_map, to_sequences
from visionattn.kernels.scan.plain.first_order import (
    SMALL_STATE,
    by_doubling,
    step_back_in_place,
    step_in_place,
    step_on_two_levels,
)

# Positions that are expanded to states at once: 8 to 32 are equally fast. Small states, whose steps cost more
# for the call than for the work, take more, and in the forward pass four times as many on two levels.
_CHUNK, _SMALL_CHUNK, _SMALL_BLOCK = 16, 64, 256


class _Walk:
    """The positions of maps in the order of every head, a few at a time."""

    def __init__(self, x: Tensor, orders: tuple[str, ...]):
        height, width = x.shape[1:3]
        # Neighbouring heads of one order, and the pixels that they meet; None for all, row by row.
        self.parts = [
            (a, b, None if order == "row" else pixels(height, width, order, x.device))
            for a, b, order in runs(orders)
        ]

    def take(self, x: Tensor, begin: int, end: int) -> Tensor:
        """`[positions, B, heads, ...]` of `[B, H, W, heads, ...]`, in the precision of the states."""
        flat = x.flatten(1, 2)
        found = [
            flat[:, begin:end, a:b] if index is None else flat[:, index[begin:end], a:b]
            for a, b, index in self.parts
        ]
        whole = found[0] if len(found) == 1 else torch.cat(found, 2)
        return at_least_float32(whole).transpose(0, 1)

    def put(self, out: Tensor, values: Tensor, begin: int, end: int) -> None:
        """Write `[positions, B, heads, ...]` to their places in a contiguous map."""
        flat, values = out.flatten(1, 2), values.transpose(0, 1)
        for a, b, index in self.parts:
            place = slice(begin, end) if index is None else index[begin:end]
            flat[:, place, a:b] = values[:, :, a:b].to(out.dtype)


class _Chunk:
    """One chunk: step sizes, what is written into the states, and the factors between them."""

    def __init__(
        self,
        walk: _Walk,
        begin: int,
        end: int,
        x: Tensor,
        delta: Tensor,
        B: Tensor,
        A: Tensor,
        delta_bias: Tensor | None,
        delta_softplus: bool,
        buffers: tuple[Tensor, Tensor],
    ):
        self.x, self.B = walk.take(x, begin, end), walk.take(B, begin, end)
        raw = walk.take(delta, begin, end)
        self.raw = raw if delta_bias is None else raw + delta_bias
        self.dt = F.softplus(self.raw) if delta_softplus else self.raw
        self.dx = self.dt * self.x
        self.a, self.h = (buffer[: end - begin] for buffer in buffers)
        torch.mul(self.dt.unsqueeze(-2), A, out=self.a).exp_()
        torch.mul(self.dx.unsqueeze(-2), self.B.unsqueeze(-1), out=self.h)


def _read(h: Tensor, C: Tensor) -> Tensor:
    """`[positions, B, heads, d]`: the states as the rows C see them."""
    return (C.unsqueeze(-2) @ h).squeeze(-2)


def _state_form(x: Tensor, A: Tensor, D: Tensor | None, delta_bias: Tensor | None) -> tuple[Any, ...]:
    """A as `[heads, N, d]`, and all in the precision of the states."""
    dtype = at_least_float32(x).dtype
    rest = (t if t is None else t.to(dtype) for t in (D, delta_bias))
    return A.mT.to(dtype).contiguous(), *rest


def _plan(x: Tensor, A: Tensor) -> tuple[int, int]:
    """Positions per chunk, after which a state is kept, and per block of the forward pass."""
    is_small = x.shape[0] * A.numel() < SMALL_STATE
    return (_SMALL_CHUNK, _SMALL_BLOCK) if is_small else (_CHUNK, _CHUNK)


def _buffers(x: Tensor, A: Tensor, block: int) -> tuple[Tensor, Tensor]:
    shape = (min(x.shape[1] * x.shape[2], block), x.shape[0], *A.shape)
    return A.new_empty(shape), A.new_empty(shape)


def _forward(
    x: Tensor,
    delta: Tensor,
    B: Tensor,
    C: Tensor,
    z: Tensor | None,
    A: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    orders: tuple[str, ...],
    delta_softplus: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    walk, length = _Walk(x, orders), x.shape[1] * x.shape[2]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    with without_autocast(x):
        A, D, delta_bias = _state_form(x, A, D, delta_bias)
        chunk, block = _plan(x, A)
        buffers = _buffers(x, A, block)
        starts = [A.new_zeros(1, x.shape[0], *A.shape)]
        for begin in range(0, length, block):
            end = min(begin + block, length)
            part = _Chunk(walk, begin, end, x, delta, B, A, delta_bias, delta_softplus, buffers)
            if block == chunk:
                step_in_place(part.a, part.h, starts[-1][-1])
            else:
                part.h[0].addcmul_(part.a[0], starts[-1][-1])
                step_on_two_levels(part.a, part.h)
            y = _read(part.h, walk.take(C, begin, end))
            if D is not None:
                y = y.addcmul_(D, part.x)
            if z is not None:
                y = y.mul_(F.silu(walk.take(z, begin, end)))
            walk.put(out, y, begin, end)
            starts.append(part.h[chunk - 1 :: chunk].clone())
        return out, (torch.cat(starts),)


def _gradients(
    grad_out: Tensor,
    kept: tuple[Tensor],
    wanted: Sequence[bool],
    x: Tensor,
    delta: Tensor,
    B: Tensor,
    C: Tensor,
    z: Tensor | None,
    A: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    orders: tuple[str, ...],
    delta_softplus: bool,
) -> list[Tensor | None]:
    """With γ the gradient of the states and Q = γ ⊙ a ⊙ h of the step before:

    `γ_t = dy_t C_tᵀ + a_{t+1} ⊙ γ_{t+1}`, `dΔ = Σ Q A + x (γ B)`, `dA = Σ Q Δ`, `dB = Σ γ Δ x`,
    `dC = Σ dy h`, `dx = Δ (γ B) + D dy`.
    """
    walk, length = _Walk(x, orders), x.shape[1] * x.shape[2]
    given = (x, delta, B, C, z, A, D, delta_bias)
    with without_autocast(x):
        A, D, delta_bias = _state_form(x, A, D, delta_bias)
        chunk, _ = _plan(x, A)
        buffers = _buffers(x, A, chunk)
        of_states = torch.empty_like(buffers[0])
        of_x, of_delta, of_B, of_C = (
            torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, delta, B, C)
        )
        of_z = None if z is None else torch.empty_like(z, memory_format=torch.contiguous_format)
        of_A = torch.zeros_like(A)
        of_D, of_bias = (A.new_zeros(A.shape[0], A.shape[2]) for _ in range(2))
        carry = A.new_zeros(x.shape[0], *A.shape)
        for number in range(-(-length // chunk) - 1, -1, -1):
            begin, end = number * chunk, min((number + 1) * chunk, length)
            part = _Chunk(walk, begin, end, x, delta, B, A, delta_bias, delta_softplus, buffers)
            step_in_place(part.a, part.h, kept[0][number])
            c, dy = walk.take(C, begin, end), walk.take(grad_out, begin, end)
            if z is not None and of_z is not None:
                gate, y = walk.take(z, begin, end), _read(part.h, c)
                y = y if D is None else y.addcmul_(D, part.x)
                share = gate.sigmoid()
                walk.put(of_z, dy * y * share * (1 + gate * (1 - share)), begin, end)
                dy = dy * gate * share
            g = torch.mul(c.unsqueeze(-1), dy.unsqueeze(-2), out=of_states[: end - begin])
            g[-1] += carry
            step_back_in_place(part.a, g)
            torch.mul(part.a[0], g[0], out=carry)
            walk.put(of_C, (part.h @ dy.unsqueeze(-1)).squeeze(-1), begin, end)
            walk.put(of_B, (g @ part.dx.unsqueeze(-1)).squeeze(-1), begin, end)
            through_b = _read(g, part.B)
            # From here `a` holds Q.
            part.a[1:].mul_(part.h[:-1])
            part.a[0].mul_(kept[0][number])
            q = part.a.mul_(g)
            of_A += torch.einsum("tbhnd,tbhd->hnd", q, part.dt)
            of_dt = torch.einsum("tbhnd,hnd->tbhd", q, A).addcmul_(part.x, through_b)
            of_raw = of_dt * part.raw.sigmoid() if delta_softplus else of_dt
            of_bias += of_raw.sum((0, 1))
            walk.put(of_delta, of_raw, begin, end)
            through_x = through_b * part.dt
            if D is not None:
                of_D += torch.einsum("tbhd,tbhd->hd", dy, part.x)
                through_x.addcmul_(D, dy)
            walk.put(of_x, through_x, begin, end)
    rest = (of_A.mT, of_D, of_bias)
    found = [
        of_x,
        of_delta,
        of_B,
        of_C,
        of_z,
        *(None if t is None else g.to(t.dtype) for t, g in zip(given[5:], rest)),
    ]
    return [g if want else None for g, want in zip(found, wanted)]


def _formula(
    x: Tensor,
    delta: Tensor,
    B: Tensor,
    C: Tensor,
    z: Tensor | None,
    A: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    orders: tuple[str, ...],
    delta_softplus: bool,
) -> Tensor:
    with without_autocast(x):
        A, D, delta_bias = _state_form(x, A, D, delta_bias)
        xs, raw, b, c = (to_sequences(at_least_float32(t), orders).transpose(0, 1) for t in (x, delta, B, C))
        raw = raw if delta_bias is None else raw + delta_bias
        dt = F.softplus(raw) if delta_softplus else raw
        h = by_doubling((dt.unsqueeze(-2) * A).exp(), (dt * xs).unsqueeze(-2) * b.unsqueeze(-1))
        y = _read(h, c)
        y = y if D is None else y + D * xs
        y = to_map(y.transpose(0, 1), orders, *x.shape[1:3])
        return (y if z is None else y * F.silu(at_least_float32(z))).to(x.dtype)


selective_scan = Rule(_forward, _gradients, _formula, 8)
