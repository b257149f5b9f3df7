"""Attention with decay in plain PyTorch: products inside of chunks, states between them.

A state `[d, e]` per head runs from chunk to chunk. Inside a chunk, decays are exponentials of differences of
sums that begin with the chunk and never are positive, so that nothing overflows however strong a decay is.
One decay per position and head scales whole scores; one per channel is inside of their sum, so that chunks
are short and scores are summed channel by channel, unless the decays are so mild that their exponentials, and
the inverse of these, can be factors of queries and keys.

Arguments are those of `op.py`, with one order per head. In the code, `[..., positions, c]` is short for
`[B, heads, chunks, positions, c]`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from visionattn._compat import is_functorch_active
from visionattn.kernels.node import Rule
from visionattn.kernels.precision import at_least_float32, without_autocast
from visionattn.kernels.scan.orders import to_map, to_sequences
from visionattn.kernels.scan.plain.first_order import advance

Orders = tuple[str, ...]

# Positions of a chunk, for decays per head and per channel; measured.
_PER_HEAD, _PER_CHANNEL = 32, 8
# Sums of decays of a chunk up to which their exponentials and the inverse of these are factors.
_MILD, _MILD_CHUNK = 60.0, 32


class _Decays:
    """The decays of all chunks: sums from their beginnings, `[..., positions, d or 1]`."""

    def __init__(self, sums: Tensor, is_mild: bool, dtype: torch.dtype):
        self.sums, self.is_mild = sums, is_mild
        self.since_begin = sums.to(dtype).exp()
        self.until_end = (sums[..., -1:, :] - sums).to(dtype).exp()
        self.whole = self.since_begin[..., -1:, :].mT  # [..., d or 1, 1]
        count = sums.shape[-2]
        self.seen = torch.ones(count, count, dtype=torch.bool, device=sums.device).tril()
        if is_mild:
            self.until_begin = (-sums).to(dtype).exp()
        else:
            gone = (sums.unsqueeze(-2) - sums.unsqueeze(-3)).to(dtype)
            self.between = gone.masked_fill(~self.seen.unsqueeze(-1), float("-inf")).exp()

    def scores(self, q: Tensor, k: Tensor, own: bool = True) -> Tensor:
        """`[..., positions, positions]`: decayed products with the keys before, and the `own` one."""
        if self.is_mild:
            return self._masked((q * self.since_begin) @ (k * self.until_begin).mT, own)
        if self.between.shape[-1] == 1:
            return self._masked((q @ k.mT) * self.between.squeeze(-1), own)
        return self._masked(torch.einsum("...id,...jd,...ijd->...ij", q, k, self.between), own)

    def of_scores(self, grad: Tensor, q: Tensor, k: Tensor, own: bool = True) -> tuple[Tensor, Tensor]:
        """Gradients of queries and keys from those of their scores."""
        grad = self._masked(grad, own)
        if self.is_mild:
            of_q = grad @ (k * self.until_begin) * self.since_begin
            return of_q, grad.mT @ (q * self.since_begin) * self.until_begin
        if self.between.shape[-1] == 1:
            grad = grad * self.between.squeeze(-1)
            return grad @ k, grad.mT @ q
        of_q = torch.einsum("...ij,...jd,...ijd->...id", grad, k, self.between)
        return of_q, torch.einsum("...ij,...id,...ijd->...jd", grad, q, self.between)

    def _masked(self, scores: Tensor, own: bool) -> Tensor:
        return scores.masked_fill(~self.seen, 0) if own else scores.tril(-1)

    def of_decays(self, of_sums: Tensor, of_end: Tensor) -> Tensor:
        """Gradients of the decays from those of their sums, `[..., positions, d]`, and of the last sums once
        more, `[..., d]`."""
        of_sums = of_sums.clone()
        of_sums[..., -1, :] += of_end
        of_sums = of_sums.sum_to_size(self.sums.shape)
        return of_sums.flip(-2).cumsum(-2).flip(-2)


def _decays(log_decay: Tensor, orders: Orders) -> tuple[_Decays, int]:
    """The decays by chunks, and the size of these."""
    dtype = at_least_float32(log_decay).dtype
    if log_decay.shape[-1] == 1:
        return _Decays(_sums(log_decay, orders, _PER_HEAD), False, dtype), _PER_HEAD
    # Not where a program is recorded for other numbers.
    is_open = not (torch.jit.is_tracing() or torch.compiler.is_compiling() or is_functorch_active())
    if is_open and log_decay.numel():
        sums = _sums(log_decay, orders, _MILD_CHUNK)
        if bool(sums.detach()[..., -1, :].amin() > -_MILD):
            return _Decays(sums, True, dtype), _MILD_CHUNK
    return _Decays(_sums(log_decay, orders, _PER_CHANNEL), False, dtype), _PER_CHANNEL


def _sums(log_decay: Tensor, orders: Orders, size: int) -> Tensor:
    """Sums of decays from the beginning of every chunk.

    In float64 where there is such: after a decay of 1000, small ones that follow would be rounded to 1e-4.
    """
    has_double = log_decay.device.type in ("cpu", "cuda")
    return _chunked(log_decay.double() if has_double else log_decay, orders, size).cumsum(-2)


def _chunked(x: Tensor, orders: Orders, size: int) -> Tensor:
    """`[..., size, c]` of a map, in the precision of the states; zeros behind the end."""
    x = to_sequences(at_least_float32(x), orders).transpose(1, 2)
    missing = -x.shape[2] % size
    x = F.pad(x, (0, 0, 0, missing)) if missing else x
    return x.unflatten(2, (-1, size))


def _merged(x: Tensor, like: Tensor, orders: Orders) -> Tensor:
    """The inverse of `_chunked`, in the dtype of the map `like`."""
    height, width = like.shape[1:3]
    x = x.flatten(2, 3)[:, :, : height * width].transpose(1, 2)
    return to_map(x.to(like.dtype), orders, height, width)


class _Parts(NamedTuple):
    """One call by chunks: scaled queries, keys, values, and the states at the beginnings of chunks."""

    decays: _Decays
    q: Tensor
    k: Tensor
    v: Tensor
    states: Tensor

    def out(self) -> Tensor:
        """What the queries read inside their chunk and from the state."""
        scores = self.decays.scores(self.q, self.k)
        return scores @ self.v + (self.q * self.decays.since_begin) @ self.states

    def gradients(self, g: Tensor, x: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Gradients of queries, keys, values and sums of decays, and of the sums at the ends of chunks.

        With `x`, every chunk's values are reduced by `x` times its state.
        """
        decays, q, k, v, states = self
        reading, writing = q * decays.since_begin, k * decays.until_end
        of_v, of_read = decays.scores(q, k).mT @ g, reading.mT @ g
        of_end_state = torch.zeros_like(states[:, :, 0])
        after, values = [], []
        for n in range(states.shape[2] - 1, -1, -1):
            values.append(of_v[:, :, n] + writing[:, :, n] @ of_end_state)
            after.append(of_end_state)
            of_end_state = torch.addcmul(of_read[:, :, n], decays.whole[:, :, n], of_end_state)
            if x is not None:
                of_end_state = of_end_state - x[:, :, n].mT @ values[-1]
        of_v, after_all = torch.stack(values[::-1], 2), torch.stack(after[::-1], 2)
        of_q, of_k = decays.of_scores(g @ v.mT, q, k)
        of_sums = q * of_q - k * of_k
        read, written = g @ states.mT * decays.since_begin, v @ after_all.mT * decays.until_end
        of_sums = of_sums + q * read - k * written
        of_end = (k * written).sum(-2) + (after_all * states * decays.whole).sum(-1)
        return of_q + read, of_k + written, of_v, of_sums, of_end


def _decay_parts(v: Tensor, q: Tensor, k: Tensor, log_decay: Tensor, orders: Orders, scale: float) -> _Parts:
    decays, size = _decays(log_decay.expand(*q.shape[:3], -1, -1), orders)
    q, k, v = (_chunked(x, orders, size) for x in (q, k, v))
    written = (k * decays.until_end).mT @ v
    states = [torch.zeros_like(written[:, :, 0])]
    for new, whole in zip(written.unbind(2)[:-1], decays.whole.unbind(2)):
        states.append(torch.addcmul(new, whole, states[-1]))
    return _Parts(decays, q * scale, k, v, torch.stack(states, 2))


def _decay_form(v: Tensor, q: Tensor, k: Tensor, log_decay: Tensor, orders: Orders, scale: float) -> Tensor:
    with without_autocast(v):
        return _merged(_decay_parts(v, q, k, log_decay, orders, scale).out(), v, orders)


def _decay_gradients(
    grad_out: Tensor,
    kept: object,
    wanted: Sequence[bool],
    v: Tensor,
    q: Tensor,
    k: Tensor,
    log_decay: Tensor,
    orders: Orders,
    scale: float,
) -> list[Tensor | None]:
    """With G the gradient of the state: `dq = scale S g`, `dk = G v`, `dv = Gᵀ k`; the sums of decays get
    `q ⊙ dq - k ⊙ dk`."""
    with without_autocast(v):
        parts = _decay_parts(v, q, k, log_decay, orders, scale)
        g = _chunked(grad_out, orders, parts.q.shape[-2])
        of_q, of_k, of_v, of_sums, of_end = parts.gradients(g)
        of_decay = parts.decays.of_decays(of_sums, of_end)
        found = ((of_v, v), (of_q * scale, q), (of_k, k), (of_decay, log_decay))
        return [
            _merged(x, like.expand(*q.shape[:3], -1, -1), orders).sum_to_size(like.shape) if want else None
            for (x, like), want in zip(found, wanted)
        ]


def _as_decay(k: Tensor, orders: Orders) -> tuple[Tensor, Tensor]:
    """The keys `e^{k-z}` and the decays `z_{t-1} - z_t` under which means are attention with decay; z are the
    logs of the sums of `e^k` so far. Both are maps."""
    keys = to_sequences(at_least_float32(k), orders)
    totals = keys.logcumsumexp(1)
    decay = torch.cat([torch.zeros_like(totals[:, :1]), totals[:, :-1] - totals[:, 1:]], 1)
    height, width = k.shape[1:3]
    return to_map((keys - totals).exp(), orders, height, width), to_map(decay, orders, height, width)


def _additive_form(v: Tensor, q: Tensor, k: Tensor, orders: Orders, scale: float) -> Tensor:
    with without_autocast(v):
        keys, decay = _as_decay(k, orders)
        return _decay_form(v, q, keys, decay, orders, scale)


def _additive_gradients(
    grad_out: Tensor,
    kept: object,
    wanted: Sequence[bool],
    v: Tensor,
    q: Tensor,
    k: Tensor,
    orders: Orders,
    scale: float,
) -> list[Tensor | None]:
    """Those of attention with decay, whose keys and decays come from k. The sums z get `-q ⊙ dq`, so that
    `dk_i = e^{k_i - z_i} (dkey_i - Σ_{t>=i} e^{z_i - z_t} q_t ⊙ dq_t)`."""
    with without_autocast(v):
        keys, decay = _as_decay(k, orders)
        wide = (at_least_float32(v), at_least_float32(q), keys)
        parts = _decay_parts(*wide, decay, orders, scale)
        of_q, of_k, of_v, _, _ = parts.gradients(_chunked(grad_out, orders, parts.q.shape[-2]))
        of_v, of_q, of_k = (_merged(x, like, orders) for x, like in zip((of_v, of_q * scale, of_k), wide))
        behind = to_sequences(of_q * wide[1], orders).transpose(0, 1).flip(0).contiguous()
        falling = to_sequences(decay, orders).transpose(0, 1).exp()
        advance(torch.cat([falling[:1], falling.flip(0)[:-1]]), behind)
        of_k = keys * (of_k - to_map(behind.flip(0).transpose(0, 1), orders, *k.shape[1:3]))
        found = ((of_v, v), (of_q, q), (of_k, k))
        return [x.to(like.dtype) if want else None for (x, like), want in zip(found, wanted)]


class _DeltaParts(NamedTuple):
    """A call of the delta rule: attention with decay of other values, and what these come from."""

    parts: _Parts
    keys: Tensor  # scores of the keys with each other, without their own
    solved: Tensor  # [U | X]
    mixed: Tensor  # the strictly lower part of the systems
    values: Tensor
    beta: Tensor


def _delta_parts(
    v: Tensor, q: Tensor, k: Tensor, beta: Tensor, log_decay: Tensor, orders: Orders, scale: float
) -> _DeltaParts:
    """`(I + M) [U | X] = [β v | β e^sums k]` with M the scores of the keys with each other times β; then
    `U - X S` stands for the values."""
    decays, size = _decays(log_decay.expand(*q.shape[:3], -1, -1), orders)
    q, k, v, beta = (_chunked(x, orders, size) for x in (q, k, v, beta))
    keys = decays.scores(k, k, own=False)
    mixed, right = beta * keys, beta * torch.cat([v, k * decays.since_begin], -1)
    solved = torch.linalg.solve_triangular(mixed, right, upper=False, unitriangular=True)
    u, x = solved.split([v.shape[-1], k.shape[-1]], -1)
    written = (k * decays.until_end).mT
    state = torch.zeros_like(written[:, :, 0] @ v[:, :, 0])
    states, values = [], []
    for u_n, x_n, written_n, whole in zip(
        u.unbind(2), x.unbind(2), written.unbind(2), decays.whole.unbind(2)
    ):
        states.append(state)
        values.append(u_n - x_n @ state)
        state = torch.addcmul(written_n @ values[-1], whole, state)
    parts = _Parts(decays, q * scale, k, torch.stack(values, 2), torch.stack(states, 2))
    return _DeltaParts(parts, keys, solved, mixed, v, beta)


def _delta_form(
    v: Tensor, q: Tensor, k: Tensor, beta: Tensor, log_decay: Tensor, orders: Orders, scale: float
) -> Tensor:
    with without_autocast(v):
        return _merged(_delta_parts(v, q, k, beta, log_decay, orders, scale).parts.out(), v, orders)


def _delta_gradients(
    grad_out: Tensor,
    kept: object,
    wanted: Sequence[bool],
    v: Tensor,
    q: Tensor,
    k: Tensor,
    beta: Tensor,
    log_decay: Tensor,
    orders: Orders,
    scale: float,
) -> list[Tensor | None]:
    """Those of attention with decay of the values `U - X S`, and from these through the systems: with R the
    solution of the transposed ones for the gradients of U and X, their right side gets R and M gets
    `-R [U | X]ᵀ`."""
    with without_autocast(v):
        parts, keys, solved, mixed, values, betas = _delta_parts(v, q, k, beta, log_decay, orders, scale)
        decays, k_, width = parts.decays, parts.k, values.shape[-1]
        g = _chunked(grad_out, orders, parts.q.shape[-2])
        of_q, of_k, of_u, of_sums, of_end = parts.gradients(g, solved[..., width:])
        of_solved = torch.cat([of_u, -of_u @ parts.states.mT], -1)
        right = torch.linalg.solve_triangular(mixed.mT, of_solved, upper=True, unitriangular=True)
        of_mixed = -(right @ solved.mT)
        reading = k_ * decays.since_begin
        through_u, through_x = right[..., :width], right[..., width:]
        of_beta = (through_u * values).sum(-1) + (through_x * reading).sum(-1) + (of_mixed * keys).sum(-1)
        as_query, as_key = decays.of_scores(betas * of_mixed, k_, k_, own=False)
        as_reader = betas * through_x * decays.since_begin
        of_k = of_k + as_query + as_key + as_reader
        of_sums = of_sums + k_ * (as_query - as_key + as_reader)
        of_decay = decays.of_decays(of_sums, of_end)
        found = (
            (betas * through_u, v),
            (of_q * scale, q),
            (of_k, k),
            (of_beta.unsqueeze(-1), beta),
            (of_decay, log_decay),
        )
        return [
            _merged(x, like.expand(*q.shape[:3], -1, -1), orders).sum_to_size(like.shape) if want else None
            for (x, like), want in zip(found, wanted)
        ]


def _keeping_nothing(form: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, tuple[Tensor, ...]]]:
    return lambda *args: (form(*args), ())


decay_attention = Rule(_keeping_nothing(_decay_form), _decay_gradients, _decay_form, 4)
additive_decay_attention = Rule(_keeping_nothing(_additive_form), _additive_gradients, _additive_form, 3)
delta_attention = Rule(_keeping_nothing(_delta_form), _delta_gradients, _delta_form, 5)
