"""The public recurrent functions: argument checks and the choice of the implementation.

All maps are heads-last, `[B, H, W, heads, ...]`; a sequence is a map of height 1. Every head carries a state
from pixel to pixel in the head's order: `row` (`t = y W + x`), `column` (`t = x H + y`), or one of them from
the end, with `-reversed`. Directions are heads: who wants several makes as many heads, by `expand`, and
adds the outputs, which lie at their pixels. Decays are natural logarithms, at most 0. Sums, decays and
states are float32 for half-precision inputs, under autocast too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from visionattn.kernels.checks import MAX_HEAD_DIM
from visionattn.kernels.dispatch import Operator
from visionattn.kernels.linear.op import linear_attention
from visionattn.kernels.operator import leaf
from visionattn.kernels.scan.library import (
    ADDITIVE_DECAY_ATTENTION,
    DECAY_ATTENTION,
    DELTA_ATTENTION,
    LINEAR_RECURRENCE,
    SELECTIVE_SCAN,
)
from visionattn.kernels.scan.orders import Order, check_order, line_by_line

Orders = Order | Sequence[Order]


@leaf
def selective_scan(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = True,
    order: Orders = "row",
    restart: bool = False,
) -> Tensor:
    """The selective state space of Mamba (https://arxiv.org/abs/2312.00752), in any order of the pixels.

    With `Δ = softplus(delta + delta_bias)`, per channel: `h_t = exp(Δ_t A) h_{t-1} + Δ_t x_t B_t`,
    `y_t = h_t · C_t + D x_t`, and `y SiLU(z)` comes out.

    Args:
        x: inputs `[B, H, W, heads, d]`; may be expanded over the heads.
        delta: step sizes before bias and softplus, as x.
        A: `[heads, d, N]`, commonly negative.
        B: what is written into the N states, `[B, H, W, heads, N]`, shared by the channels of a head.
        C: what is read from them, as B.
        D: the direct way, `[heads, d]`.
        z: gates, as x.
        delta_bias: added to `delta`, `[heads, d]`.
        delta_softplus: whether step sizes pass a softplus; without it they are taken as they are.
        order: the way through the map, one for all heads or one for each.
        restart: begin with a zero state at every row, or column.

    Returns:
        `[B, H, W, heads, d]`, contiguous, in the dtype of x.

    Raises:
        ValueError: shapes, devices or dtypes do not fit, or an unknown order.
    """
    name = "selective_scan"
    batch, height, width, heads, channels = _check_map(name, "x", x)
    if A.dim() != 3 or tuple(A.shape[:2]) != (heads, channels) or not A.shape[2]:
        raise ValueError(f"{name}: A must be [{heads}, {channels}, states], got shape {tuple(A.shape)}")
    states = (batch, height, width, heads, A.shape[2])
    for letter, t, shape in (
        ("delta", delta, x.shape),
        ("B", B, states),
        ("C", C, states),
        ("z", z, x.shape),
        ("A", A, A.shape),
        ("D", D, (heads, channels)),
        ("delta_bias", delta_bias, (heads, channels)),
    ):
        _check_like(name, letter, t, shape, x)
    orders = check_order(name, order, heads)
    return _run(SELECTIVE_SCAN, (x, delta, B, C, z), (A, D, delta_bias), orders, restart, delta_softplus)


@leaf
def decay_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float | None = None,
    order: Orders = "row",
    restart: bool = False,
) -> Tensor:
    """Linear attention whose memory decays: `S_t = e^{w_t} S_{t-1} + k_t v_tᵀ`, `o_t = scale S_tᵀ q_t`.

    With one decay per head: RetNet (https://arxiv.org/abs/2307.08621) and Lightning attention
    (https://arxiv.org/abs/2405.17381), there with a scale of 1; with one per head and pixel: Mamba-2
    (https://arxiv.org/abs/2405.21060); with one per channel: GLA (https://arxiv.org/abs/2312.06635).

    Args:
        q: queries `[B, H, W, heads, d]`.
        k: keys, as q.
        v: values `[B, H, W, heads, e]`.
        log_decay: w, `[heads]`, `[B, H, W, heads]`, `[B, H, W, heads, 1]` or, per channel of the keys,
            `[B, H, W, heads, d]`; at most 0.
        scale: multiplies the outputs; `d ** -0.5` by default.
        order: the way through the map, one for all heads or one for each.
        restart: begin with a zero state at every row, or column.

    Returns:
        `[B, H, W, heads, e]`, contiguous.

    Raises:
        ValueError: shapes, devices or dtypes do not fit, or an unknown order.
    """
    name = "decay_attention"
    _check_qkv(name, q, k, v)
    decay = _decay_of(name, log_decay, q)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    orders = check_order(name, order, q.shape[3])
    return _run(DECAY_ATTENTION, (v, q, k, decay), (), orders, restart, scale)


@leaf
def linear_recurrence(
    x: Tensor, log_decay: Tensor, *, order: Orders = "row", restart: bool = False
) -> Tensor:
    """A decaying sum: `y_t = e^{w_t} y_{t-1} + x_t` (HGRN, https://arxiv.org/abs/2311.04823).

    Args:
        x: `[B, H, W, heads, d]`.
        log_decay: w, `[heads]`, `[B, H, W, heads]`, `[B, H, W, heads, 1]` or `[B, H, W, heads, d]`; at
            most 0.
        order: the way through the map, one for all heads or one for each.
        restart: begin with zero at every row, or column.

    Returns:
        `[B, H, W, heads, d]`, contiguous.

    Raises:
        ValueError: shapes, devices or dtypes do not fit, or an unknown order.
    """
    name = "linear_recurrence"
    heads = _check_map(name, "x", x)[3]
    maps = (x, _decay_of(name, log_decay, x))
    return _run(LINEAR_RECURRENCE, maps, (), check_order(name, order, heads), restart)


@leaf
def additive_decay_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float = 1.0,
    order: Orders = "row",
    restart: bool = False,
) -> Tensor:
    """Linear attention with keys that share a softmax over the pixels (LightNet,
    https://arxiv.org/abs/2405.21022).

    `S_t = Σ_i softmax_i(k) v_iᵀ`, channel by channel of the keys, `o_t = scale S_tᵀ q_t`: over all pixels, or
    with `causal` over those up to t, which is a state that decays by what is added.

    Args:
        q: queries `[B, H, W, heads, d]`.
        k: keys, as q: their exponentials are the weights.
        v: values `[B, H, W, heads, e]`; with e = d where not `causal`.
        causal: whether a pixel sees those before it alone, and itself.
        scale: multiplies the outputs.
        order: the way through the map, one for all heads or one for each; without effect unless `causal`.
        restart: begin anew at every row, or column.

    Returns:
        `[B, H, W, heads, e]`, contiguous.

    Raises:
        ValueError: shapes, devices or dtypes do not fit, an unknown order, or `restart` without `causal`.
    """
    name = "additive_decay_attention"
    _check_qkv(name, q, k, v)
    orders = check_order(name, order, q.shape[3])
    if causal:
        return _run(ADDITIVE_DECAY_ATTENTION, (v, q, k), (), orders, restart, scale)
    if restart:
        raise ValueError(f"{name}: restart=True goes with causal=True")
    wide = torch.promote_types(k.dtype, torch.float32)
    weights = k.flatten(1, 2).softmax(1, dtype=wide).to(k.dtype).view(k.shape)
    return linear_attention(q, weights, v, normalize="none", scale=scale)


@leaf
def delta_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    log_decay: Tensor | None = None,
    scale: float | None = None,
    order: Orders = "row",
    restart: bool = False,
) -> Tensor:
    """The delta rule (https://arxiv.org/abs/2406.06484), gated with a decay (https://arxiv.org/abs/2412.06464).

    `S' = e^{w_t} S_{t-1}`, `S_t = S' + β_t k_t (v_t - S'ᵀ k_t)ᵀ`, `o_t = scale S_tᵀ q_t`: what the state says
    about a key is replaced, by the share β. Keys should have unit length: with `β |k|²` above 2 it diverges.

    Args:
        q: queries `[B, H, W, heads, d]`.
        k: keys, as q.
        v: values `[B, H, W, heads, e]`.
        beta: `[B, H, W, heads]`, in (0, 1).
        log_decay: w, `[heads]`, `[B, H, W, heads]`, `[B, H, W, heads, 1]` or, per channel of the keys,
            `[B, H, W, heads, d]`; at most 0. None: no decay.
        scale: multiplies the outputs; `d ** -0.5` by default.
        order: the way through the map, one for all heads or one for each.
        restart: begin with a zero state at every row, or column.

    Returns:
        `[B, H, W, heads, e]`, contiguous.

    Raises:
        ValueError: shapes, devices or dtypes do not fit, or an unknown order.
    """
    name = "delta_attention"
    _check_qkv(name, q, k, v)
    _check_like(name, "beta", beta, q.shape[:4], q)
    log_decay = q.new_zeros(q.shape[3]) if log_decay is None else log_decay
    decay = _decay_of(name, log_decay, q)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    orders = check_order(name, order, q.shape[3])
    return _run(DELTA_ATTENTION, (v, q, k, beta.unsqueeze(-1), decay), (), orders, restart, scale)


def _run(
    operator: Operator,
    maps: Sequence[Tensor | None],
    per_head: Sequence[Tensor | None],
    orders: tuple[str, ...],
    restart: bool,
    *numbers: object,
) -> Tensor:
    if not restart:
        return operator(*maps, *per_head, orders, *numbers).contiguous()
    return line_by_line(operator, maps, per_head, orders, *numbers)


def _check_map(name: str, letter: str, x: Tensor) -> tuple[int, ...]:
    if x.dim() != 5 or not all(x.shape[1:]):
        raise ValueError(
            f"{name}: {letter} must be [B, H, W, heads, channels], where only B may be 0, got shape "
            f"{tuple(x.shape)}"
        )
    if not torch.is_floating_point(x):
        raise ValueError(f"{name}: {letter} must be of a floating-point dtype, got {x.dtype}")
    return tuple(x.shape)


def _check_like(name: str, letter: str, t: Tensor | None, shape: Sequence[int], x: Tensor) -> None:
    if t is None:
        return
    if tuple(t.shape) != tuple(shape):
        raise ValueError(f"{name}: {letter} has shape {tuple(t.shape)}; needed is {tuple(shape)}")
    if t.device != x.device:
        raise ValueError(f"{name}: {letter} is on {t.device}, the other tensors are on {x.device}")
    if not torch.is_floating_point(t):
        raise ValueError(f"{name}: {letter} must be of a floating-point dtype, got {t.dtype}")


def _check_qkv(name: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    _check_map(name, "q", q)
    _check_map(name, "v", v)
    _check_like(name, "k", k, q.shape, q)
    _check_like(name, "v", v, (*q.shape[:4], v.shape[4]), q)
    if k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(f"{name}: q is {q.dtype}, k {k.dtype} and v {v.dtype}; they must be of one dtype")
    if max(q.shape[4], v.shape[4]) > MAX_HEAD_DIM:
        raise ValueError(
            f"{name}: head dims {q.shape[4]} and {v.shape[4]}; at most {MAX_HEAD_DIM} is allowed"
        )


def _decay_of(name: str, log_decay: Tensor, x: Tensor) -> Tensor:
    """Decays as `[B, 1 | H, 1 | W, heads, 1 | d]`."""
    maps, heads = tuple(x.shape[:4]), x.shape[3]
    allowed = ((heads,), maps, (*maps, 1), tuple(x.shape))
    if tuple(log_decay.shape) not in allowed:
        raise ValueError(
            f"{name}: log_decay has shape {tuple(log_decay.shape)}; needed is one of "
            f"{', '.join(map(str, allowed))}"
        )
    _check_like(name, "log_decay", log_decay, log_decay.shape, x)
    if log_decay.dim() == 1:
        return log_decay.view(1, 1, 1, -1, 1).expand(x.shape[0], -1, -1, -1, -1)
    return log_decay if log_decay.dim() == 5 else log_decay.unsqueeze(-1)
